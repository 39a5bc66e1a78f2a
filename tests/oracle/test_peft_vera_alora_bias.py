"""Compares results, gradients and merges of VeRA, aLoRA and a bias on B with PEFT; `make test-oracle`."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.variants import calculate_alora_offsets
from torch import nn

import lora_jax as lj

RANK, ALPHA, IN, OUT = 4, 6, 12, 10
INVOCATION = (7, 8)
IDS = np.array([[1, 7, 8, 5, 3], [7, 8, 2, 7, 8], [7, 1, 8, 7, 3], [7, 8, 0, 0, 7]])


def random_array(*shape, seed):
    return (np.random.default_rng(seed).standard_normal(shape) / 3).astype(np.float32)


PARAMS = {"kernel": random_array(IN, OUT, seed=0), "bias": random_array(OUT, seed=1)}
X = random_array(len(IDS), IDS.shape[1], IN, seed=2)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(IN, OUT)
        self.layer.weight.data = torch.from_numpy(PARAMS["kernel"].T.copy())
        self.layer.bias.data = torch.from_numpy(PARAMS["bias"].copy())

    def forward(self, x, **kwargs):
        return self.layer(x, **kwargs)


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def init(spec):
    """An adapter with nonzero arrays."""
    adapter = lj.init(jax.random.key(0), PARAMS, spec)
    leaves, treedef = jax.tree.flatten(adapter)
    return treedef.unflatten([jnp.asarray(random_array(*leaf.shape, seed=7 + at)) for at, leaf in enumerate(leaves)])


def gradients(adapter, **options):
    return jax.grad(lambda ad: jnp.sum(jnp.sin(lj.lora(dense)(PARAMS, ad, X, **options))))(adapter)


def lora_model(part, **options):
    """PEFT's model with the factors of a kernel."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"], **options)
    model = peft.LoraModel(Dense(), config, "default")
    layer = model.model.layer
    layer.lora_A["default"].weight.data = torch.from_numpy(np.array(part.a).T.copy())
    layer.lora_B["default"].weight.data = torch.from_numpy(np.array(part.b).T.copy())
    return model, layer


def near(got, expected, tolerance=2e-5):
    expected = expected.detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_a_bias_on_b_matches_peft(rank_stabilized):
    variant = (lj.RSLoRA if rank_stabilized else lj.LoRA)(rank=RANK, alpha=ALPHA)
    adapter = init({"kernel": variant, "bias": lj.LoRABias(scale=variant.scale)})
    model, layer = lora_model(adapter["kernel"], lora_bias=True, init_lora_weights=False, use_rslora=rank_stabilized)
    layer.lora_B["default"].bias.data = torch.from_numpy(np.array(adapter["bias"].bias))
    expected = model(torch.from_numpy(X))
    near(lj.lora(dense)(PARAMS, adapter, X), expected)
    torch.sum(torch.sin(expected)).backward()
    gradient = gradients(adapter)
    near(gradient["kernel"].a.T, layer.lora_A["default"].weight.grad)
    near(gradient["kernel"].b.T, layer.lora_B["default"].weight.grad)
    near(gradient["bias"].bias, layer.lora_B["default"].bias.grad)
    merged, merged_layer = lj.merge(PARAMS, adapter), model.merge_and_unload().layer
    near(merged["kernel"].T, merged_layer.weight)
    near(merged["bias"], merged_layer.bias)


def test_vera_matches_peft_with_the_same_matrices():
    variant = lj.VeRA(rank=RANK, seed=0)
    adapter = init({"kernel": variant})
    config = peft.VeraConfig(r=RANK, target_modules=["layer"], d_initial=0.1, init_weights=False)
    model = peft.get_peft_model(Dense(), config)
    layer, part = model.base_model.model.layer, adapter["kernel"]
    # PEFT uses torch's generator, whose matrices have the same distribution but other values.
    layer.vera_A["default"] = torch.from_numpy(np.array(variant.frozen(0, IN, fan_in=IN)).T.copy())
    layer.vera_B["default"] = torch.from_numpy(np.array(variant.frozen(1, OUT, fan_in=RANK)))
    layer.vera_lambda_d["default"].data = torch.from_numpy(np.array(part.lambda_d))
    layer.vera_lambda_b["default"].data = torch.from_numpy(np.array(part.lambda_b))
    expected = model(torch.from_numpy(X))
    near(lj.lora(dense)(PARAMS, adapter, X), expected)
    torch.sum(torch.sin(expected)).backward()
    gradient = gradients(adapter)["kernel"]
    near(gradient.lambda_d, layer.vera_lambda_d["default"].grad)
    near(gradient.lambda_b, layer.vera_lambda_b["default"].grad)
    near(lj.merge(PARAMS, adapter)["kernel"].T, model.merge_and_unload().layer.weight)


def test_initialization_of_vera_matches_peft():
    config = peft.VeraConfig(r=64, target_modules=["layer"])
    layer = peft.get_peft_model(Dense(), config).base_model.model.layer
    variant = lj.VeRA(rank=64, seed=0)
    start = lj.init(jax.random.key(0), PARAMS, {"kernel": variant})["kernel"]
    near(start.lambda_d, layer.vera_lambda_d["default"])
    np.testing.assert_array_equal(start.lambda_b, layer.vera_lambda_b["default"].detach().numpy())
    for got, expected in [
        (variant.frozen(0, IN, fan_in=IN), layer.vera_A["default"]),
        (variant.frozen(1, OUT, fan_in=64), layer.vera_B["default"]),
    ]:
        np.testing.assert_allclose(np.abs(got).max(), expected.abs().max().item(), rtol=0.05)
        np.testing.assert_allclose(np.std(got), expected.std().item(), rtol=0.1)


def test_alora_matches_peft():
    adapter = init({"kernel": lj.ALoRA(rank=RANK, alpha=ALPHA, invocation=INVOCATION)})
    options = {"alora_invocation_tokens": list(INVOCATION), "task_type": "CAUSAL_LM", "init_lora_weights": False}
    model, layer = lora_model(adapter["kernel"], **options)
    offsets = calculate_alora_offsets(model.peft_config, "default", torch.from_numpy(IDS))
    active = lj.active_tokens(adapter, jnp.asarray(IDS))
    assert [int(row.sum()) or None for row in active] == offsets
    expected = layer(torch.from_numpy(X), alora_offsets=offsets)
    near(lj.lora(dense)(PARAMS, adapter, X, token_weights=active), expected)
    torch.sum(torch.sin(expected)).backward()
    gradient = gradients(adapter, token_weights=active)["kernel"]
    near(gradient.a.T, layer.lora_A["default"].weight.grad)
    near(gradient.b.T, layer.lora_B["default"].weight.grad)
