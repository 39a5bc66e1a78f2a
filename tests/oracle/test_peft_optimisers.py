"""Live comparison of LoRA+, LoRA-FA and Riemannian preconditioning with PEFT's, array by array; `make test-oracle`.

Where PEFT departs from the papers, its own result is had here by masks, so that nothing else can differ.
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


def drawn(*shape, seed):
    return (np.random.default_rng(seed).standard_normal(shape) / 3).astype(np.float32)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.first, self.second, self.head = nn.Linear(8, 7), nn.Linear(7, 6), nn.Linear(6, 5)


SHAPES = {"embed": (9, 8), "first": (8, 7), "second": (7, 6), "head": (6, 5)}
PARAMS = {
    name: {"kernel": jnp.asarray(drawn(*shape, seed=at)), "bias": jnp.asarray(drawn(shape[1], seed=10 + at))}
    for at, (name, shape) in enumerate(SHAPES.items())
}
LORA = lj.LoRA(rank=RANK, alpha=ALPHA)
FACTORS = {"embed/kernel": LORA, "first/kernel": LORA, "second/kernel": LORA}
WHOLE = {"first/bias": lj.Full(), "second/bias": lj.Full(), "head/*": lj.Full()}


def filled(adapter, seed):
    leaves, treedef = jax.tree.flatten(adapter)
    return treedef.unflatten([jnp.asarray(drawn(*x.shape, seed=seed + at)) for at, x in enumerate(leaves)])


def made(spec):
    """An adapter that does something, and a gradient for each step."""
    adapter = filled(lj.init(jax.random.key(0), PARAMS, spec), 30)
    return adapter, [filled(adapter, 100 * step) for step in range(1, STEPS + 1)]


def theirs(adapter):
    """PEFT's model with the same numbers, and its parameter for each of our arrays."""
    whole = {"bias": "lora_only", "modules_to_save": ["head"]} if "head/kernel" in adapter else {}
    layers = [path.split("/")[0] for path in adapter if path in FACTORS]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers, **whole)
    model = peft.get_peft_model(Net(), config)
    found = {(path, name): parameter(model, path, name) for path, part in adapter.items() for name in part.arrays}
    for (path, name), its in found.items():
        its.data = torch.from_numpy(np.asarray(adapter[path].arrays[name]).T.copy())
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


def step_theirs(optimizer, found, gradients):
    for gradient in gradients:
        for (path, name), its in found.items():
            if its.requires_grad:
                its.grad = torch.from_numpy(np.asarray(gradient[path].arrays[name]).T.copy())
        optimizer.step()


def distances(adapter, found):
    """How far each array is from PEFT's, against its largest number."""
    far = {}
    for (path, name), its in found.items():
        other = its.detach().numpy().T
        far[f"{path}.{name}"] = float(np.abs(adapter[path].arrays[name] - other).max() / np.abs(other).max())
    return far


def differing(adapter, found, tolerance=2e-5):
    return {name for name, distance in distances(adapter, found).items() if distance > tolerance}


# LoRA+


def adamw(**options):
    return optax.adamw(RATE, eps=EPS, weight_decay=DECAY, **options)


def loraplus(adapter, gradients):
    model, found = theirs(adapter)
    options = {"loraplus_weight_decay": DECAY, "loraplus_lr_embedding": EMBEDDING_RATE, "eps": EPS}
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, **options)
    step_theirs(optimizer, found, gradients)
    return found


def test_lora_plus_trains_the_factors_of_linear_layers_and_whole_matrices_as_peft_does():
    adapter, gradients = made(FACTORS | WHOLE)
    found = loraplus(adapter, gradients)
    got = after(optax.chain(adamw(), optim.lora_plus(RATIO)), adapter, gradients)
    others = {"embed/kernel.a", "embed/kernel.b", "first/bias.value", "second/bias.value", "head/bias.value"}
    assert differing(got, found) == others
    assert all(distance > 1e-3 for name, distance in distances(got, found).items() if name in others)


def test_what_peft_does_otherwise_is_a_matter_of_masks():
    """Vectors at the rate of `b` and without decay, factors of an embedding at a rate of their own."""
    adapter, gradients = made(FACTORS | WHOLE)
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
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)  # it would multiply in bfloat16
    model, found = theirs(adapter)
    optimizer = lorafa.create_lorafa_optimizer(model, r=RANK, lora_alpha=ALPHA, lr=RATE, weight_decay=decay)
    optimizer.param_groups[0]["eps"] = EPS
    step_theirs(optimizer, found, gradients)
    return found


LINEAR = {path: LORA for path in ("first/kernel", "second/kernel")}


def test_lora_fa_steps_as_peft_does(monkeypatch):
    adapter, gradients = made(LINEAR)
    found = lora_fa(adapter, gradients, 0.0, monkeypatch)
    got = after(optim.lora_fa(optax.adam(RATE, eps=EPS)), adapter, gradients)
    assert differing(got, found) == set()
    for path, part in got.items():
        np.testing.assert_array_equal(part.a, adapter[path].a)
        assert float(abs(part.b - adapter[path].b).max()) > RATE


def test_lora_fa_in_peft_decays_what_the_step_has_moved(monkeypatch):
    """AdamW decays what was there before the step; the difference is of second order in the rate."""
    adapter, gradients = made(LINEAR)
    found = lora_fa(adapter, gradients[:1], DECAY, monkeypatch)
    stepped = after(optim.lora_fa(optax.adam(RATE, eps=EPS)), adapter, gradients[:1])
    decayed = jax.tree.map(lambda x: x * (1 - RATE * DECAY), stepped)
    assert differing(decayed, found) == {"first/kernel.a", "second/kernel.a"}  # which neither moves
    got = after(optim.lora_fa(adamw()), adapter, gradients[:1])
    for path, part in got.items():
        move = stepped[path].b - adapter[path].b
        difference = np.asarray(part.b) - found[path, "b"].detach().numpy().T
        np.testing.assert_allclose(difference, RATE * DECAY * move, atol=1e-7)


# Riemannian preconditioning


def riemannian(adapter, gradients):
    model, found = theirs(adapter)
    options = {"reg": 0.01, "eps": EPS, "weight_decay": DECAY}
    optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=RATE, **options)
    step_theirs(optimizer, found, gradients)
    return found


def test_riemannian_steps_are_peft_s_but_for_an_embedding_which_it_leaves_out():
    adapter, gradients = made(FACTORS | WHOLE)
    found = riemannian(adapter, gradients)
    got = after(optax.chain(optim.riemannian(damping=0.01), adamw()), adapter, gradients)
    assert differing(got, found) == {"embed/kernel.a", "embed/kernel.b"}
    alone = after(adamw(), adapter, gradients)
    assert not {"embed/kernel.a", "embed/kernel.b"} & differing(alone, found)
    assert {"first/kernel.a", "first/kernel.b"} < differing(alone, found, 1e-3)


@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_the_preconditioned_gradients_are_peft_s(damping):
    adapter, gradients = made(LINEAR)
    model, found = theirs(adapter)
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1, reg=damping)
    step_theirs(optimizer, found, gradients)
    got = after(optax.chain(optim.riemannian(damping=damping), optax.sgd(0.1)), adapter, gradients)
    assert differing(got, found) == set()
