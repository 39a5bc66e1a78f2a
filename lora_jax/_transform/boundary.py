"""Errors at the boundary of a trace: Python code that needs values, and results that contain traced arrays."""

from __future__ import annotations

import contextlib
import gc
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.tree_util import PyTreeDef

from .._compat import raised_at
from .._errors import SpecError, TracingError

_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


@contextlib.contextmanager
def python_without_values(apply: Callable[..., Any]) -> Iterator[None]:
    """Raises `TracingError` if the Python code of `apply`, traced inside, needs the value of an array."""
    try:
        yield
    except _NEEDS_VALUES as error:
        raise TracingError(
            f"Cannot trace {_name(apply)}: its Python code needs the value of an array, which is not known "
            f"while it is traced ({type(error).__name__}).\n"
            f"  at {raised_at(error)}\n"
            "  Adapt what can be traced, such as the step inside a loop: `lora(step)`; or run the loop on "
            "`merge(params, adapter)`.\n"
            "  Python code may depend on shapes and on arguments that are not arrays, such as numbers and strings."
        ) from error


def check_function(apply: Any) -> None:
    """Raises `TracingError` unless `apply` is a function of parameters, which a module of Flax is not."""
    nnx, linen = (sys.modules.get(f"flax.{name}") for name in ("nnx", "linen"))  # importing them is slow
    kind = type(apply).__name__
    if nnx is not None and isinstance(apply, nnx.Module):
        got = f"the NNX module `{kind}`, which holds its parameters"
        advice = (
            "Split it: apply, params, rest = lora_jax.nnx.functional(module); `rest` is the model's first argument."
        )
    elif linen is not None and isinstance(apply, linen.Module):
        got, advice = f"the Linen module `{kind}`", "Pass its method: `model.apply`."
    elif not callable(apply):
        got, advice = f"a value of type `{kind}`", "The arguments come in this order: first `apply`, then `params`."
    else:
        return
    raise TracingError(f"Expected a function of parameters, `apply(params, *args)`; got {got}.\n  {advice}")


def check_keywords(apply: Callable[..., Any], names: Sequence[str], function: str) -> None:
    """Raises `SpecError` if a parameter of `apply` has the name of one of a function's keyword arguments."""
    try:
        parameters = inspect.signature(apply).parameters
    except (TypeError, ValueError):  # some callables have no signature
        return
    if clashing := [name for name in names if name in parameters]:
        raise SpecError(
            f"Expected {_name(apply)} to have no parameter named {clashing[0]!r}, which is a keyword argument "
            f"of {function}.\n"
            f"  Wrap it: lambda params, *args, mine=None: apply(params, *args, {clashing[0]}=mine)."
        )


def check_statics(apply: Callable[..., Any], statics: Sequence[Any], out_def: PyTreeDef) -> None:
    """Raises `TracingError` if a result of `apply` that is not an array contains an array of the finished trace.

    Args:
      apply: the traced function.
      statics: the leaves of its result, with None in place of each array.
      out_def: the tree of the result.
    """
    for number, static in enumerate(statics):
        tracer = _tracer_in(static)
        if tracer is None or not _is_leaked(tracer):
            continue
        paths = jax.tree_util.tree_flatten_with_path(jax.tree_util.tree_unflatten(out_def, range(len(statics))))[0]
        where, kind = jax.tree_util.keystr(paths[number][0]), type(static).__qualname__
        raise TracingError(
            f"Expected {_name(apply)} to return arrays, pytrees of arrays, or values without arrays; its result{where} "
            f"is a `{kind}`, which is not a pytree, and contains the traced array {jax.typeof(tracer)}.\n"
            "  Register the type as a pytree, as with `jax.tree_util.register_dataclass`, or return its arrays."
        )


def _name(apply: Callable[..., Any]) -> str:
    return f"`{getattr(apply, '__qualname__', type(apply).__qualname__)}`"


_PLAIN = (type(None), int, float, complex, str, bytes, type, types.ModuleType, types.CodeType, np.generic, jax.Array)
_MAX_OBJECTS = 10_000  # searched in one result


def _tracer_in(value: Any) -> Tracer[Any] | None:
    """Returns a traced array in the attributes, items or closure of an object, or None."""
    seen: dict[int, Any] = {}
    pending = [value]
    while pending and len(seen) < _MAX_OBJECTS:
        x = pending.pop()
        if isinstance(x, Tracer):
            return x
        if not isinstance(x, _PLAIN) and id(x) not in seen:
            seen[id(x)] = x
            pending += _referents(x)
    return None


def _referents(x: Any) -> list[Any]:
    """Returns the objects that an object refers to, except globals of functions and caches of JAX."""
    if isinstance(x, types.FunctionType):
        return [x.__closure__, x.__defaults__, x.__kwdefaults__, vars(x)]
    if type(x).__module__.partition(".")[0] in ("jax", "jaxlib"):
        return [getattr(x, "__wrapped__", None)]
    return gc.get_referents(x)


def _is_leaked(tracer: Tracer[Any]) -> bool:
    """Whether the trace of an array is finished; that of a `jit` around the call is not."""
    try:
        lax.optimization_barrier(tracer)
    except jax.errors.UnexpectedTracerError:
        return True
    return False
