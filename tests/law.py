"""One law on one call: with adapted kernels a function returns what it does with formed ones; so do its gradients."""

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
      args: for each argument the shape of an array to be drawn, or integers.
      roles: what `kernels` finds out about `w`.
      axes: what the adapter is made for, where that is something else.
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
    """An adapter that does something, for kernels by path and the roles of their axes; nothing is compiled for it."""
    spec = {path: lj.LoRA(rank=rank, alpha=3, axes=roles) for path, roles in axes.items()}
    shapes = jax.eval_shape(lambda key: lj.init(key, params, spec, param_dtype=dtype), jax.random.key(0))
    leaves, treedef = jax.tree.flatten(shapes)
    drawn = [normal(*leaf.shape, seed=100 + number, size=0.3, dtype=dtype) for number, leaf in enumerate(leaves)]
    return treedef.unflatten(drawn)


def total(out: Any) -> jax.Array:
    """A number to differentiate: every array of a result has a part in it."""
    wide = [leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in jax.tree.leaves(out)]
    return sum((jnp.sum(jnp.sin(leaf + number)) for number, leaf in enumerate(wide)), jnp.float32(0))


def assert_law(
    apply: Callable[..., Any],
    params: Any,
    adapter: Any,
    *args: Any,
    formed: Sequence[str] = (),
    dtype: str | None = None,
    compiled: bool = False,
) -> None:
    """Compares result and adapter gradients with the oracle's; arguments and results are arrays.

    The form is the factored one, which is what a rule is about; `test_plan.py` compares the forms.

    Args:
      apply: the model.
      params: its parameters.
      adapter: for them.
      *args: the other arguments.
      formed: what `lora` is told that it may form.
      dtype: that of the computation, if it is another than the result's.
      compiled: whether XLA has to run it, as a setting of JAX wants.
    """

    def gradients(function: Callable[..., Any], adapter: Any, params: Any, args: Any) -> Any:
        def run(adapter: Any) -> Any:
            out = function(params, adapter, *args)
            return total(out), out

        return jax.grad(run, has_aux=True)(adapter)

    def both(*call: Any) -> Any:
        return gradients(lj.lora(apply, materialize=formed, form="factored"), *call), gradients(dense(apply), *call)

    run = jax.jit(both) if compiled else without_compiling(both)
    (gradient, out), (expected_gradient, expected) = run(adapter, params, args)
    assert_close(out, expected, FORWARD, dtype=dtype)
    assert_close(gradient, expected_gradient, GRADIENT, dtype=dtype)


def assert_case(case: Case, **options: Any) -> None:
    """The law for a case."""
    assert_law(case.apply, case.params, case.adapter, *case.arrays, **options)
