"""Traces a call of `apply`: arrays become inputs of a jaxpr, other arguments stay Python values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import PyTreeDef

from .._compat import ClosedJaxpr
from .._core.attach import as_jax
from .._core.base import Recorded, base_of, dense
from .._core.kernel import PlainKernel
from .._core.memory import is_in_host_memory, to_device
from .._core.paths import flatten, unflatten
from .._core.placement import explicit_sharding
from .._core.stored import StoredLeaf
from .._core.uses import Use
from .boundary import check_function, check_statics, python_without_values
from .contraction.forms import traced_by_lora
from .interpreter import Value, interpret, materialize_or_refuse
from .refusal import Refusal, Refused, refusal_error
from .settings import Settings


@dataclasses.dataclass(frozen=True)
class Program:
    """One call of `apply(params, *args, **kwargs)`.

    Attributes:
      jaxpr: the traced function, from the arrays of `params` and of the other arguments to the arrays of the result.
      params: the leaves of `params` by path; leaves that are not arrays are not inputs of the jaxpr.
      arrays: the arrays of the other arguments.
      rebuild: puts the arrays of the result back among the other values that `apply` returned.
    """

    jaxpr: ClosedJaxpr
    params: dict[str, Any]
    arrays: list[Any]
    rebuild: Callable[[Sequence[Any]], Any]

    @property
    def param_arrays(self) -> dict[str, Any]:
        """The leaves of `params` that are arrays, by path."""
        return {path: leaf for path, leaf in self.params.items() if is_array(leaf)}

    def run(self, kernels: Mapping[str, Value], settings: Settings) -> Any:
        """Evaluates the call with adapted kernels in place of some parameters.

        Raises:
          UnsupportedError: if kernels reach an operation without a low-rank rule and may not be materialized there.
        """
        leaves = [kernels.get(path, _without_factors(path, leaf)) for path, leaf in self.param_arrays.items()]
        try:
            results = interpret(settings, self.jaxpr.jaxpr, self.jaxpr.consts, [*map(as_jax, (*leaves, *self.arrays))])
            returned = "return", "the function returns the kernel itself", "the result of `apply`"
            arrays = [materialize_or_refuse(settings, result, *returned) for result in results]
            return self.rebuild(list(map(jnp.asarray, arrays)))  # outside `jit`, a constant is a literal of JAX
        except Refused:
            refusals: list[Refusal] = []
            collect_uses(self, kernels, dataclasses.replace(settings, refusals=refusals))
            raise refusal_error(refusals) from None


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced; Python scalars, strings, callables and NumPy arrays of text or objects are not."""
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind not in "OSUMm"
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, StoredLeaf))


def _without_factors(path: str, leaf: Any) -> Any:
    """Returns a leaf that has no adapter as a value of the interpreter."""
    base = base_of(leaf)
    return PlainKernel.from_leaf(path, base) if isinstance(base, Recorded) else leaf


def _traceable(leaf: Any) -> Any:
    """Returns the argument of `make_jaxpr` for a leaf."""
    if is_in_host_memory(leaf):
        return jax.eval_shape(to_device, leaf)
    if not isinstance(leaf, StoredLeaf):
        return leaf
    if any(explicit_sharding(jax.typeof(array)) is not None for array in jax.tree.leaves(leaf)):
        return jax.eval_shape(dense, leaf)  # the type has a sharding
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def trace(apply: Callable[..., Any], params: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program:
    """Traces a call once, without evaluating it. Arrays may be `ShapeDtypeStruct`s.

    Raises:
      TracingError: if `apply` is not a function; if Python code needs the value of an array; or if a result that is
        not an array contains one.
    """
    check_function(apply)
    leaves, params_def = flatten(params)
    others, others_def = jax.tree_util.tree_flatten((tuple(args), dict(kwargs)))
    returned: list[tuple[list[Any], PyTreeDef]] = []

    def on_arrays(params_arrays: list[Any], other_arrays: list[Any]) -> list[Any]:
        arrays = iter(params_arrays)
        traced = {path: next(arrays) if is_array(leaf) else leaf for path, leaf in leaves.items()}
        arrays = iter(other_arrays)
        others_traced = [next(arrays) if is_array(leaf) else leaf for leaf in others]
        args, kwargs = jax.tree_util.tree_unflatten(others_def, others_traced)
        out, out_def = jax.tree_util.tree_flatten(apply(unflatten(params_def, traced), *args, **kwargs))
        returned.append(([None if isinstance(leaf, jax.Array) else leaf for leaf in out], out_def))
        return [leaf for leaf in out if isinstance(leaf, jax.Array)]

    params_arrays = [_traceable(leaf) for leaf in leaves.values() if is_array(leaf)]
    other_arrays = [leaf for leaf in others if is_array(leaf)]
    with traced_by_lora(True), python_without_values(apply):
        jaxpr = jax.make_jaxpr(on_arrays)(params_arrays, other_arrays)
    statics, out_def = returned[-1]
    check_statics(apply, statics, out_def)

    def rebuild(arrays: Sequence[Any]) -> Any:
        remaining = iter(arrays)
        return jax.tree_util.tree_unflatten(out_def, [next(remaining) if leaf is None else leaf for leaf in statics])

    return Program(jaxpr, leaves, other_arrays, rebuild)


def collect_uses(program: Program, kernels: Mapping[str, Value], settings: Settings) -> list[Use]:
    """Returns how a call uses the kernels given for some of its parameters, from shapes only."""
    log: list[Use] = []

    def run(params: dict[str, Any], arrays: list[Any], kernels: Mapping[str, Value]) -> None:
        abstract = dataclasses.replace(program, params=program.params | params, arrays=arrays)
        abstract.run(kernels, dataclasses.replace(settings, log=log))

    jax.eval_shape(run, program.param_arrays, program.arrays, kernels)
    return log
