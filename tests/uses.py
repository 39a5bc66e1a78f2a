"""A small case of each way in which models use a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from law import Case


def conv(**options: Any) -> Callable[..., jax.Array]:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lambda w, x: lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=numbers, **options)


def layers(w: jax.Array, x: jax.Array) -> jax.Array:
    return lax.scan(jax.checkpoint(lambda x, layer: (jnp.tanh(x @ layer), None)), x, w)[0]


USES = {
    "Dense": Case(lambda w, x: x @ w, (4, 5), [(3, 4)], "io"),
    "a bias": Case(lambda w, x, b: jnp.tanh(x @ w + b), (4, 5), [(3, 4), (5,)], "io"),
    "the query of attention": Case(lambda w, x: jnp.einsum("td,dhk->htk", x, w), (4, 2, 3), [(5, 4)], "ioo"),
    "the output of attention": Case(lambda w, x: jnp.einsum("htk,hkd->td", x, w), (2, 3, 4), [(2, 5, 3)], "iio"),
    "a convolution": Case(conv(), (3, 2, 4, 6), [(2, 5, 6, 4)], "iiio"),
    "a convolution in groups": Case(conv(feature_group_count=2), (3, 2, 2, 6), [(2, 5, 6, 4)], "iiio"),
    "an embedding": Case(lambda w, ids: w[ids], (6, 5), [[0, 5, 2, 2]], "io"),
    "an embedding, filled": Case(
        lambda w, ids: jnp.take(w, ids, axis=0, mode="fill", fill_value=3.0), (6, 5), [[0, 5, 9]], "io"
    ),
    "a tied head": Case(lambda w, x, ids: (w[ids] + x) @ w.T, (6, 5), [(3, 5), [0, 5, 2]], "io"),
    "a stack of layers": Case(layers, (3, 4, 4), [(5, 4)], "bio"),
    "experts": Case(lambda w, x: jnp.einsum("etd,edf->etf", x, w), (2, 4, 5), [(2, 3, 4)], "bio"),
    "experts by group": Case(
        lambda w, x: lax.ragged_dot(x, w, jnp.array([2, 0, 3], jnp.int32)), (3, 4, 5), [(5, 4)], "bio"
    ),
    "one expert per token": Case(
        lambda w, x, ids: jnp.einsum("td,tdf->tf", x, w[ids]), (3, 4, 5), [(2, 4), [2, 0]], "bio"
    ),
    "a fused kernel, split": Case(lambda w, x: jnp.split(x @ w, 2, 1)[1] * (x @ w[:, :3]), (4, 6), [(3, 4)], "io"),
    "concatenated with another": Case(
        lambda w, x, other: x @ jnp.concatenate([w, other], 1), (4, 6), [(3, 4), (4, 2)], "io"
    ),
    "transposed, scaled, reversed": Case(lambda w, x: (3 * w[:, ::-1].T) @ x, (4, 6), [(4, 3)], "io"),
}
