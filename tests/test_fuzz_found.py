"""Failures that the fuzzer found, each as its smallest model. Those that are not fixed are expected to fail."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from law import Case, assert_case, assert_close

import lora_jax as lj


def expect_failure(reason: str, *, condition: bool = True) -> pytest.MarkDecorator:
    return pytest.mark.xfail(condition, strict=True, raises=lj.UnsupportedError, reason=reason)


def test_a_lookup_under_vmap_in_a_stack_of_one_layer_is_a_lookup() -> None:
    # Was refused: indexing an axis of size 1 was taken for a full slice, so that nothing was looked up.
    def experts(w: jax.Array, x: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.einsum("ti,tio->to", x, jax.vmap(lambda i: w[i])(ids))

    assert_case(Case(experts, (1, 4, 5), [(3, 4), [0, 0, 0]], "bio"))


def test_a_slice_of_the_full_kernel_under_vmap_keeps_the_factors() -> None:
    # Was refused for the same reason.
    def slices(w: jax.Array, x: jax.Array, starts: jax.Array) -> jax.Array:
        return jnp.einsum("ti,tio->to", x, jax.vmap(lambda i: lax.dynamic_slice_in_dim(w, i, 4, 0))(starts))

    assert_case(Case(slices, (4, 5), [(3, 4), [0, 1, -1]], "io"))


def test_a_loop_under_vmap_ends_separately_for_each_example() -> None:
    # Was a TypeError of `lax.while_loop`: the condition of such a loop has one value for each example.
    def settle(w: jax.Array, x: jax.Array, limits: jax.Array) -> jax.Array:
        return jax.vmap(lambda x, n: lax.fori_loop(0, n, lambda i, x: jnp.sin(x @ w) + i, x))(x, limits)

    case = Case(settle, (4, 4), [(3, 4), [2, 0, 3]], "io")
    params, adapter, args = case.params, case.adapter, case.arrays

    def forward(adapter: dict[str, lj.Adapter], *, merged: bool) -> jax.Array:
        if merged:
            return case.apply(lj.merge(params, adapter), *args)
        return lj.lora(case.apply)(params, adapter, *args)

    # Such a loop has no gradient, but it has directional derivatives.
    got, expected = (
        jax.jit(
            lambda adapter, merged=merged: jax.jvp(
                lambda adapter: forward(adapter, merged=merged), (adapter,), (adapter,)
            )
        )(adapter)
        for merged in (False, True)
    )
    assert_close(got, expected)


def test_a_row_that_a_scan_slices_from_a_kernel_is_a_lookup() -> None:
    # Was refused at `tanh`: the slice of a scan stayed a kernel without input axes.
    def rows(w: jax.Array, x: jax.Array) -> jax.Array:
        _, out = lax.scan(lambda carry, row: (carry, jnp.tanh(row)), 0.0, w)
        return x @ out

    case = Case(rows, (4, 5), [(3, 4)], None, "io")
    assert_case(case)
    (use,) = lj.explain(case.apply, case.params, case.adapter, *case.arrays).rows
    assert use.used == "factored scan ×4"
    assert use.flops == 4 * 5 * (2 * 2 + 1)  # the row of rank 2, and the sum with the base's row


@expect_failure(
    "before JAX 0.12 the gradient of a `cond` has each branch return the kernel, and branches return arrays only",
    condition=jax.__version_info__ < (0, 12),
)
def test_a_branch_inside_a_gradient_of_the_model_keeps_the_kernel() -> None:
    def energy(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(lax.cond(x[0, 0] > 0, lambda: jnp.tanh(x @ w), lambda: jnp.sin(x @ w)))

    assert_case(Case(lambda w, x: jax.grad(energy, 1)(w, x), (4, 5), [(3, 4)], "io"))


@expect_failure(
    "the vmap of a `cond` by the example selects among its operands, the kernel too, which `select_n` has no rule for"
)
def test_a_branch_chosen_per_example_keeps_the_kernel() -> None:
    def choose(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: lax.cond(x[0] > 0, lambda: jnp.tanh(x @ w), lambda: jnp.sin(x @ w)))(x)

    assert_case(Case(choose, (4, 5), [(3, 4)], "io"))


@expect_failure("the vmap of a convolution over kernels merges their axis with the outputs, a batch with an output")
def test_a_convolution_with_a_kernel_per_example_has_a_low_rank_form() -> None:
    def convolve(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda w, x: lax.conv(x, w, (1,), "SAME"))(w, x)

    assert_case(Case(convolve, (2, 4, 3, 3), [(2, 2, 3, 5)], "boii"))
