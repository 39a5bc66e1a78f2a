"""Compares combinations of adapters, and reduced intruders, with PEFT; `make test-oracle`."""

import dataclasses

import jax
import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import nn

import lora_jax as lj
from lora_jax import many

D_IN, D_OUT = 12, 10
RANKS, ALPHAS = (3, 3, 3), (6, 1.5, 4)


def random_array(*shape, seed):
    return (np.random.default_rng(seed).standard_normal(shape) / 3).astype(np.float32)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D_IN, D_OUT, bias=False)
        self.layer.weight.data = torch.from_numpy(random_array(D_IN, D_OUT, seed=0).T.copy())

    def forward(self, x):
        return self.layer(x)


def adapters_of_both(ranks=RANKS, rank_stabilized=False):
    """Adapters of one layer, here and in PEFT."""
    variant = lj.RSLoRA if rank_stabilized else lj.LoRA
    ours, model = {}, None
    for at, (rank, alpha) in enumerate(zip(ranks, ALPHAS, strict=True)):
        name = f"ad{at}"
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"], use_rslora=rank_stabilized)
        if model is None:
            model = peft.get_peft_model(Dense(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        a, b = random_array(D_IN, rank, seed=10 + at), random_array(rank, D_OUT, seed=20 + at)
        layer = model.base_model.model.layer
        layer.lora_A[name].weight.data = torch.from_numpy(a.T.copy())
        layer.lora_B[name].weight.data = torch.from_numpy(b.T.copy())
        ours[name] = {"layer": lj.Adapter(variant(rank=rank, alpha=alpha), "io", a=a, b=b)}
    return ours, model


def update_of_peft(model, name):
    return model.base_model.model.layer.get_delta_weight(name).detach().numpy().T


def update_of(adapter):
    return np.asarray(lj.merge({"layer": np.zeros((D_IN, D_OUT), np.float32)}, adapter)["layer"])


def near(got, expected, tolerance=2e-5):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


CASES = {
    "cat": ("concat", {}),
    "linear": ("linear", {}),
    "svd": (many.Truncate(rank=4), {"svd_rank": 4}),
    "ties": (many.Ties(density=0.4, on="factors"), {"density": 0.4}),
    "ties_svd": (many.Ties(density=0.4, rank=4), {"density": 0.4, "svd_rank": 4}),
    "magnitude_prune": (many.Prune(density=0.4, on="factors"), {"density": 0.4}),
    "magnitude_prune_svd": (many.Prune(density=0.4, rank=5), {"density": 0.4, "svd_rank": 5}),
    # With a density of 1 nothing is random.
    "dare_linear": (many.Dare(density=1, on="factors"), {"density": 0.9999999999}),
    "dare_linear_svd": (many.Dare(density=1, rank=4), {"density": 0.9999999999, "svd_rank": 4}),
    "dare_ties": (many.Dare(density=1, on="factors", sign="total"), {"density": 0.9999999999}),
    "dare_ties_svd": (many.Dare(density=1, rank=4, sign="total"), {"density": 0.9999999999, "svd_rank": 4}),
}
SIGNED = ["cat", "linear", "svd", "magnitude_prune", "magnitude_prune_svd", "dare_linear", "dare_linear_svd"]


def combined(name, weights, how, options, **fields):
    ours, model = adapters_of_both(**fields)
    key = {"key": jax.random.key(0)} if name.startswith("dare") else {}
    found = many.combine({ad: (ours[ad], weight) for ad, weight in zip(ours, weights, strict=True)}, how, **key)
    model.add_weighted_adapter(list(ours), list(weights), "both", combination_type=name, **options)
    return update_of(found), update_of_peft(model, "both")


@pytest.mark.parametrize("name", CASES)
def test_combinations_match_peft(name):
    near(*combined(name, (1.0, 0.5, 0.25), *CASES[name]))


@pytest.mark.parametrize("name", SIGNED)
def test_negative_weights_match_peft(name):
    near(*combined(name, (1.0, -0.5, 0.25), *CASES[name]))


@pytest.mark.parametrize("name", ["ties", "ties_svd", "dare_ties", "dare_ties_svd"])
def test_signs_by_count_match_peft(name):
    how, options = CASES[name]
    near(
        *combined(
            name,
            (1.0, 0.5, 0.25),
            dataclasses.replace(how, sign="frequency"),
            options | {"majority_sign_method": "frequency"},
        )
    )


@pytest.mark.parametrize("name", ["cat", "svd"])
def test_unequal_ranks_match_peft(name):
    near(*combined(name, (1.0, -0.5, 0.25), *CASES[name], ranks=(1, 2, 4)))


@pytest.mark.parametrize("name", ["cat", "linear", "svd"])
def test_peft_scales_combinations_of_rslora_wrongly(name):
    how, options = CASES[name]
    ours, theirs = combined(name, (1.0, -0.5, 0.25), how, options, rank_stabilized=True)
    adapters, _ = adapters_of_both(rank_stabilized=True)
    if name != "linear":
        expected = sum(weight * update_of(ad) for ad, weight in zip(adapters.values(), (1, -0.5, 0.25), strict=True))
        u, s, vt = np.linalg.svd(expected, full_matrices=False)
        rank = 9 if name == "cat" else 4
        near(ours, (u[:, :rank] * s[:rank]) @ vt[:rank])
    rank = {"cat": 9, "linear": 3, "svd": 4}[name]
    near(theirs, np.sqrt(rank) * ours)  # its new adapter has α = r, and rsLoRA's scale α/√r


@pytest.mark.parametrize("scale", [0.75, 0.25])
def test_reduced_intruders_match_peft(scale):
    ours, model = adapters_of_both()
    params = {"layer": random_array(D_IN, D_OUT, seed=0)}
    assert lj.analysis.intruders(params, ours["ad0"], top=3, threshold=0.8)["layer"].intruder.any()
    reduced, residual = lj.analysis.reduce_intruders(params, ours["ad0"], scale=scale, top=3, threshold=0.8)
    reduce_intruder_dimension(
        model, "ad0", "reduced", top_k=3, threshold_epsilon=0.8, mitigation_lambda=scale, logging_sink=None
    )
    near(update_of(reduced), update_of_peft(model, "reduced"), 1e-4)
    assert 0 < residual["layer"] < 1
