"""Compares results, gradients and merges of the variants with PEFT; `make test-oracle`."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from torch import nn

import lora_jax as lj

RANK, ALPHA, BATCH = 4, 6, 5


def random_array(*shape, seed):
    return (np.random.default_rng(seed).standard_normal(shape) / 3).astype(np.float32)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 10)
        self.layer.weight.data = torch.from_numpy(random_array(12, 10, seed=0).T.copy())
        self.layer.bias.data = torch.from_numpy(random_array(10, seed=1))

    def forward(self, x):
        return self.layer(x)


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(6, 8, (3, 2), stride=(2, 1), bias=True)
        self.layer.weight.data = torch.from_numpy(random_array(3, 2, 6, 8, seed=0).transpose(3, 2, 0, 1).copy())
        self.layer.bias.data = torch.from_numpy(random_array(8, seed=1))

    def forward(self, x):
        return self.layer(x)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Embedding(12, 10)
        self.layer.weight.data = torch.from_numpy(random_array(12, 10, seed=0))

    def forward(self, ids):
        return self.layer(ids)


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def conv(params, x):
    numbers = ("NCHW", "HWIO", "NCHW")
    y = jax.lax.conv_general_dilated(x, params["kernel"], (2, 1), "VALID", dimension_numbers=numbers)
    return y + params["bias"][:, None, None]


def table(params, ids):
    return params["kernel"][ids]


LAYERS = {
    "dense": (Dense, dense, "io", (12, 10), random_array(BATCH, 12, seed=2)),
    "conv": (Conv, conv, "iiio", (3, 2, 6, 8), random_array(2, 6, 9, 7, seed=2)),
    "embedding": (Table, table, "io", (12, 10), np.array([0, 11, 3, 3])),
}
VARIANTS = {
    "LoRA": (lj.LoRA, {}),
    "rsLoRA": (lj.RSLoRA, {"use_rslora": True}),
    "DoRA": (lj.DoRA, {"use_dora": True}),
    "DoRA, rank-stabilized": (
        lambda **fields: lj.DoRA(rank_stabilized=True, **fields),
        {"use_dora": True, "use_rslora": True},
    ),
}


def lora_jax_case(name, variant):
    """The parameters, an adapter with nonzero arrays, the model and its input."""
    _, call, axes, shape, x = LAYERS[name]
    params = {"kernel": jnp.asarray(random_array(*shape, seed=0)), "bias": jnp.asarray(random_array(shape[-1], seed=1))}
    make = VARIANTS[variant][0](rank=RANK, alpha=ALPHA, axes=axes)
    start = lj.init(jax.random.key(0), params, {"kernel": make})["kernel"]
    arrays = {key: random_array(*array.shape, seed=7 + at) for at, (key, array) in enumerate(start.arrays.items())}
    if "magnitude" in arrays:
        arrays["magnitude"] = np.abs(arrays["magnitude"]) + 0.5
    return params, {"kernel": lj.Adapter(start.variant, start.axes, **arrays)}, call, x


def peft_case(name, variant, part):
    """PEFT's model with the same values, and the adapted layer."""
    model = LAYERS[name][0]()
    options = dict(r=RANK, lora_alpha=ALPHA, target_modules=["layer"], init_lora_weights=False)
    model = peft.get_peft_model(model, peft.LoraConfig(**options, **VARIANTS[variant][1]))
    layer = model.base_model.model.layer
    a, b = (torch.from_numpy(np.asarray(part.arrays[factor])) for factor in "ab")
    if name == "embedding":
        layer.lora_embedding_A["default"].data = a.T.contiguous()
        layer.lora_embedding_B["default"].data = b.T.contiguous()
    elif name == "conv":
        layer.lora_A["default"].weight.data = a.permute(3, 2, 0, 1).contiguous()
        layer.lora_B["default"].weight.data = b.T[..., None, None].contiguous()
    else:
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a.T.contiguous(), b.T.contiguous()
    if "magnitude" in part.arrays:
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.data = torch.from_numpy(np.asarray(part.magnitude)).reshape(magnitude.shape)
    return model, layer


def near(got, expected, tolerance=2e-5):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", LAYERS)
def test_result_and_gradients_match_peft(name, variant):
    params, adapter, call, x = lora_jax_case(name, variant)
    model, layer = peft_case(name, variant, adapter["kernel"])
    expected = model(torch.from_numpy(x))
    near(lj.lora(call)(params, adapter, x), expected.detach().numpy())
    torch.sum(torch.sin(expected)).backward()
    gradient = jax.grad(lambda ad: jnp.sum(jnp.sin(lj.lora(call)(params, ad, x))))(adapter)["kernel"]
    if name == "embedding":
        near(gradient.a, layer.lora_embedding_A["default"].grad.numpy().T)
        near(gradient.b, layer.lora_embedding_B["default"].grad.numpy().T)
    elif name == "conv":
        near(gradient.a, layer.lora_A["default"].weight.grad.numpy().transpose(2, 3, 1, 0))
        near(gradient.b, layer.lora_B["default"].weight.grad.numpy()[..., 0, 0].T)
    else:
        near(gradient.a, layer.lora_A["default"].weight.grad.numpy().T)
        near(gradient.b, layer.lora_B["default"].weight.grad.numpy().T)
    if "magnitude" in gradient.arrays:
        near(gradient.magnitude, layer.lora_magnitude_vector["default"].weight.grad.numpy().ravel())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", LAYERS)
def test_merged_weights_match_peft(name, variant):
    params, adapter, *_ = lora_jax_case(name, variant)
    model, _ = peft_case(name, variant, adapter["kernel"])
    weight = model.merge_and_unload().layer.weight.detach().numpy()
    as_kernel = {"dense": (1, 0), "conv": (2, 3, 1, 0), "embedding": (0, 1)}
    near(lj.merge(params, adapter)["kernel"], weight.transpose(as_kernel[name]))


def test_initial_magnitude_of_dora_matches_peft():
    params, adapter, *_ = lora_jax_case("dense", "DoRA")
    start = lj.init(jax.random.key(0), params, {"kernel": adapter["kernel"].variant})["kernel"]
    model = peft.get_peft_model(
        Dense(), peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"], use_dora=True)
    )
    near(start.magnitude, model.base_model.model.layer.lora_magnitude_vector["default"].weight.detach().numpy())
