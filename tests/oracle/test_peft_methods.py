"""Compares LoRA-XS, DeLoRA, IA³, MiSS, QA-LoRA and `Layers` with PEFT; `make test-oracle`.

LoRA-XS is compared with PEFT's TinyLoRA, which has the same update with another parametrization of R.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import nn

import lora_jax as lj

RANK, IN, OUT = 4, 12, 10


def random_array(*shape, seed):
    return (np.random.default_rng(seed).standard_normal(shape) / 3).astype(np.float32)


PARAMS = {"kernel": random_array(IN, OUT, seed=0)}
X = random_array(5, 3, IN, seed=2)


def linear_of(kernel):
    layer = nn.Linear(*kernel.shape, bias=False)
    layer.weight.data = torch.from_numpy(np.array(kernel).T.copy())
    return layer


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = linear_of(PARAMS["kernel"])

    def forward(self, x):
        return self.layer(x)


def dense(params, x):
    return x @ params["kernel"]


def random_adapter(variant):
    adapter = lj.init(jax.random.key(0), PARAMS, {"kernel": variant})
    leaves, treedef = jax.tree.flatten(adapter)
    return treedef.unflatten([jnp.asarray(random_array(*leaf.shape, seed=7 + at)) for at, leaf in enumerate(leaves)])


def gradients(adapter):
    return jax.grad(lambda ad: jnp.sum(jnp.sin(lj.lora(dense)(PARAMS, ad, X))))(adapter)["kernel"]


def tensor(array):
    return torch.from_numpy(np.array(array))


def near(got, expected, tolerance=3e-5):
    expected = expected.detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def check(adapter, model):
    """Compares the results and the merged kernels, and computes PEFT's gradients."""
    expected = model(torch.from_numpy(X))
    near(lj.lora(dense)(PARAMS, adapter, X), expected)
    torch.sum(torch.sin(expected)).backward()
    near(lj.merge(PARAMS, adapter)["kernel"].T, model.merge_and_unload().layer.weight)


def test_delora():
    adapter = random_adapter(lj.DeLoRA(rank=RANK))
    part = adapter["kernel"]
    model = peft.get_peft_model(Dense(), peft.DeloraConfig(r=RANK, target_modules=["layer"]))
    layer = model.base_model.model.layer
    start = lj.init(jax.random.key(0), PARAMS, {"kernel": lj.DeLoRA(rank=RANK)})["kernel"]
    near(start.bound, layer.delora_lambda["default"][0])
    layer.delora_A["default"].data = tensor(part.a.T)
    layer.delora_B["default"].data = tensor(part.b.T)
    layer.delora_lambda["default"].data = tensor(part.bound[None])
    check(adapter, model)
    gradient = gradients(adapter)
    near(gradient.a.T, layer.delora_A["default"].grad)
    near(gradient.b.T, layer.delora_B["default"].grad)
    near(gradient.bound, layer.delora_lambda["default"].grad[0])


def test_a_fresh_delora_has_the_gradient_of_peft():
    adapter = lj.init(jax.random.key(0), PARAMS, {"kernel": lj.DeLoRA(rank=RANK)})
    model = peft.get_peft_model(Dense(), peft.DeloraConfig(r=RANK, target_modules=["layer"]))
    layer = model.base_model.model.layer
    layer.delora_A["default"].data = tensor(adapter["kernel"].a.T)
    torch.sum(torch.sin(model(torch.from_numpy(X)))).backward()
    near(gradients(adapter).b.T, layer.delora_B["default"].grad)


@pytest.mark.parametrize("inputs", [False, True])
def test_ia3(inputs):
    adapter = random_adapter(lj.IA3(inputs=inputs))
    config = peft.IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if inputs else [])
    model = peft.get_peft_model(Dense(), config)
    layer = model.base_model.model.layer
    weight = layer.ia3_l["default"]
    weight.data = 1 + tensor(adapter["kernel"].gain).reshape(weight.shape)
    check(adapter, model)
    near(gradients(adapter).gain, weight.grad.flatten())


@pytest.mark.parametrize("rank", [4, 5])  # 5 does not divide the inputs
def test_miss(rank):
    adapter = random_adapter(lj.MiSS(rank=rank))
    model = peft.get_peft_model(Dense(), peft.MissConfig(r=rank, target_modules=["layer"]))
    layer = model.base_model.model.layer
    layer.miss_block["default"].data = tensor(adapter["kernel"].b)
    check(adapter, model)
    near(gradients(adapter).b, layer.miss_block["default"].grad)


def test_lora_xs_is_tinylora_with_a_trained_matrix():
    units = RANK * RANK
    config = peft.TinyLoraConfig(r=RANK, u=units, target_modules=["layer"])
    model = peft.get_peft_model(Dense(), config)
    layer = model.base_model.model.layer
    a, b = layer.tinylora_A["default"], layer.tinylora_B["default"]
    start = lj.init(jax.random.key(0), PARAMS, {"kernel": lj.LoRAXS(rank=RANK, alpha=RANK)})["kernel"]
    near(start.frozen_a @ start.frozen_b, (b @ a).T)
    # With these projections, R is the vector that PEFT trains.
    layer.tinylora_P["default"] = torch.eye(units).reshape(units, RANK, RANK)
    matrix = random_array(RANK, RANK, seed=3)
    vector = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    vector.data = torch.from_numpy(matrix.flatten())
    factors = {"frozen_a": jnp.asarray(a.T), "frozen_b": jnp.asarray(b.T)}
    adapter = {"kernel": lj.Adapter(start.variant, "io", **factors, r=jnp.asarray(matrix.T))}
    check(adapter, model)
    gradient = gradients(adapter)
    near(gradient.r.T.flatten(), vector.grad)
    assert not gradient.frozen_a.any() and not gradient.frozen_b.any()


def test_qa_lora_has_the_update_of_peft_up_to_its_scale():
    group = 3
    adapter = random_adapter(lj.QALoRA(rank=RANK, alpha=8, group=group))
    part = adapter["kernel"]
    base = Dense().layer
    # PEFT multiplies the mean of a group with the number of groups, and the paper's code with its size.
    scale = part.variant.scale * group / (IN // group)
    module = types.SimpleNamespace(
        lora_A={"default": nn.Linear(IN // group, RANK, bias=False)},
        lora_B={"default": nn.Linear(RANK, OUT, bias=False)},
        lora_dropout={"default": nn.Identity()},
        scaling={"default": scale},
        qalora_group_size={"default": group},
        in_features=IN,
        training=False,
    )
    module.lora_A["default"].weight.data = tensor(part.a.T)
    module.lora_B["default"].weight.data = tensor(part.b.T)
    x = torch.from_numpy(X)
    expected = QALoraLinearVariant.forward(module, "default", x, base(x))
    near(lj.lora(dense)(PARAMS, adapter, X), expected)
    torch.sum(torch.sin(expected)).backward()
    gradient = gradients(adapter)
    near(gradient.a.T, module.lora_A["default"].weight.grad)
    near(gradient.b.T, module.lora_B["default"].weight.grad)


def test_layers_of_a_scanned_stack_are_the_layers_to_transform():
    kernels = random_array(4, IN, IN, seed=5)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"dense": linear_of(kernel)}) for kernel in kernels])

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer["dense"](x))
            return x

    config = peft.LoraConfig(
        r=RANK, lora_alpha=8, target_modules=["dense"], layers_to_transform=[1, 2], layers_pattern="layers"
    )
    model = peft.get_peft_model(Model(), config)
    variant = lj.Layers(variant=lj.LoRA(rank=RANK, alpha=8, axes="bio"), layers=[1, 2])
    part = lj.init(jax.random.key(0), {"w": kernels}, {"w": variant})["w"]
    part.arrays["b"] = jnp.asarray(random_array(*part.b.shape, seed=6))
    adapted = [layer["dense"] for layer in model.base_model.model.layers if hasattr(layer["dense"], "lora_A")]
    for layer, a, b in zip(adapted, part.a, part.b, strict=True):
        layer.lora_A["default"].weight.data = tensor(a.T)
        layer.lora_B["default"].weight.data = tensor(b.T)

    def apply(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    expected = model(torch.from_numpy(X))
    near(lj.lora(apply)({"w": kernels}, {"w": part}, X), expected)
    torch.sum(torch.sin(expected)).backward()
    gradient = jax.grad(lambda part: jnp.sum(jnp.sin(lj.lora(apply)({"w": kernels}, {"w": part}, X))))(part)
    for layer, a, b in zip(adapted, gradient.a, gradient.b, strict=True):
        near(a.T, layer.lora_A["default"].weight.grad)
        near(b.T, layer.lora_B["default"].weight.grad)
