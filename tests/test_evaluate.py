"""The NumPy evaluator of the tests matches JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluate import evaluate
from jax import lax


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def convolve(**options: Any) -> Callable[..., Any]:
    return lambda x, w: lax.conv_general_dilated(x, w, **({"window_strides": (1,), "padding": [(0, 1)]} | options))


def along(mapped: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.vmap(function, mapped)


IDS = np.array([[0, 3], [-1, 9]], np.int32)
X, W = normal(4, 4, 5), normal(6, 4, 2, seed=1)
XS, WS = normal(3, 4, 4, 5), normal(3, 6, 4, 2, seed=1)
CALLS: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "a convolution": (convolve(), [X, W]),
    "strided, both dilated, cropped": (
        convolve(window_strides=(2,), lhs_dilation=(3,), rhs_dilation=(2,), padding=[(2, -1)]),
        [X, W],
    ),
    "with other axes": (convolve(dimension_numbers=("HCN", "IHO", "CNH")), [normal(6, 3, 4), normal(3, 2, 5)]),
    "in groups": (convolve(feature_group_count=2), [X, W[:, :2]]),
    "in groups of the batch": (convolve(batch_group_count=2), [X, W]),
    "many kernels": (along((None, 0), convolve()), [X, WS]),
    "many kernels and many x": (along((0, 0), convolve(rhs_dilation=(2,))), [XS, WS]),
    "no window": (lambda x, w: lax.conv_general_dilated(x, w, (), ()), [X[0, :, :4], normal(3, 4)]),
    "the gradients of a convolution": (
        jax.grad(lambda x, w: jnp.sum(jnp.sin(convolve(window_strides=(2,), rhs_dilation=(2,))(x, w))), (0, 1)),
        [X, W],
    ),
    "a product": (lambda x, w: lax.dot_general(x, w, (((2,), (1,)), ((0,), (2,)))), [X, normal(3, 5, 4)]),
    "rows": (lambda x, ids: x[ids % 4], [X, IDS]),
    "rows, clipped": (lambda x, ids: jnp.take(x, ids, 1, mode="clip"), [X, IDS]),
    "rows, filled": (lambda x, ids: jnp.take(x, ids, 1, mode="fill", fill_value=7), [X, IDS]),
    "rows, wrapped": (lambda x, ids: jnp.take(x, ids, 1, mode="wrap"), [X, IDS]),
    "a row per example": (along((0, 0), lambda x, i: x[i]), [X, np.array([0, 1, 2, 3])]),
    "windows": (along((None, 0), lambda x, i: lax.dynamic_slice(x, (i, 0, i), (2, 4, 2))), [X, np.array([0, -9, 9])]),
    "the gradient of a lookup": (
        jax.grad(lambda x, ids: jnp.sum(jnp.sin(jnp.take(x, ids, 1, mode="clip")))),
        [X, IDS],
    ),
    "the gradient of a lookup per example": (
        jax.grad(lambda x, i: jnp.sum(jnp.sin(jax.vmap(lambda x, i: x[i])(x, i)))),
        [X, np.array([0, 1, 2, 3])],
    ),
    "a slice, set": (lambda x, y: lax.dynamic_update_slice(x, y, (3, 1, -2)), [X, normal(2, 1, 2)]),
    "padding": (lambda x: lax.pad(x, 1.0, [(1, -1, 0), (-1, 2, 2), (0, -2, 1)]), [X]),
    "a transposing reshape": (lambda x: lax.reshape(x, (2, 40), (2, 0, 1)), [X]),
    "strides": (lambda x: lax.slice(x, (0, 1, 1), (4, 2, 5), (2, 1, 3)), [X]),
    "a choice of many": (lambda x: lax.select_n(jnp.int32(x > 0) + jnp.int32(x > 1), x, 2 * x, 3 * x), [X]),
    "a choice of two": (lambda x: jnp.where(x > 0, x, 2 * x), [X]),
    "integers": (lambda ids: (ids // 2, lax.div(ids, jnp.int32(4)), lax.rem(ids, jnp.int32(4)), ids & 1), [IDS]),
    "a scan": (lambda x: lax.scan(lambda c, y: (c + jnp.sin(y), c), x[0], x, reverse=True), [X]),
    "a scan of nothing": (lambda x: lax.scan(lambda c, y: (c, y), x[0], x[:0]), [X]),
    "a loop": (lambda n, x: lax.fori_loop(0, n, lambda i, x: jnp.sin(x) * i, x), [np.int32(3), X]),
    "a loop with an end per example": (
        along((0, 0), lambda n, x: lax.fori_loop(0, n, lambda i, x: jnp.sin(x) + i, x)),
        [np.int32([3, 0, 1, 2]), X],
    ),
    "branches": (lambda i, x: lax.switch(i, [jnp.sin, jnp.cos, jnp.tanh], x), [np.int32(7), X]),
    "calls": (lambda x: jax.checkpoint(jax.jit(jax.nn.silu))(x) + jax.nn.softplus(jax.nn.relu(x)), [X]),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_evaluator_matches_jax(name: str) -> None:
    function, args = CALLS[name]
    with jax.enable_x64(True):
        got = evaluate(jax.make_jaxpr(function)(*args), args)
        expected = jax.tree.leaves(jax.jit(function)(*args))
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-13)
