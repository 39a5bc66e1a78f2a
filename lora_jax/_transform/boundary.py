"""What crosses the boundary of a trace: errors of Python code that needs values, results that hold traced arrays."""

from __future__ import annotations

import contextlib
import gc
import inspect
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
    """Raises `TracingError` where `apply`, traced inside, needs the value of an array in Python."""
    try:
        yield
    except _NEEDS_VALUES as error:
        raise TracingError(
            f"Cannot trace {_name(apply)}: its Python code needs the value of an array, which is not known while it is "
            f"traced ({type(error).__name__}).\n"
            f"  at {raised_at(error)}\n"
            "  Adapt what can be traced, such as the step inside a loop: `lora(step)`; or run the loop on "
            "`merge(params, adapter)`.\n"
            "  Python code may depend on shapes and on arguments that are not arrays, such as numbers and strings."
        ) from error


def check_names(apply: Callable[..., Any], names: Sequence[str], function: str) -> None:
    """Raises `SpecError` if `apply` has a parameter of its own that has the name of one of the library's keywords."""
    try:
        parameters = inspect.signature(apply).parameters
    except (TypeError, ValueError):  # some callables have no signature
        return
    if taken := [name for name in names if name in parameters]:
        raise SpecError(
            f"Expected {_name(apply)} to have no parameter named {taken[0]!r}, which is a keyword of what "
            f"`{function}` returns.\n"
            f"  Wrap it: lora(lambda params, *args, mine=None: apply(params, *args, {taken[0]}=mine))."
        )


def check_statics(apply: Callable[..., Any], statics: Sequence[Any], out_def: PyTreeDef) -> None:
    """Raises `TracingError` if a result of `apply` that is not an array holds one of the trace, which is over.

    Args:
      apply: the function, already traced.
      statics: its results that are not arrays, and None in place of each that is.
      out_def: how the results were put together.
    """
    for number, static in enumerate(statics):
        tracer = _tracer_in(static)
        if tracer is None or not _is_over(tracer):
            continue
        places = jax.tree_util.tree_flatten_with_path(jax.tree_util.tree_unflatten(out_def, range(len(statics))))[0]
        where, kind = jax.tree_util.keystr(places[number][0]), type(static).__qualname__
        raise TracingError(
            f"Expected {_name(apply)} to return arrays, pytrees of arrays, or values without arrays; its result{where} "
            f"is a `{kind}`, which JAX does not know, and it holds the traced array {jax.typeof(tracer)}.\n"
            "  Register the type as a pytree, as by `jax.tree_util.register_dataclass`, or return its arrays."
        )


def _name(apply: Callable[..., Any]) -> str:
    return f"`{getattr(apply, '__qualname__', type(apply).__qualname__)}`"


_PLAIN = (type(None), int, float, complex, str, bytes, type, types.ModuleType, types.CodeType, np.generic, jax.Array)
_MOST = 10_000  # objects looked at; what holds more is no result of a model


def _tracer_in(value: Any) -> Tracer[Any] | None:
    """A traced array that an object holds, in its attributes, its items or its closure; None if none is found."""
    seen: dict[int, Any] = {}
    pending = [value]
    while pending and len(seen) < _MOST:
        x = pending.pop()
        if isinstance(x, Tracer):
            return x
        if not isinstance(x, _PLAIN) and id(x) not in seen:
            seen[id(x)] = x
            pending += _held(x)
    return None


def _held(x: Any) -> list[Any]:
    """What an object refers to; of functions not the module that they are in, of JAX's objects not its caches."""
    if isinstance(x, types.FunctionType):
        return [x.__closure__, x.__defaults__, x.__kwdefaults__, vars(x)]
    if type(x).__module__.partition(".")[0] in ("jax", "jaxlib"):
        return [getattr(x, "__wrapped__", None)]
    return gc.get_referents(x)


def _is_over(tracer: Tracer[Any]) -> bool:
    """Whether the trace is over that a traced array belongs to; one of a `jit` around the call lives on."""
    try:
        lax.optimization_barrier(tracer)
    except jax.errors.UnexpectedTracerError:
        return True
    return False
