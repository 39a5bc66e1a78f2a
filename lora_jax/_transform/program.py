"""A call of `apply`, traced: its jaxpr over the arrays of its arguments, everything else left as Python values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.tree_util import PyTreeDef

from .._compat import ClosedJaxpr
from .._core.attach import as_jax
from .._core.base import StoredLeaf, base_of
from .._core.kernel import PlainKernel
from .._core.paths import flatten, unflatten
from .._core.uses import Use
from .boundary import check_statics, python_without_values
from .contraction.forms import traced_again
from .interpreter import Value, interpret, materialized
from .refusal import Refusal, Refused, error
from .settings import Settings


@dataclasses.dataclass(frozen=True)
class Program:
    """One call of `apply(params, *args, **kwargs)`.

    Attributes:
      jaxpr: from the arrays among the leaves of `params` and then of the other arguments, to the arrays of the result.
      params: the leaves of `params` by path; those that are no arrays are not inputs of the jaxpr.
      arrays: the arrays among the other arguments.
      rebuild: puts the arrays of the result back among what else `apply` returned.
    """

    jaxpr: ClosedJaxpr
    params: dict[str, Any]
    arrays: list[Any]
    rebuild: Callable[[Sequence[Any]], Any]

    @property
    def arrays_of_params(self) -> dict[str, Any]:
        """The leaves of `params` that are arrays, by path."""
        return {path: leaf for path, leaf in self.params.items() if is_array(leaf)}

    def run(self, kernels: Mapping[str, Value], settings: Settings) -> Any:
        """Evaluates the call with adapted kernels in place of some parameters, and returns what `apply` would.

        Raises:
          UnsupportedError: with all kernels that reach an operation without a low-rank form and are not listed.
        """
        leaves = [kernels.get(path, _plain(path, leaf)) for path, leaf in self.arrays_of_params.items()]
        try:
            results = interpret(settings, self.jaxpr.jaxpr, self.jaxpr.consts, [*map(as_jax, (*leaves, *self.arrays))])
            returns = "return", "the function returns the kernel itself", "the result of `apply`"
            return self.rebuild([materialized(settings, result, *returns) for result in results])
        except Refused:
            refusals: list[Refusal] = []
            watch(self, kernels, dataclasses.replace(settings, refusals=refusals))
            raise error(refusals) from None


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced; Python numbers, strings and callables stay what they are, and arrays of text."""
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind not in "OSUMm"
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, StoredLeaf))


def _plain(path: str, leaf: Any) -> Any:
    """A leaf without factors: itself, or what stands for an array."""
    return PlainKernel.from_leaf(path, base_of(leaf)) if isinstance(leaf, StoredLeaf) else leaf


def _as_traced(leaf: Any) -> Any:
    """What the model is traced with in place of a leaf."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, StoredLeaf) else leaf


def trace(apply: Callable[..., Any], params: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program:
    """Traces a call, once, without evaluating anything. Arrays may be shapes and dtypes only.

    Raises:
      TracingError: if Python code needs the value of an array, or if a result that is not an array holds one.
    """
    leaves, params_def = flatten(params)
    others, others_def = jax.tree_util.tree_flatten((tuple(args), dict(kwargs)))
    returned: list[tuple[list[Any], PyTreeDef]] = []

    def on_arrays(params_arrays: list[Any], other_arrays: list[Any]) -> list[Any]:
        arrays = iter(params_arrays)
        traced = {path: next(arrays) if is_array(leaf) else leaf for path, leaf in leaves.items()}
        arrays = iter(other_arrays)
        given = [next(arrays) if is_array(leaf) else leaf for leaf in others]
        args, kwargs = jax.tree_util.tree_unflatten(others_def, given)
        out, out_def = jax.tree_util.tree_flatten(apply(unflatten(params_def, traced), *args, **kwargs))
        returned.append(([None if isinstance(leaf, jax.Array) else leaf for leaf in out], out_def))
        return [leaf for leaf in out if isinstance(leaf, jax.Array)]

    params_arrays = [_as_traced(leaf) for leaf in leaves.values() if is_array(leaf)]
    other_arrays = [leaf for leaf in others if is_array(leaf)]
    with traced_again(True), python_without_values(apply):
        jaxpr = jax.make_jaxpr(on_arrays)(params_arrays, other_arrays)
    statics, out_def = returned[-1]
    check_statics(apply, statics, out_def)

    def rebuild(arrays: Sequence[Any]) -> Any:
        remaining = iter(arrays)
        return jax.tree_util.tree_unflatten(out_def, [next(remaining) if leaf is None else leaf for leaf in statics])

    return Program(jaxpr, leaves, other_arrays, rebuild)


def watch(program: Program, kernels: Mapping[str, Value], settings: Settings) -> list[Use]:
    """How a call would use the kernels given for some of its parameters, from shapes alone."""
    log: list[Use] = []

    def run(params: dict[str, Any], arrays: list[Any], kernels: Mapping[str, Value]) -> None:
        abstract = dataclasses.replace(program, params=program.params | params, arrays=arrays)
        abstract.run(kernels, dataclasses.replace(settings, log=log))

    jax.eval_shape(run, program.arrays_of_params, program.arrays, kernels)
    return log
