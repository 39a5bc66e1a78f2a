"""The only file that depends on JAX versions or imports `jax.extend`.

`parameters` converts the parameters of an equation to one form for all supported versions, in which inner jaxprs are
closed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr as ClosedJaxpr  # type: ignore[attr-defined]
from jax.extend.core import DebugInfo
from jax.extend.core import Jaxpr as Jaxpr
from jax.extend.core import JaxprEqn as JaxprEqn
from jax.extend.core import Literal as Literal
from jax.extend.core import Primitive as Primitive
from jax.extend.core import Var as Var
from jax.extend.core import primitives as primitives

from ._errors import UnsupportedError

SUPPORTED = "0.10.2 to 0.12"  # the JAX versions that the tests run on

# Folders whose stack frames are not the user's. NumPy is one, because its functions dispatch to JAX.
_LIBRARIES = tuple(
    os.path.join(os.path.dirname(spec.origin), "")
    for name in (__package__, "flax", "haiku", "equinox", "numpy")
    if (spec := importlib.util.find_spec(name)) is not None and spec.origin is not None
)


@contextlib.contextmanager
def context_of(eqn: JaxprEqn) -> Iterator[None]:
    """Gives new operations the context of `eqn`: its name scopes, source line and mesh."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(_source_of(eqn).traceback, name_stack=names), eqn.ctx.manager:
        yield


def _source_of(eqn: JaxprEqn) -> source_info_util.SourceInfo:
    """The source of `eqn`; for an equation inside one of JAX's own jitted functions, the source of the call."""
    return eqn.source_info if source_info_util.summarize(eqn.source_info) else source_info_util.current()


def evaluate(
    eqns: Sequence[JaxprEqn], inputs: Sequence[Var], outputs: Sequence[Var], values: Sequence[Any]
) -> list[Any]:
    """Evaluates equations unchanged with `jax.core.eval_jaxpr`."""
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    names = DebugInfo("lora", "equations", tuple(map(str, inputs)), tuple(map(str, outputs)))
    return jax.core.eval_jaxpr(Jaxpr((), inputs, outputs, eqns, effects, names), (), *values)


Parameters = dict[str, Any]


def parameters(eqn: JaxprEqn, required: Collection[str], optional: Collection[str] = ()) -> Parameters:
    """Returns the parameters of an equation, in one form for all supported JAX versions.

    Args:
      eqn: any equation.
      required: the names that the caller reads.
      optional: names that the equation may lack.

    Raises:
      UnsupportedError: if the equation has a parameter that is neither required nor optional, because ignoring it
        could change the result; or if it lacks a required one. Either can happen with a newer JAX.
    """
    known = normal_parameters(eqn)
    wrong = {
        "has the unknown parameter": [name for name in known if name not in required and name not in optional],
        "lacks the parameter": [name for name in required if name not in known],
    }
    for verb, names in wrong.items():
        if names:
            raise UnsupportedError(
                f"Expected `{eqn.primitive.name}` to have the parameters that it has in JAX {SUPPORTED}; in JAX "
                f"{jax.__version__} it {verb} {', '.join(map(repr, names))}.",
                user_line(eqn),
                f"lora_jax supports JAX {SUPPORTED}: install one of these, or a newer lora_jax.",
            )
    return known


def normal_parameters(eqn: JaxprEqn) -> Parameters:
    """Returns the parameters of an equation, unchecked, in one form for all supported JAX versions."""
    closed = {name: ClosedJaxpr(x, ()) if _is_open(x) else x for name, x in eqn.params.items()}
    return _NORMAL.get(eqn.primitive.name, dict)(closed)


def _scan(params: Parameters) -> Parameters:
    """JAX 0.10 stores how many operands are constants and carry. JAX 0.11 stores operands and results in groups."""
    if "ft_in" not in params:
        return dict(params)
    consts, carry, _ = params["ft_in"].unpack()
    ungrouped = {name: x for name, x in params.items() if name not in ("ft_in", "ft_out")}
    return ungrouped | {"num_consts": len(consts), "num_carry": len(carry)}


def _cond(params: Parameters) -> Parameters:
    """Only a `cond` of `lax.platform_dependent` has `branches_platforms`."""
    return {"branches_platforms": None, **params}


def _is_open(x: Any) -> bool:
    """JAX 0.10 stores open jaxprs for some primitives; in JAX 0.12 every jaxpr is closed."""
    return isinstance(x, Jaxpr) and not hasattr(x, "consts")


_NORMAL: dict[str, Callable[[Parameters], Parameters]] = {"scan": _scan, "cond": _cond}


def user_line(eqn: JaxprEqn) -> str:
    """Returns the user's line for `eqn`, such as `model.py:31 (Block.__call__)`; skips frames of libraries."""
    frames = source_info_util.summarize(_source_of(eqn), num_frames=100).split("\n")[::-1]  # innermost first
    user_frames = [frame for frame in frames if not frame.startswith(_LIBRARIES)]
    return (user_frames or frames)[0]


def is_transposed(eqn: JaxprEqn) -> bool:
    """Whether `eqn` comes from reverse-mode differentiation, which JAX records in the name scope."""
    return "transpose(" in str(eqn.source_info.name_stack)


def raised_at(error: BaseException) -> str:
    """Returns the user's line that raised an error, such as `model.py:31 (Block.__call__)`; skips JAX and libraries."""
    libraries = (*_LIBRARIES, os.path.join(os.path.dirname(jax.__file__), ""))
    frames = traceback.extract_tb(error.__traceback__)[::-1]  # innermost first
    user_frames = [frame for frame in frames if not frame.filename.startswith(libraries)]
    frame = (user_frames or frames)[0]
    return f"{frame.filename}:{frame.lineno} ({frame.name})"


def live_equations(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """Returns the equations that have an effect or that a result depends on."""
    needed = set(variables(jaxpr.outvars))
    live = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            needed.update(variables(eqn.invars))
            live.append(eqn)
    return live[::-1]


def last_uses(eqns: Sequence[JaxprEqn], outputs: Sequence[Any]) -> dict[Var, int]:
    """Returns the index of the last equation that reads each variable; `len(eqns)` for an output."""
    last = {var: index for index, eqn in enumerate(eqns) for var in variables(eqn.invars)}
    return last | dict.fromkeys(variables(outputs), len(eqns))


def variables(atoms: Collection[Any]) -> list[Var]:
    """Returns the operands that are variables, not literals."""
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def is_unspecified(sharding: Any) -> bool:
    """Whether a sharding of a `jit` equation was left unspecified by the user."""
    return type(sharding).__name__ == "UnspecifiedValue"


def varying(array_type: Any) -> frozenset[str]:
    """Returns the mesh axes over which an array of a type may vary inside a `shard_map`; none without `check_vma`."""
    names: frozenset[str] = array_type.mat.varying
    return names


def compute_on(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Wraps a function in `compute_on`. In JAX 0.10 the wrapper is `compute_on2`; `compute_on` is a context manager."""
    from jax.experimental import compute_on as module  # not imported unless a model uses it

    wrap: Any = getattr(module, "compute_on2", None) or module.compute_on
    rebuilt: Callable[..., Any] = wrap(function, **options)
    return rebuilt


def compiler_options(platform: str) -> dict[str, str]:
    """Returns the options with which a program for `platform` has the memory of a program for an accelerator.

    The CPU compiler multiplies 16-bit floats in float32, and would cast all layers of a stack before the loop over
    them. No accelerator does that.
    """
    return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"} if platform == "cpu" else {}
