"""Dropout on the low-rank path: only with a key, a different mask in every use, and the same expectation."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GRADIENT, dense
from jax import lax
from law import assert_close, normal

import lora_jax as lj

KEY = jax.random.key(7)
HALF = lj.LoRA(rank=2, alpha=3, dropout=0.5)


def case(call: Callable[..., Any], *shapes: tuple[int, ...], axes: str = "io") -> tuple[Any, Any, Any]:
    """A function of kernels `w0`, `w1`, …, their values, and an adapter with nonzero factors."""
    params = {f"w{number}": normal(*shape, seed=number, size=0.5) for number, shape in enumerate(shapes)}
    spec = {"*": lj.LoRA(rank=2, alpha=3, dropout=0.5, axes=axes)}
    adapter = jax.tree.map(lambda leaf: leaf + 0.3, lj.init(jax.random.key(0), params, spec))
    return lambda params, *args: call(*params.values(), *args), params, adapter


def low_rank_part(call: Callable[..., Any], *shapes: tuple[int, ...], axes: str = "io") -> Callable[..., Any]:
    """The low-rank part of a call, from a base of zeros."""
    apply, params, adapter = case(call, *shapes, axes=axes)
    params = jax.tree.map(jnp.zeros_like, params)
    return lambda key, *args: lj.lora(apply)(params, adapter, *args, dropout_key=key)


X = normal(3, 4, seed=9)


def test_without_a_key_nothing_is_dropped() -> None:
    apply, params, adapter = case(lambda w, x: x @ w, (4, 5))
    assert_close(lj.lora(apply)(params, adapter, X), dense(apply)(params, adapter, X))


def test_a_key_changes_nothing_where_the_rate_is_zero() -> None:
    apply, params, adapter = case(lambda w, x: x @ w, (4, 5))
    adapter = {path: lj.Adapter(lj.LoRA(rank=2, alpha=3), "io", **part.arrays) for path, part in adapter.items()}
    np.testing.assert_array_equal(
        lj.lora(apply)(params, adapter, X, dropout_key=KEY), lj.lora(apply)(params, adapter, X)
    )


def test_the_base_gets_all_inputs_and_the_factors_the_kept_ones() -> None:
    apply, params, adapter = case(lambda w, x: x @ w, (4, 5))
    part = adapter["w0"]
    # With x of ones, each row is the base's plus twice the sum of the rows of A·B that are kept.
    x = jnp.ones((200, 4))
    got = lj.lora(apply)(params, adapter, x, dropout_key=KEY) - x @ params["w0"]
    rows = 2 * part.variant.scale * (part.a @ part.b)
    masks = jnp.stack(jnp.meshgrid(*[jnp.array([0.0, 1.0])] * 4, indexing="ij"), -1).reshape(16, 4)
    distance = jnp.abs(got[:, None] - (masks @ rows)[None]).max(-1)
    assert float(distance.min(1).max()) < 1e-4
    kept = masks[distance.argmin(1)]
    assert 0.4 < float(kept.mean()) < 0.6
    assert len(np.unique(np.asarray(kept), axis=0)) == 16


CALLS: dict[str, tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...], str]] = {
    "a product": (lambda w, x: x @ w, (4, 5), (3, 4), "io"),
    "the kernel on the left": (lambda w, x: w @ x.T, (5, 4), (3, 4), "oi"),
    "a tied head": (lambda w, x: x @ w.T, (5, 4), (3, 4), "io"),
    "a convolution": (lambda w, x: lax.conv(x, w, (1,), "SAME"), (5, 4, 3), (2, 4, 6), "oii"),
    "by group": (lambda w, x: lax.ragged_dot(x, w, jnp.array([1, 2])), (2, 4, 5), (3, 4), "bio"),
    "in a jit in a remat": (lambda w, x: jax.checkpoint(jax.jit(lambda x: x @ w))(x), (4, 5), (3, 4), "io"),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_expectation_is_the_result_without_dropout(name: str) -> None:
    call, kernel, x, axes = CALLS[name]
    run, x = low_rank_part(call, kernel, axes=axes), normal(*x, seed=9)
    samples = jax.jit(lambda keys, x: lax.map(lambda key: run(key, x), keys))(jax.random.split(KEY, 4000), x)
    error = jnp.abs(samples.mean(0) - run(None, x)) / (samples.std(0) / jnp.sqrt(4000) + 1e-6)
    assert float(error.max()) < 5  # standard errors
    assert float(samples.std(0).min()) > 0


USES: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...], str]] = {
    "paths": (lambda v, w, x: (x @ v, x @ w), ((4, 5), (4, 5)), "io"),
    "uses of one path": (lambda w, x: (x @ w, x @ w), ((4, 5),), "io"),
    "calls of one function": (lambda w, x: ((f := jax.jit(lambda x: x @ w))(x), f(x)), ((4, 5),), "io"),
    "iterations of a scan": (lambda w, x: lax.scan(lambda c, _: (c, x @ w), 0, length=3)[1], ((4, 5),), "io"),
    "layers of a scan": (lambda w, x: lax.scan(lambda c, w: (c, x @ w), 0, w)[1], ((3, 4, 5),), "bio"),
    "iterations of a while": (
        lambda w, x: lax.while_loop(
            lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1].at[s[0]].set(x @ w)), (0, jnp.zeros((3, 3, 5)))
        )[1],
        ((4, 5),),
        "io",
    ),
    "iterations of a scan in a scan": (
        lambda w, x: lax.scan(lambda c, _: (c, lax.scan(lambda c, _: (c, x @ w), 0, length=2)[1]), 0, length=2)[
            1
        ].reshape(4, 3, 5),
        ((4, 5),),
        "io",
    ),
    "a stack that a scan returns": (
        lambda w, x: jnp.einsum("ti,lio->lto", x, lax.scan(lambda c, w: (c, w.T), 0, w)[1].transpose(0, 2, 1)),
        ((3, 4, 5),),
        "bio",
    ),
}


@pytest.mark.parametrize("name", USES)
def test_masks_differ_between(name: str) -> None:
    call, kernels, axes = USES[name]
    outs = list(low_rank_part(call, *kernels, axes=axes)(KEY, X))
    if name not in (
        "paths",
        "layers of a scan",
        "a stack that a scan returns",
    ):  # with different factors the results would differ anyway
        undropped = list(low_rank_part(call, *kernels, axes=axes)(None, X))
        for one, other in itertools.pairwise(undropped):
            np.testing.assert_array_equal(one, other)
    for number, one in enumerate(outs):
        for other in outs[:number]:
            assert float(jnp.abs(one - other).max()) > 1e-3


def test_other_adapted_paths_do_not_change_a_mask() -> None:
    one = low_rank_part(lambda v, x: x @ v, (4, 5))(KEY, X)
    both = low_rank_part(lambda v, w, x: (x @ v, x @ w), (4, 5), (4, 5))(KEY, X)
    np.testing.assert_array_equal(one, both[0])


def test_masks_are_the_same_eagerly_and_under_jit() -> None:
    run = low_rank_part(lambda w, x: jnp.tanh(x @ w), (4, 5))
    np.testing.assert_allclose(run(KEY, X), jax.jit(run)(KEY, X), rtol=1e-5)
    assert float(jnp.abs(run(KEY, X) - run(jax.random.key(8), X)).max()) > 1e-3


def test_a_raw_key_works() -> None:
    run = low_rank_part(lambda w, x: x @ w, (4, 5))
    np.testing.assert_array_equal(run(KEY, X), run(jax.random.key_data(KEY), X))


def test_the_gradient_uses_the_mask_of_the_forward_pass() -> None:
    apply, params, adapter = case(
        lambda w, x: lax.scan(jax.checkpoint(lambda x, _: (jnp.tanh(x @ w), None)), x, length=2)[0], (4, 4)
    )

    def loss(adapter: Any) -> Any:
        return jnp.sum(jnp.sin(lj.lora(apply)(params, adapter, X, dropout_key=KEY)))

    direction = jax.tree.map(jnp.cos, adapter)
    with jax.enable_x64(False):
        step = 1e-2
        up, down = (loss(jax.tree.map(lambda x, d, s=s: x + s * d, adapter, direction)) for s in (step, -step))
        slope = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jax.grad(loss)(adapter), direction)))
        np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=2e-2)


def test_merge_ignores_dropout() -> None:
    apply, params, adapter = case(lambda w, x: x @ w, (4, 5))
    assert_close(apply(lj.merge(params, adapter), X), lj.lora(apply)(params, adapter, X), GRADIENT)


def test_concatenated_kernels_share_a_mask_or_are_refused() -> None:
    fused = lambda v, w, x: x @ jnp.concatenate([v, w], 1)  # noqa: E731
    assert low_rank_part(fused, (4, 5), (4, 5))(KEY, X).shape == (3, 10)
    apply, params, adapter = case(fused, (4, 5), (4, 5))
    adapter["w1"] = lj.Adapter(lj.LoRA(rank=2, alpha=3), "io", **adapter["w1"].arrays)
    with pytest.raises(lj.UnsupportedError, match=r"a concatenation of kernels with the dropout rates \[0.5, None\]"):
        lj.lora(apply)(params, adapter, X, dropout_key=KEY)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2])
def test_a_rate_out_of_range_is_an_error(rate: float) -> None:
    with pytest.raises(lj.SpecError) as error:
        lj.LoRA(rank=2, alpha=3, dropout=rate)
    assert str(error.value) == f"Expected a number in [0, 1) for `dropout`; got dropout={rate}."


def test_the_rate_is_part_of_the_variant() -> None:
    assert repr(HALF) == "LoRA(rank=2, alpha=3, dropout=0.5)"
    assert repr(lj.RSLoRA(rank=2, alpha=3)) == "RSLoRA(rank=2, alpha=3)"
