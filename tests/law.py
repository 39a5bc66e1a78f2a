"""The law: with adapted kernels, a function has the results and gradients that it has with merged kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from evaluate import without_compiling
from helpers import FORWARD, GRADIENT, assert_close, dense

import lora_jax as lj


class Case(NamedTuple):
    """A function of one kernel, and a call of it.

    Attributes:
      call: `call(w, *args)`.
      kernel: the shape of `w`.
      args: the shape of a random array, or integers, for each argument.
      roles: the axes of `w` that `kernels` finds.
      axes: the axes of the adapter, if they differ from `roles`.
    """

    call: Callable[..., Any]
    kernel: tuple[int, ...]
    args: Sequence[tuple[int, ...] | list[Any] | int]
    roles: str | None
    axes: str | None = None

    def apply(self, params: Any, *args: Any) -> Any:
        return self.call(params["w"], *args)

    @property
    def params(self) -> dict[str, jax.Array]:
        return {"w": normal(*self.kernel, size=0.5)}

    @property
    def arrays(self) -> list[jax.Array]:
        return [
            normal(*arg, seed=number) if isinstance(arg, tuple) else jnp.asarray(arg, jnp.int32)
            for number, arg in enumerate(self.args, start=1)
        ]

    @property
    def adapter(self) -> Any:
        return adapted(self.params, {"w": self.axes or self.roles})


def normal(*shape: int, seed: int = 0, size: float = 1.0, dtype: Any = jnp.float32) -> jax.Array:
    drawn = size * np.random.default_rng(seed).standard_normal(shape)
    return jax.device_put(np.asarray(drawn, jnp.dtype(dtype)))  # `jnp.asarray` would compile a program for each shape


def adapted(params: Any, axes: Mapping[str, str | None], *, rank: int = 2, dtype: Any = jnp.float32) -> Any:
    """An adapter with nonzero factors for the kernels and axes in `axes`. Compiles nothing."""
    spec = {path: lj.LoRA(rank=rank, alpha=3, axes=roles) for path, roles in axes.items()}
    shapes = jax.eval_shape(lambda key: lj.init(key, params, spec, param_dtype=dtype), jax.random.key(0))
    leaves, treedef = jax.tree.flatten(shapes)
    drawn = [normal(*leaf.shape, seed=100 + number, size=0.3, dtype=dtype) for number, leaf in enumerate(leaves)]
    return treedef.unflatten(drawn)


def total(out: Any) -> jax.Array:
    """A scalar to differentiate that depends on every array of a result."""
    wide = [leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in jax.tree.leaves(out)]
    return sum((jnp.sum(jnp.sin(leaf + number)) for number, leaf in enumerate(wide)), jnp.float32(0))


def assert_law(
    apply: Callable[..., Any],
    params: Any,
    adapter: Any,
    *args: Any,
    materialize: Sequence[str] = (),
    dtype: str | None = None,
    compiled: bool = False,
) -> None:
    """Compares the result and the adapter's gradient with the oracle's.

    The form is factored, because rules define it; `test_plan.py` compares the forms.

    Args:
      apply: the model.
      params: its parameters.
      adapter: an adapter of the parameters.
      *args: the other arguments, arrays.
      materialize: the argument of `lora`.
      dtype: the dtype of the computation, if it differs from the result's.
      compiled: whether to compile the comparison with XLA instead of evaluating it in NumPy.
    """

    def gradients(function: Callable[..., Any], adapter: Any, params: Any, args: Any) -> Any:
        def run(adapter: Any) -> Any:
            out = function(params, adapter, *args)
            return total(out), out

        return jax.grad(run, has_aux=True)(adapter)

    def compute(*call: Any) -> Any:
        return gradients(lj.lora(apply, materialize=materialize, form="factored"), *call), gradients(
            dense(apply), *call
        )

    run = jax.jit(compute) if compiled else without_compiling(compute)
    (gradient, out), (expected_gradient, expected) = run(adapter, params, args)
    assert_close(out, expected, FORWARD, dtype=dtype)
    assert_close(gradient, expected_gradient, GRADIENT, dtype=dtype)


def assert_case(case: Case, **options: Any) -> None:
    """Checks the law for a case."""
    assert_law(case.apply, case.params, case.adapter, *case.arrays, **options)
