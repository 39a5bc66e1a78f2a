"""FLOPs of a jaxpr, against counts by hand and, without loops, against the compiler's."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax import testing


def ones(*shape):
    return jnp.ones(shape)


X, W = ones(5, 8), ones(8, 3)


def six_products(x):
    """Six products of two 4 × 4 matrices in a loop."""
    return lax.scan(lambda x, _: (x @ ones(4, 4), None), x, length=6)[0]


def largest(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (1, 1), "VALID")


@jax.custom_jvp
def twice(x):
    return 2.0 * x


twice.defjvp(lambda primals, tangents: (twice(*primals), 2.0 * tangents[0]))


@jax.custom_vjp
def thrice(x):
    return 3.0 * x


thrice.defvjp(lambda x: (thrice(x), None), lambda _, g: (3.0 * g,))


BY_HAND = {
    "a product": (lambda: X @ W, 2 * 5 * 8 * 3),
    "a product over two axes": (lambda: jnp.tensordot(ones(5, 2, 4), ones(2, 4, 3), 2), 2 * 5 * 8 * 3),
    "a batch of products": (lambda: jnp.einsum("bij,bjk->bik", ones(7, 5, 8), ones(7, 8, 3)), 7 * 2 * 5 * 8 * 3),
    "an outer product": (lambda: jnp.outer(ones(5), ones(3)), 5 * 3),
    "a product of integers": (lambda: lax.dot(jnp.ones((5, 8), int), jnp.ones((8, 3), int)), 2 * 5 * 8 * 3),
    "a ragged product": (lambda: lax.ragged_dot(X, ones(2, 8, 3), jnp.array([2, 3])), 2 * 5 * 8 * 3),
    "a convolution": (
        lambda: lax.conv_general_dilated(
            ones(2, 9, 9, 4), ones(3, 3, 4, 6), (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        2 * (2 * 7 * 7 * 6) * 9 * 4,
    ),
    "a strided convolution in groups": (
        lambda: lax.conv_general_dilated(
            ones(2, 9, 9, 4),
            ones(3, 3, 2, 6),
            (2, 2),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        ),
        2 * (2 * 4 * 4 * 6) * 9 * 2,
    ),
    "a sum": (lambda: X.sum(0), 40),
    "the place of the largest": (lambda: X.argmax(1), 40),
    "a reduction of one's own": (lambda: lax.reduce(X, 1.0, lambda a, b: a * b + 1.0, (0,)), 2 * 40),
    "a window": (lambda: lax.reduce_window(X, 0.0, lax.add, (2, 2), (1, 1), "VALID"), 4 * 7 * 4),
    "the gradient of a window": (lambda: jax.vjp(largest, X)[1](ones(4, 7)), 4 * 7 * 4 + 4 * 7 * 5),
    "sums in places": (lambda: X.at[jnp.array([0, 0])].add(1.0), 2 * 8),
    "arithmetic": (lambda: jnp.tanh(X) * 2.0 + X, 3 * 40),
    "a power": (lambda: X**3, 40),
    "arithmetic of integers": (lambda: jnp.arange(5) * 2 + 1, 0),
    "moves": (lambda: jnp.concatenate([X.T.reshape(5, 8)[1:], X[jnp.array([0])]]).astype(jnp.bfloat16), 0),
    "a comparison and a choice": (lambda: jnp.where(X > 0, X, 0.0), 0),
    "a constant": (lambda: jnp.zeros((9, 9)), 0),
    "a scan": (lambda: six_products(ones(4, 4)), 6 * 128),
    "a scan in a scan": (lambda: lax.scan(lambda x, _: (six_products(x), None), ones(4, 4), length=3)[0], 3 * 6 * 128),
    "a loop of unknown length": (lambda: lax.while_loop(lambda x: x.sum() < 9, lambda x: x * 2, ones(4, 4)), 16 + 16),
    "the dearest branch": (
        lambda: lax.switch(0, [lambda x: x, lambda x: x @ x, jnp.sin], jnp.sin(ones(4, 4))),
        16 + 128,
    ),
    "a jitted function": (lambda: jax.jit(jnp.sin)(X), 40),
    "a rematerialized function": (lambda: jax.checkpoint(jnp.sin)(X), 40),
    "a derivative of one's own, forward": (lambda: twice(X), 40),
    "a derivative of one's own, backward": (lambda: thrice(X), 40),
    "a linear solve": (
        lambda: lax.custom_linear_solve(lambda v: 2.0 * v, X, lambda _, b: b / 2.0, symmetric=True),
        40,
    ),
}


@pytest.mark.parametrize(("function", "count"), BY_HAND.values(), ids=BY_HAND)
def test_flops_match_the_count_by_hand(function, count):
    assert testing.flops(function) == count


def test_a_shard_map_counts_all_devices():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(jnp.sin, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))
    assert testing.flops(sharded, ones(8)) == 8


def test_keys_count_nothing():
    assert testing.flops(jax.random.split, jax.random.key(0)) == 0


@pytest.mark.parametrize("function", [jnp.linalg.cholesky, jnp.fft.fft], ids=["cholesky", "fft"])
def test_flops_that_depend_on_values_are_an_error(function):
    with pytest.raises(NotImplementedError) as caught:
        testing.flops(function, jnp.eye(4))
    name = function.__name__
    assert str(caught.value) == (
        f"Expected primitives whose FLOPs follow from their shapes; got `{name}`.\n  Count the function without it."
    )


def perceptron(x, kernels):
    for kernel in kernels:
        x = jnp.tanh(x @ kernel)
    return x


def convolutions(x, kernels):
    for kernel in kernels:
        x = jnp.tanh(lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")))
    return x


def attention(x, w):
    return jax.nn.dot_product_attention(x @ w, x, x)


def with_gradient(function):
    return lambda x, w: jax.value_and_grad(lambda w: jnp.sum(function(x, w)))(w)


KERNELS = [ones(16, 24), ones(24, 5)]
LOOP_FREE = {
    "a perceptron": (perceptron, ones(7, 16), KERNELS),
    "a perceptron with its gradient": (with_gradient(perceptron), ones(7, 16), KERNELS),
    "convolutions": (convolutions, ones(2, 12, 12, 4), [ones(3, 3, 4, 6), ones(3, 3, 6, 5)]),
    "attention": (attention, ones(2, 32, 4, 16), ones(16, 16)),
    "attention with its gradient": (with_gradient(attention), ones(2, 32, 4, 16), ones(16, 16)),
}


@pytest.mark.parametrize(("function", "x", "w"), LOOP_FREE.values(), ids=LOOP_FREE)
def test_without_loops_flops_match_the_compiler(function, x, w):
    analysis = jax.jit(function).lower(x, w).cost_analysis()
    compiled = analysis["flops"] + analysis["transcendentals"]
    # The compiler also counts comparisons and selects, and one addition less for each sum.
    assert testing.flops(function, x, w) == pytest.approx(compiled, rel=0.02)


def test_the_compiler_counts_the_body_of_a_loop_once():
    assert testing.flops(six_products, ones(4, 4)) == 6 * 128
    assert testing.compiled_flops(six_products, ones(4, 4)) < 2 * 128


def test_shapes_made_includes_all_equations_and_no_arguments():
    def function(x, layers):
        return lax.scan(lambda x, w: (jax.checkpoint(jnp.sin)(x @ w), x[:2, :2]), x, layers)

    assert testing.shapes_made(function, ones(3, 4), ones(6, 4, 4)) == {(3, 4), (2, 2), (6, 2, 2)}


def test_measures_accept_shapes_and_keywords():
    x, w = jax.ShapeDtypeStruct((5, 8), jnp.float32), jax.ShapeDtypeStruct((8, 3), jnp.float32)

    def function(x, *, w):
        return x @ w

    assert testing.flops(function, x, w=w) == testing.compiled_flops(function, x, w=w) == 240
    assert testing.shapes_made(function, x, w=w) == {(5, 3)}
    assert testing.temporary_bytes(function, x, w=w) == 0
