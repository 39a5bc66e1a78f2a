"""The example of diffusion: its noise, its sampler, its measure, and LoRA on all of its convolutions and attention."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import trained

import diffusion
import lora_jax as lj

pytestmark = pytest.mark.sweep

MODEL = diffusion.UNet(channels=8)
LABELS = jnp.arange(4) % 3


def make_params():
    return jax.jit(MODEL.init)(jax.random.key(0), jnp.ones((1, 16, 16, 1)), jnp.ones(1), jnp.zeros(1, int))


def exact(x):
    """The velocity at every `z` and angle if all images are `x`."""

    def apply(z, angle, labels):
        cos, sin = (f(angle)[:, None, None, None] for f in (jnp.cos, jnp.sin))
        return cos * (z - cos * x) / sin - sin * x

    return apply


def test_the_loss_of_the_exact_velocity_is_zero():
    x = jnp.full((16, 16, 1), 0.3)
    images = diffusion.Images(jnp.broadcast_to(x, (4, 16, 16, 1)), LABELS)
    assert diffusion.velocity_loss(exact(x), jax.random.key(1), images) < 1e-6
    assert diffusion.velocity_loss(exact(-x), jax.random.key(1), images) > 0.1


def test_the_sampler_finds_the_image_of_the_exact_velocity():
    x = jnp.linspace(-1, 1, 16 * 16).reshape(16, 16, 1)
    found = diffusion.sample(exact(x), jax.random.key(1), LABELS, steps=5)
    np.testing.assert_allclose(found, jnp.broadcast_to(x, (4, 16, 16, 1)), atol=1e-5)


def test_the_distance_is_zero_for_equal_features_and_that_of_the_means_if_only_they_differ():
    x = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    assert abs(diffusion.frechet_distance(x, x)) < 1e-5
    np.testing.assert_allclose(diffusion.frechet_distance(x, x + np.float32([3, 0, 4])), 25, rtol=1e-4)
    np.testing.assert_allclose(diffusion.frechet_distance(x, 3 * (x - x.mean(0)) + x.mean(0)),
                               4 * np.trace(np.cov(x, rowvar=False)), rtol=1e-4)  # fmt: skip


def test_the_spec_selects_every_kernel_of_more_than_two_axes_and_the_merged_model_samples_the_same():
    params = make_params()
    inputs = jnp.ones((2, 16, 16, 1)), jnp.ones(2), jnp.zeros(2, int)
    apply, adapter = lj.adapt(MODEL.apply, params, diffusion.SPEC, *inputs, key=jax.random.key(1))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    expected = {"/".join(key.key for key in path) for path, leaf in leaves if leaf.ndim > 2}
    assert set(adapter) == expected and len(expected) == 17

    adapter = trained(jax.random.key(2), adapter)
    sample = jax.jit(
        lambda *trees: diffusion.sample(
            functools.partial(apply if len(trees) == 2 else MODEL.apply, *trees), jax.random.key(3), LABELS, steps=3
        )
    )
    of_base, of_adapted, of_merged = (
        sample(*trees) for trees in ((params,), (params, adapter), (lj.merge(params, adapter),))
    )
    np.testing.assert_allclose(of_merged, of_adapted, atol=1e-4)
    assert jnp.abs(of_adapted - of_base).max() > 1e-2


def test_training_lowers_the_held_out_loss_and_leaves_the_frozen_tree():
    x = np.linspace(-1, 1, 16 * 16, dtype=np.float32).reshape(1, 16, 16, 1)
    images = diffusion.Images(np.repeat(x, 8, 0), np.zeros(8, np.int32))
    params = make_params()
    before = jax.tree.map(np.array, params)
    apply, adapter = lj.adapt(MODEL.apply, params, diffusion.SPEC, images.pixels, jnp.ones(8), images.labels,
                              key=jax.random.key(1))  # fmt: skip

    def loss_of(adapter, params, key, images):
        return diffusion.velocity_loss(functools.partial(apply, params, adapter), key, images)

    _, curve = diffusion.training("LoRA", loss_of, 24)(adapter, params, images, 0, held_out=images)
    assert [step for step, _ in curve] == list(range(0, 25, 2))
    assert curve[-1][1] < 0.9 * curve[0][1]
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_a_run_writes_its_results_and_raises_if_they_are_worse_than_expected(tmp_path):
    scale = diffusion.SHORT._replace(base_steps=2, classifier_steps=2, steps=2, sampler_steps=1, expected=1.1)
    with pytest.raises(RuntimeError, match="Expected the classifier to recognize 110% of LoRA's samples"):
        diffusion.run(tmp_path, scale, seeds=(0, 1))
    results = json.loads((tmp_path / "results.json").read_text())
    assert {len(results[name]) for name in ("base", "LoRA", "full fine-tuning", "training images")} == {2}
    assert (tmp_path / "diffusion.png").stat().st_size > 10_000
