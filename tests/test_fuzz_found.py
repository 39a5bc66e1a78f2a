"""What the fuzzer has found, each as the smallest model that shows it; what is not mended yet is expected to fail."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from law import Case, assert_case, assert_close

import lora_jax as lj


def limit(reason: str, *, condition: bool = True) -> pytest.MarkDecorator:
    return pytest.mark.xfail(condition, strict=True, raises=lj.UnsupportedError, reason=reason)


def test_a_look_up_under_vmap_in_a_stack_of_one_layer_is_a_look_up() -> None:
    # Refused: to take one place of an axis of size 1 is to take it whole, and then nothing was picked.
    def experts(w: jax.Array, x: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.einsum("ti,tio->to", x, jax.vmap(lambda i: w[i])(ids))

    assert_case(Case(experts, (1, 4, 5), [(3, 4), [0, 0, 0]], "bio"))


def test_a_slice_under_vmap_that_takes_the_whole_kernel_keeps_its_factors() -> None:
    # Refused likewise.
    def slices(w: jax.Array, x: jax.Array, starts: jax.Array) -> jax.Array:
        return jnp.einsum("ti,tio->to", x, jax.vmap(lambda i: lax.dynamic_slice_in_dim(w, i, 4, 0))(starts))

    assert_case(Case(slices, (4, 5), [(3, 4), [0, 1, -1]], "io"))


def test_a_loop_under_vmap_ends_for_each_example_at_its_own_turn() -> None:
    # A TypeError of `lax.while_loop`: the condition of such a loop is one for each example.
    def settle(w: jax.Array, x: jax.Array, turns: jax.Array) -> jax.Array:
        return jax.vmap(lambda x, n: lax.fori_loop(0, n, lambda i, x: jnp.sin(x @ w) + i, x))(x, turns)

    case = Case(settle, (4, 4), [(3, 4), [2, 0, 3]], "io")
    params, adapter, args = case.params, case.adapter, case.arrays

    def forward(adapter: dict[str, lj.Adapter], *, formed: bool) -> jax.Array:
        if formed:
            return case.apply(lj.merge(params, adapter), *args)
        return lj.lora(case.apply)(params, adapter, *args)

    # There is no gradient through such a loop, but a derivative along a direction.
    got, expected = (
        jax.jit(lambda its, formed=formed: jax.jvp(lambda its: forward(its, formed=formed), (its,), (its,)))(adapter)
        for formed in (False, True)
    )
    assert_close(got, expected)


def test_a_row_that_a_scan_takes_of_a_kernel_is_a_look_up() -> None:
    # Refused at `tanh`: the slice of a scan stayed a kernel, without inputs.
    def rows(w: jax.Array, x: jax.Array) -> jax.Array:
        _, out = lax.scan(lambda carry, row: (carry, jnp.tanh(row)), 0.0, w)
        return x @ out

    case = Case(rows, (4, 5), [(3, 4)], None, "io")
    assert_case(case)
    (use,) = lj.explain(case.apply, case.params, case.adapter, *case.arrays).rows
    assert use.used == "factored scan ×4"
    assert use.flops == 4 * 5 * (2 * 2 + 1)  # the row of rank 2, and its sum with the base's


@limit(
    "before JAX 0.12 the gradient of a `cond` has each branch return the kernel, and branches return arrays only",
    condition=jax.__version_info__ < (0, 12),
)
def test_a_branch_in_a_gradient_that_the_model_takes_keeps_the_kernel() -> None:
    def energy(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(lax.cond(x[0, 0] > 0, lambda: jnp.tanh(x @ w), lambda: jnp.sin(x @ w)))

    assert_case(Case(lambda w, x: jax.grad(energy, 1)(w, x), (4, 5), [(3, 4)], "io"))


@limit(
    "the vmap of a `cond` by the example selects among its operands, the kernel too, which `select_n` has no rule for"
)
def test_a_branch_that_each_example_chooses_keeps_the_kernel() -> None:
    def choose(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: lax.cond(x[0] > 0, lambda: jnp.tanh(x @ w), lambda: jnp.sin(x @ w)))(x)

    assert_case(Case(choose, (4, 5), [(3, 4)], "io"))


@limit("the vmap of a convolution over kernels merges their axis with the outputs, a batch with an output")
def test_a_convolution_with_the_kernel_of_each_example_has_a_low_rank_form() -> None:
    def convolve(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda w, x: lax.conv(x, w, (1,), "SAME"))(w, x)

    assert_case(Case(convolve, (2, 4, 3, 3), [(2, 2, 3, 5)], "boii"))
