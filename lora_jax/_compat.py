"""The only file that knows JAX versions or `jax.extend`.

The other files see each equation in one normal form, whatever parameters this JAX keeps it in (`parameters`), and every
jaxpr inside it closed.
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

SUPPORTED = "0.10.2 to 0.12"  # the versions of JAX that the tests run on

# Whose frames are not the user's. NumPy is among them because its functions pass JAX arrays on to JAX.
_LIBRARIES = tuple(
    os.path.join(os.path.dirname(spec.origin), "")
    for name in (__package__, "flax", "haiku", "equinox", "numpy")
    if (spec := importlib.util.find_spec(name)) is not None and spec.origin is not None
)


@contextlib.contextmanager
def context_of(eqn: JaxprEqn) -> Iterator[None]:
    """Puts new operations where `eqn` stands: its name scopes, its source line, its mesh and other context."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(_source_of(eqn).traceback, name_stack=names), eqn.ctx.manager:
        yield


def _source_of(eqn: JaxprEqn) -> source_info_util.SourceInfo:
    """Where the user asked for `eqn`; inside a function that JAX has jitted itself, where they called that."""
    return eqn.source_info if source_info_util.summarize(eqn.source_info) else source_info_util.current()


def evaluate(
    eqns: Sequence[JaxprEqn], inputs: Sequence[Var], outputs: Sequence[Var], values: Sequence[Any]
) -> list[Any]:
    """Runs equations, untouched, in JAX's own evaluator."""
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    names = DebugInfo("lora", "equations", tuple(map(str, inputs)), tuple(map(str, outputs)))
    return jax.core.eval_jaxpr(Jaxpr((), inputs, outputs, eqns, effects, names), (), *values)


Parameters = dict[str, Any]


def parameters(eqn: JaxprEqn, required: Collection[str], optional: Collection[str] = ()) -> Parameters:
    """Returns the parameters of an equation in the form that is the same for every supported JAX.

    Args:
      eqn: any equation.
      required: the names that the caller reads.
      optional: names that the equation may lack.

    Raises:
      UnsupportedError: if the equation has a parameter that the caller does not know, or lacks one that it needs, as
        in a version of JAX that is newer than this library. A parameter that is ignored could change the result.
    """
    known = normal_parameters(eqn)
    wrong = {
        "has the parameter": [name for name in known if name not in required and name not in optional],
        "lacks the parameter": [name for name in required if name not in known],
    }
    for verb, names in wrong.items():
        if names:
            raise UnsupportedError(
                f"Expected the parameters of `{eqn.primitive.name}` that JAX {SUPPORTED} gives it; in JAX "
                f"{jax.__version__} it {verb} {', '.join(map(repr, names))}, which lora_jax does not "
                f"{'know' if verb.startswith('has') else 'find'}.",
                user_line(eqn),
                f"lora_jax supports JAX {SUPPORTED}: install one of these, or a newer lora_jax.",
            )
    return known


def normal_parameters(eqn: JaxprEqn) -> Parameters:
    """The parameters of an equation, unchecked, in the form that is the same for every supported JAX."""
    closed = {name: ClosedJaxpr(x, ()) if _is_open(x) else x for name, x in eqn.params.items()}
    return _NORMAL.get(eqn.primitive.name, dict)(closed)


def _scan(params: Parameters) -> Parameters:
    """JAX 0.10 counts the operands that are constants and carry; 0.11 groups the operands, and the results."""
    if "ft_in" not in params:
        return dict(params)
    consts, carry, _ = params["ft_in"].unpack()
    others = {name: x for name, x in params.items() if name not in ("ft_in", "ft_out")}
    return others | {"num_consts": len(consts), "num_carry": len(carry)}


def _cond(params: Parameters) -> Parameters:
    """Only `lax.platform_dependent` names platforms."""
    return {"branches_platforms": None, **params}


def _is_open(x: Any) -> bool:
    """JAX 0.10 keeps the bodies of some primitives open; in 0.12 every jaxpr is closed."""
    return isinstance(x, Jaxpr) and not hasattr(x, "consts")


_NORMAL: dict[str, Callable[[Parameters], Parameters]] = {"scan": _scan, "cond": _cond}


def user_line(eqn: JaxprEqn) -> str:
    """Where the user's code asked for `eqn`: `model.py:31 (Block.__call__)`, not a frame of flax or of this library."""
    frames = source_info_util.summarize(_source_of(eqn), num_frames=100).split("\n")[::-1]  # innermost first
    own = [frame for frame in frames if not frame.startswith(_LIBRARIES)]
    return (own or frames)[0]


def is_transposed(eqn: JaxprEqn) -> bool:
    """Whether JAX made `eqn` to differentiate backwards: it then stands in a name scope that says so."""
    return "transpose(" in str(eqn.source_info.name_stack)


def raised_at(error: BaseException) -> str:
    """Where the user's code raised an error: `model.py:31 (Block.__call__)`, not a frame of JAX or of a library."""
    libraries = (*_LIBRARIES, os.path.join(os.path.dirname(jax.__file__), ""))
    frames = traceback.extract_tb(error.__traceback__)[::-1]  # innermost first
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    frame = (own or frames)[0]
    return f"{frame.filename}:{frame.lineno} ({frame.name})"


def live_equations(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """The equations that a result needs, or that have an effect; what a model computes and drops is not among them."""
    needed = set(variables(jaxpr.outvars))
    live = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            needed.update(variables(eqn.invars))
            live.append(eqn)
    return live[::-1]


def last_uses(eqns: Sequence[JaxprEqn], outputs: Sequence[Any]) -> dict[Var, int]:
    """For each variable, the number of the last equation that reads it; that of the end, if it is an output."""
    last = {var: number for number, eqn in enumerate(eqns) for var in variables(eqn.invars)}
    return last | dict.fromkeys(variables(outputs), len(eqns))


def variables(atoms: Collection[Any]) -> list[Var]:
    """The variables among the operands of an equation: those that are not literals."""
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def is_unspecified(sharding: Any) -> bool:
    """Whether a sharding of a `jit` equation is the one that nobody asked for."""
    return type(sharding).__name__ == "UnspecifiedValue"


def varying(x: Any) -> frozenset[str]:
    """The mesh axes over which an array inside a `shard_map` may differ; none, without `check_vma`."""
    names: frozenset[str] = jax.typeof(x).mat.varying
    return names


def compute_on(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The function on another kind of processor: in JAX 0.10 `compute_on2`, as `compute_on` was a context there."""
    from jax.experimental import compute_on as module  # loaded where a model has loaded it

    wrap: Any = getattr(module, "compute_on2", None) or module.compute_on
    rebuilt: Callable[..., Any] = wrap(function, **options)
    return rebuilt


def compiler_options(platform: str) -> dict[str, str]:
    """With which a program for one platform is laid out as one for another would be.

    The CPU's compiler multiplies 16-bit numbers in float32, and would cast all layers of a stack before the loop over
    them; no accelerator does that.
    """
    return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"} if platform == "cpu" else {}
