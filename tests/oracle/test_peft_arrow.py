"""Compares mixtures by Arrow, with and without GenKnowSub, with PEFT's; `make test-oracle`."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.arrow import create_arrow_model
from torch import nn

import lora_jax as lj

RANK, IN, HIDDEN, OUT = 4, 12, 16, 10
ALPHAS = (6, 2, 9)  # the scales of the experts differ


def random_array(*shape, seed):
    return (np.random.default_rng(seed).standard_normal(shape) / 3).astype(np.float32)


KERNELS = {"up": random_array(IN, HIDDEN, seed=0), "down": random_array(HIDDEN, OUT, seed=1)}
X = random_array(3, 7, IN, seed=2) * 3


class Net(nn.Module):
    """Two layers; PEFT's `create_arrow_model` needs a `config`."""

    def __init__(self):
        super().__init__()
        self.config = {"model_type": "net"}
        self.up, self.down = nn.Linear(IN, HIDDEN, bias=False), nn.Linear(HIDDEN, OUT, bias=False)
        for name, kernel in KERNELS.items():
            getattr(self, name).weight.data = torch.from_numpy(kernel.T.copy())

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def net(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def adapter(seed, alpha):
    """Factors whose first singular value is well above the second, so that PEFT's 15 power iterations converge."""
    found = lj.init(jax.random.key(0), KERNELS, {"*": lj.LoRA(rank=RANK, alpha=alpha)})
    spectrum = np.array([4, 1, 0.5, 0.25], np.float32)
    for at, part in enumerate(found.values()):
        part.arrays["a"] = jnp.asarray(random_array(*part.a.shape, seed=seed + at) * spectrum)
        part.arrays["b"] = jnp.asarray(random_array(*part.b.shape, seed=seed + 10 + at))
    return found


def save_with_peft(found, folder):
    config = peft.LoraConfig(r=RANK, lora_alpha=next(iter(found.values())).variant.alpha, target_modules=["up", "down"])
    model = peft.get_peft_model(Net(), config)
    for name, part in found.items():
        layer = getattr(model.base_model.model, name)
        layer.lora_A["default"].weight.data = torch.from_numpy(np.array(part.a).T.copy())
        layer.lora_B["default"].weight.data = torch.from_numpy(np.array(part.b).T.copy())
    model.save_pretrained(folder)
    return str(folder)


def arrow_of_peft(folder, experts, general=(), **options):
    paths = [save_with_peft(found, folder / f"expert{at}") for at, found in enumerate(experts)]
    general_paths = [save_with_peft(found, folder / f"general{at}") for at, found in enumerate(general)]
    config = peft.ArrowConfig(use_gks=bool(general), rng_seed=0, **options)
    model = create_arrow_model(Net(), paths, config, general_adapter_paths=general_paths)
    with torch.no_grad():
        return model.eval()(torch.from_numpy(X)).numpy()


def near(got, expected, tolerance=5e-5):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


EXPERTS = [adapter(100 * (1 + at), alpha) for at, alpha in enumerate(ALPHAS)]


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 1.0), (3, 0.5)])
def test_arrow_matches_peft(top_k, temperature, tmp_path):
    expected = arrow_of_peft(tmp_path, EXPERTS, top_k=top_k, router_temperature=temperature)
    names = {f"task_{at}": found for at, found in enumerate(EXPERTS)}
    mixed = lj.many.mixture(names, lj.many.Arrow(top_k=top_k, temperature=temperature))
    near(lj.lora(net)(KERNELS, mixed, X), expected)


def subtract_factors(found, general):
    """What PEFT subtracts: the mean of the factors."""
    return {
        path: lj.Adapter(
            part.variant,
            part.axes,
            **{
                name: array - sum(other[path].arrays[name] for other in general) / len(general)
                for name, array in part.arrays.items()
            },
        )
        for path, part in found.items()
    }


def test_general_knowledge_subtraction_matches_peft_for_the_mean_of_factors(tmp_path):
    """PEFT subtracts factors, so the mixture of such experts is the same; of updates, the next test."""
    general = [adapter(900 + 50 * at, 6) for at in range(2)]
    expected = arrow_of_peft(tmp_path, EXPERTS, general, top_k=2)
    names = {f"task_{at}": subtract_factors(found, general) for at, found in enumerate(EXPERTS)}
    near(lj.lora(net)(KERNELS, lj.many.mixture(names, lj.many.Arrow(top_k=2)), X), expected)


def test_general_knowledge_subtraction_matches_peft_where_it_subtracts_the_update(tmp_path):
    """If general adapter and experts share `A` up to the difference, the products of factors are those of updates.

    With equal `B`, (A_e − A_g)·(B − 0) is the difference of the updates; so PEFT gets a general adapter with `B = 0`
    and an expert that already has the difference, and this library the two that are subtracted.
    """
    base = adapter(100, 4)
    shared_b = {path: part.b for path, part in base.items()}

    def with_b(found, b):
        return {path: lj.Adapter(part.variant, part.axes, a=part.a, b=b[path]) for path, part in found.items()}

    experts = [with_b(adapter(100 * (1 + at), 4), shared_b) for at in range(2)]
    general = with_b(adapter(900, 4), shared_b)
    zero = with_b(general, {path: 0 * b for path, b in shared_b.items()})
    expected = arrow_of_peft(tmp_path, experts, [zero], top_k=2)
    names = {f"task_{at}": found for at, found in enumerate(experts)}
    mixed = lj.many.mixture(names, lj.many.Arrow(top_k=2), general={"general": general})
    near(lj.lora(net)(KERNELS, mixed, X), expected)
