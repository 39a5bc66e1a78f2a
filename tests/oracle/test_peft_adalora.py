"""Compares AdaLoRA with PEFT: layers, budget, importance, masks, orthogonality; `make test-oracle`.

PEFT divides the scale by r + 1e-5, which is within the tolerance.
"""

import types
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from torch import nn

import lora_jax as lj
from lora_jax import adaptive

RANK, ALPHA = 4, 6
SHAPES = {"first": (12, 10), "second": (10, 8)}
SCHEDULE = {"end": 3, "warmup": 2, "settle": 3, "total": 12}


def random_array(*shape, seed):
    return (np.random.default_rng(seed).standard_normal(shape) / 3).astype(np.float32)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Linear(*shape, bias=False) for shape in SHAPES.values())
        for seed, name in enumerate(SHAPES):
            getattr(self, name).weight.data = torch.from_numpy(random_array(*SHAPES[name], seed=seed).T.copy())

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(6, 8, (3, 2), stride=(2, 1), bias=False)
        self.layer.weight.data = torch.from_numpy(random_array(3, 2, 6, 8, seed=0).transpose(3, 2, 0, 1).copy())

    def forward(self, x):
        return self.layer(x)


def net(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


def conv(params, x):
    numbers = ("NCHW", "HWIO", "NCHW")
    return jax.lax.conv_general_dilated(x, params["layer"], (2, 1), "VALID", dimension_numbers=numbers)


MODELS = {
    "dense": (Net, net, {name: ("io", shape) for name, shape in SHAPES.items()}, random_array(5, 12, seed=9)),
    "conv": (Conv, conv, {"layer": ("iiio", (3, 2, 6, 8))}, random_array(2, 6, 9, 7, seed=9)),
}


def lora_jax_case(name):
    """The parameters and an adapter with nonzero arrays."""
    kernels = MODELS[name][2]
    params = {
        path: jnp.asarray(random_array(*shape, seed=seed)) for seed, (path, (_, shape)) in enumerate(kernels.items())
    }
    spec = {path: lj.AdaLoRA(rank=RANK, alpha=ALPHA, axes=axes) for path, (axes, _) in kernels.items()}
    shapes = jax.eval_shape(lambda: lj.init(jax.random.key(0), params, spec))
    leaves, treedef = jax.tree.flatten(shapes)
    return params, treedef.unflatten([jnp.asarray(random_array(*x.shape, seed=20 + at)) for at, x in enumerate(leaves)])


def as_peft(part):
    """The arrays in PEFT's shapes, by PEFT's names."""
    order = (3, 2, 0, 1) if part.axes == "iiio" else (1, 0)
    a = np.asarray(part.a).transpose(order).reshape(RANK, -1)
    return {"lora_A": a, "lora_E": np.asarray(part.e)[:, None], "lora_B": np.asarray(part.b).T}


def arrays(layer):
    return {name: getattr(layer, name)["default"] for name in ("lora_A", "lora_E", "lora_B")}


def peft_case(name, adapter, **options):
    """PEFT's model with the same values, and the layers by path."""
    config = peft.AdaLoraConfig(
        init_r=RANK, lora_alpha=ALPHA, target_modules=list(adapter), **{"target_r": 1, "total_step": 100} | options
    )
    model = peft.get_peft_model(MODELS[name][0](), config)
    layers = {path: getattr(model.base_model.model, path) for path in adapter}
    for path, layer in layers.items():
        for name, array in as_peft(adapter[path]).items():
            arrays(layer)[name].data = torch.from_numpy(array.copy())
    return model, layers


def near(got, expected, tolerance=2e-5):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# Layers


@pytest.mark.parametrize("name", MODELS)
def test_result_and_gradients_match_peft(name):
    (params, adapter), (_, call, _, x) = lora_jax_case(name), MODELS[name]
    model, layers = peft_case(name, adapter)
    expected = model(torch.from_numpy(x))
    near(lj.lora(call)(params, adapter, x), expected.detach().numpy())
    torch.sum(torch.sin(expected)).backward()
    gradient = jax.grad(lambda ad: jnp.sum(jnp.sin(lj.lora(call)(params, ad, x))))(adapter)
    for path, layer in layers.items():
        for name, array in as_peft(gradient[path]).items():
            near(array, arrays(layer)[name].grad.numpy())


@pytest.mark.parametrize("name", MODELS)
def test_merged_weights_match_peft(name):
    params, adapter = lora_jax_case(name)
    model, _ = peft_case(name, adapter)
    merged = model.merge_and_unload()
    for path, kernel in lj.merge(params, adapter).items():
        weight = getattr(merged, path).weight.detach().numpy()
        near(kernel, weight.transpose((2, 3, 1, 0) if weight.ndim == 4 else (1, 0)))


def test_the_only_difference_from_peft_is_the_offset_of_the_rank():
    _, adapter = lora_jax_case("dense")
    _, layers = peft_case("dense", adapter)
    delta = layers["first"].double().get_delta_weight("default").detach().numpy().T
    part = adapter["first"]
    a, e, b = (np.asarray(x, np.float64) for x in (part.a, part.e, part.b))
    near(delta, part.variant.scale * (a * e) @ b * RANK / (RANK + 1e-5), 1e-9)


def test_initialization_matches_peft():
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(800, 600)), peft.AdaLoraConfig(init_r=12, target_modules=["0"], total_step=9)
    )
    expected = arrays(model.base_model.model[0])
    part = lj.init(jax.random.key(0), {"w": jnp.ones((800, 600))}, {"w": lj.AdaLoRA(rank=12, alpha=8)})["w"]
    for array, other in ((part.a, expected["lora_A"]), (part.b, expected["lora_B"])):
        assert float(array.std()) == pytest.approx(float(other.detach().std()), rel=0.05)
    assert not part.e.any() and not expected["lora_E"].any()


# Files


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor.s. have invalid shape")  # a layer of rank 0
@pytest.mark.parametrize(("name", "budget"), [("dense", None), ("dense", 5), ("dense", 1), ("conv", None), ("conv", 3)])
def test_a_file_of_peft_loads_with_equal_results(name, budget, tmp_path):
    (params, adapter), (_, call, _, x) = lora_jax_case(name), MODELS[name]
    model, layers = peft_case(name, adapter)
    if budget is not None:
        allocator = model.base_model.rankallocator
        set_gradients(layers, slope(adapter, 1))
        allocator.update_ipt(model.base_model.model)
        model.peft_config["default"].rank_pattern = allocator.mask_to_budget(model.base_model.model, budget)
    model.save_pretrained(tmp_path)
    mapping = {path: lj.peft.conv(path) if name == "conv" else lj.peft.linear(path) for path in params}
    back = lj.peft.load(tmp_path, mapping, params)
    assert sum(part.variant.rank for part in back.values()) == (budget or RANK * len(params))
    assert {type(part.variant) for part in back.values()} == {lj.AdaLoRA}
    near(lj.lora(call)(params, back, x), model(torch.from_numpy(x)).detach().numpy())


# The budget


@pytest.mark.parametrize(
    ("rank", "end", "warmup", "settle", "total"),
    [(12, 4, 5, 10, 100), (8, 7, 0, 0, 40), (64, 1, 17, 23, 333), (3, 1, 1, 1, 3), (12, 3, 2, 3, 11)],
)
def test_the_budget_matches_peft_except_for_rounding_of_integers(rank, end, warmup, settle, total):
    config = peft.AdaLoraConfig(
        init_r=rank, target_r=end, tinit=warmup, tfinal=settle, total_step=total, target_modules=list(SHAPES)
    )
    allocator = peft.get_peft_model(Net(), config).base_model.rankallocator
    schedule = {
        "start": allocator.init_bgt,
        "end": allocator.target_bgt,
        "warmup": warmup,
        "settle": settle,
        "total": total,
    }
    assert (schedule["start"], schedule["end"]) == (2 * rank, 2 * end)
    steps = range(total + 3)
    got = adaptive.budget(np.arange(len(steps)), **schedule).tolist()
    for step, mine in zip(steps, got, strict=True):
        budget, _ = allocator.budget_schedule(step)
        remains = 1 - Fraction(step - warmup, total - settle - warmup)
        if (2 * (rank - end) * remains**3).denominator == 1:
            assert 0 <= mine - budget <= 1
        else:
            assert mine == budget


# Importance, masks


def slope(adapter, step):
    leaves, treedef = jax.tree.flatten(adapter)
    return treedef.unflatten([jnp.asarray(random_array(*x.shape, seed=100 * step + at)) for at, x in enumerate(leaves)])


def set_gradients(layers, gradient):
    for path, layer in layers.items():
        for name, array in as_peft(gradient[path]).items():
            arrays(layer)[name].grad = torch.from_numpy(array.copy())


def test_importance_and_masks_match_peft_after_some_steps():
    _, adapter = lora_jax_case("dense")
    model, layers = peft_case("dense", adapter)
    allocator = model.base_model.rankallocator
    importance = adaptive.unmeasured(adapter)
    for step in range(1, 6):
        gradient = slope(adapter, step)
        set_gradients(layers, gradient)
        allocator.update_ipt(model.base_model.model)
        importance = adaptive.measure(importance, gradient, adapter)
    measured = zip(importance, (allocator.exp_avg_ipt, allocator.exp_avg_unc), strict=True)
    for mean, expected in measured:
        for path, part in mean.items():
            for name, array in as_peft(part).items():
                near(array, expected[f"{path}.{name}.default"].numpy())
    for budget in (7, 5, 2, 1):
        pattern = allocator.mask_to_budget(model.base_model.model, budget)
        kept = adaptive.keep(adaptive.scores(importance), budget)
        pruned = adaptive.prune(adapter, kept)
        for path, layer in layers.items():
            assert kept[path].tolist() == pattern[f"{path}.lora_E.default"]
            near(pruned[path].e, arrays(layer)["lora_E"].detach().numpy().ravel())


def test_with_equal_scores_peft_keeps_none_and_lora_jax_the_budget():
    _, adapter = lora_jax_case("dense")
    model, layers = peft_case("dense", adapter)
    importance = adaptive.unmeasured(adapter)
    set_gradients(layers, jax.tree.map(jnp.zeros_like, adapter))
    allocator = model.base_model.rankallocator
    allocator.update_ipt(model.base_model.model)
    pattern = allocator.mask_to_budget(model.base_model.model, 3)
    assert sum(map(sum, pattern.values())) == 0
    assert sum(int(mask.sum()) for mask in adaptive.keep(adaptive.scores(importance), 3).values()) == 3


def test_training_matches_peft_s_allocator():
    """Uses PEFT's functions in the order of the paper: importance at the gradient, then the step, then the masks."""
    params, adapter = lora_jax_case("dense")
    options = {"tinit": SCHEDULE["warmup"], "tfinal": SCHEDULE["settle"], "total_step": SCHEDULE["total"], "deltaT": 2}
    model, layers = peft_case("dense", adapter, **options)
    allocator, inner = model.base_model.rankallocator, model.base_model.model
    allocator.target_bgt = SCHEDULE["end"]
    sgd = torch.optim.SGD([x for layer in layers.values() for x in arrays(layer).values()], lr=0.3)
    tx = adaptive.ada_lora(optax.sgd(0.3), **SCHEDULE, interval=2)
    state, update = tx.init(adapter), jax.jit(tx.update)
    last, pattern = SCHEDULE["total"] - SCHEDULE["settle"], None
    for step in range(1, 15):
        gradient = slope(adapter, step)
        updates, state = update(gradient, state, adapter)
        adapter = optax.apply_updates(adapter, updates)
        set_gradients(layers, gradient)
        allocator.update_ipt(inner)
        sgd.step()
        budget, masks = allocator.budget_schedule(step)
        if step > last:
            allocator.mask_using_rank_pattern(inner, pattern)
        elif masks or step == last:
            pattern = allocator.mask_to_budget(inner, budget)
        for path, layer in layers.items():
            for name, array in as_peft(adapter[path]).items():
                other = arrays(layer)[name].detach().numpy()
                near(array, other)
                assert name != "lora_E" or ((array == 0) == (other == 0)).all(), step
    small = adaptive.compact(adapter)
    assert sum(part.variant.rank for part in small.values()) == SCHEDULE["end"]
    x = MODELS["dense"][3]
    near(lj.lora(net)(params, small, x), model(torch.from_numpy(x)).detach().numpy())


# Orthogonality


def test_orthogonality_sums_the_squares_of_the_norms_that_peft_averages():
    _, adapter = lora_jax_case("dense")

    class WithLoss(Net):
        def forward(self, x):
            return types.SimpleNamespace(loss=super().forward(x).sum() * 0)

    model, _ = peft_case("dense", adapter, orth_reg_weight=0.5)
    factors = [
        x for layer in (model.base_model.model.first, model.base_model.model.second) for x in arrays(layer).values()
    ]
    model.base_model.model.__class__ = WithLoss
    penalty = float(model.base_model(torch.from_numpy(MODELS["dense"][3])).loss.detach())
    grams = [
        x @ x.T if x.shape[0] == RANK else x.T @ x for x in (y.detach().numpy() for y in factors) if 1 not in x.shape
    ]
    norms = [np.linalg.norm(gram - np.eye(RANK)) for gram in grams]
    assert len(norms) == 4
    assert penalty == pytest.approx(0.5 * sum(norms) / 4, rel=1e-5)
    assert float(adaptive.orthogonality(adapter)) == pytest.approx(sum(norm**2 for norm in norms), rel=1e-5)
