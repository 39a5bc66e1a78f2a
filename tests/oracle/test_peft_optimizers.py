"""Compares LoRA+, LoRA-FA and Riemannian preconditioning with PEFT, array by array; `make test-oracle`.

Where PEFT differs from the papers, masks reproduce its result, so that nothing else differs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer, lorafa
from torch import nn

import lora_jax as lj
from lora_jax import optim

RANK, ALPHA, STEPS, EPS = 4, 6, 3, 1e-12
RATE, DECAY, RATIO, EMBEDDING_RATE = 0.01, 0.1, 16, 0.002


def random_array(*shape, seed):
    return (np.random.default_rng(seed).standard_normal(shape) / 3).astype(np.float32)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.first, self.second, self.head = nn.Linear(8, 7), nn.Linear(7, 6), nn.Linear(6, 5)


SHAPES = {"embed": (9, 8), "first": (8, 7), "second": (7, 6), "head": (6, 5)}
PARAMS = {
    name: {
        "kernel": jnp.asarray(random_array(*shape, seed=at)),
        "bias": jnp.asarray(random_array(shape[1], seed=10 + at)),
    }
    for at, (name, shape) in enumerate(SHAPES.items())
}
LORA = lj.LoRA(rank=RANK, alpha=ALPHA)
FACTORS = {"embed/kernel": LORA, "first/kernel": LORA, "second/kernel": LORA}
FULL = {"first/bias": lj.Full(), "second/bias": lj.Full(), "head/*": lj.Full()}


def filled(adapter, seed):
    leaves, treedef = jax.tree.flatten(adapter)
    return treedef.unflatten([jnp.asarray(random_array(*x.shape, seed=seed + at)) for at, x in enumerate(leaves)])


def random_case(spec):
    """An adapter with nonzero arrays, and a gradient for each step."""
    adapter = filled(lj.init(jax.random.key(0), PARAMS, spec), 30)
    return adapter, [filled(adapter, 100 * step) for step in range(1, STEPS + 1)]


def peft_case(adapter):
    """PEFT's model with the same values, and its parameter for each array of the adapter."""
    extra = {"bias": "lora_only", "modules_to_save": ["head"]} if "head/kernel" in adapter else {}
    layers = [path.split("/")[0] for path in adapter if path in FACTORS]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers, **extra)
    model = peft.get_peft_model(Net(), config)
    found = {(path, name): parameter(model, path, name) for path, part in adapter.items() for name in part.arrays}
    for (path, name), peft_array in found.items():
        peft_array.data = torch.from_numpy(np.asarray(adapter[path].arrays[name]).T.copy())
    return model, found


def parameter(model, path, name):
    layer, kind = path.split("/")
    module = getattr(model.base_model.model, layer)
    if layer == "head":
        return getattr(module.modules_to_save["default"], "weight" if kind == "kernel" else "bias")
    if kind == "bias":
        return module.base_layer.bias
    if layer == "embed":
        return getattr(module, f"lora_embedding_{name.upper()}")["default"]
    return getattr(module, f"lora_{name.upper()}")["default"].weight


def after(tx, adapter, gradients):
    state, update = tx.init(adapter), jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, adapter)
        adapter = optax.apply_updates(adapter, updates)
    return adapter


def step_peft(optimizer, found, gradients):
    for gradient in gradients:
        for (path, name), peft_array in found.items():
            if peft_array.requires_grad:
                peft_array.grad = torch.from_numpy(np.asarray(gradient[path].arrays[name]).T.copy())
        optimizer.step()


def distances(adapter, found):
    """The distance of each array from PEFT's, relative to the largest element."""
    far = {}
    for (path, name), peft_array in found.items():
        other = peft_array.detach().numpy().T
        far[f"{path}.{name}"] = float(np.abs(adapter[path].arrays[name] - other).max() / np.abs(other).max())
    return far


def differing(adapter, found, tolerance=2e-5):
    return {name for name, distance in distances(adapter, found).items() if distance > tolerance}


# LoRA+


def adamw(**options):
    return optax.adamw(RATE, eps=EPS, weight_decay=DECAY, **options)


def loraplus(adapter, gradients):
    model, found = peft_case(adapter)
    options = {"loraplus_weight_decay": DECAY, "loraplus_lr_embedding": EMBEDDING_RATE, "eps": EPS}
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, **options)
    step_peft(optimizer, found, gradients)
    return found


def test_lora_plus_matches_peft_for_factors_of_linear_layers_and_full_matrices():
    adapter, gradients = random_case(FACTORS | FULL)
    found = loraplus(adapter, gradients)
    got = after(optax.chain(adamw(), optim.lora_plus(RATIO)), adapter, gradients)
    others = {"embed/kernel.a", "embed/kernel.b", "first/bias.value", "second/bias.value", "head/bias.value"}
    assert differing(got, found) == others
    assert all(distance > 1e-3 for name, distance in distances(got, found).items() if name in others)


def test_masks_reproduce_the_differences_of_peft():
    """PEFT trains vectors at the rate of `b` without decay, and factors of an embedding at a separate rate."""
    adapter, gradients = random_case(FACTORS | FULL)
    found = loraplus(adapter, gradients)
    tx = optax.chain(
        adamw(mask=optim.select(exclude="*/bias")),
        optim.lora_plus(RATIO, exclude="embed/*"),
        optax.masked(optax.scale(RATIO), optim.select(paths="*/bias")),
        optax.masked(optax.scale(EMBEDDING_RATE / RATE), optim.select(paths="embed/*")),
    )
    assert differing(after(tx, adapter, gradients), found) == set()


# LoRA-FA


def lora_fa(adapter, gradients, decay, monkeypatch):
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)  # PEFT would multiply in bfloat16
    model, found = peft_case(adapter)
    optimizer = lorafa.create_lorafa_optimizer(model, r=RANK, lora_alpha=ALPHA, lr=RATE, weight_decay=decay)
    optimizer.param_groups[0]["eps"] = EPS
    step_peft(optimizer, found, gradients)
    return found


LINEAR = {path: LORA for path in ("first/kernel", "second/kernel")}


def test_lora_fa_steps_match_peft(monkeypatch):
    adapter, gradients = random_case(LINEAR)
    found = lora_fa(adapter, gradients, 0.0, monkeypatch)
    got = after(optim.lora_fa(optax.adam(RATE, eps=EPS)), adapter, gradients)
    assert differing(got, found) == set()
    for path, part in got.items():
        np.testing.assert_array_equal(part.a, adapter[path].a)
        assert float(abs(part.b - adapter[path].b).max()) > RATE


def test_lora_fa_in_peft_decays_after_the_step(monkeypatch):
    """AdamW decays the values before the step; the difference is of second order in the rate."""
    adapter, gradients = random_case(LINEAR)
    found = lora_fa(adapter, gradients[:1], DECAY, monkeypatch)
    stepped = after(optim.lora_fa(optax.adam(RATE, eps=EPS)), adapter, gradients[:1])
    decayed = jax.tree.map(lambda x: x * (1 - RATE * DECAY), stepped)
    assert differing(decayed, found) == {"first/kernel.a", "second/kernel.a"}  # not trained by either
    got = after(optim.lora_fa(adamw()), adapter, gradients[:1])
    for path, part in got.items():
        move = stepped[path].b - adapter[path].b
        difference = np.asarray(part.b) - found[path, "b"].detach().numpy().T
        np.testing.assert_allclose(difference, RATE * DECAY * move, atol=1e-7)


# Riemannian preconditioning


def riemannian(adapter, gradients):
    model, found = peft_case(adapter)
    options = {"reg": 0.01, "eps": EPS, "weight_decay": DECAY}
    optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=RATE, **options)
    step_peft(optimizer, found, gradients)
    return found


def test_riemannian_steps_match_peft_except_for_embeddings():
    adapter, gradients = random_case(FACTORS | FULL)
    found = riemannian(adapter, gradients)
    got = after(optax.chain(optim.riemannian(damping=0.01), adamw()), adapter, gradients)
    assert differing(got, found) == {"embed/kernel.a", "embed/kernel.b"}
    unpreconditioned = after(adamw(), adapter, gradients)
    assert not {"embed/kernel.a", "embed/kernel.b"} & differing(unpreconditioned, found)
    assert {"first/kernel.a", "first/kernel.b"} < differing(unpreconditioned, found, 1e-3)


@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_preconditioned_gradients_match_peft(damping):
    adapter, gradients = random_case(LINEAR)
    model, found = peft_case(adapter)
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1, reg=damping)
    step_peft(optimizer, found, gradients)
    got = after(optax.chain(optim.riemannian(damping=damping), optax.sgd(0.1)), adapter, gradients)
    assert differing(got, found) == set()
