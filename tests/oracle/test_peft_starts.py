"""Compares the initializations with PEFT on the same weights; `make test-oracle`.

Random values of torch's generator and the scaling of LoRA-GA, where PEFT differs from the authors' code, are excluded.
"""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.config import EvaConfig
from safetensors.numpy import load_file
from torch import nn

import lora_jax as lj
from lora_jax import starts

D_IN, D_HIDDEN, D_OUT, RANK, ALPHA = 24, 20, 16, 4, 6
NAMES = {"first": (D_IN, D_HIDDEN), "second": (D_HIDDEN, D_OUT)}
VARIANTS = {False: lj.LoRA(rank=RANK, alpha=ALPHA), True: lj.RSLoRA(rank=RANK, alpha=ALPHA)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(D_IN, D_HIDDEN), nn.Linear(D_HIDDEN, D_OUT)
        rng = np.random.default_rng(0)
        for name, shape in NAMES.items():
            layer, kernel = getattr(self, name), rng.standard_normal(shape).astype(np.float32) / 4
            layer.weight.data, layer.bias.data = torch.from_numpy(kernel.T.copy()), torch.zeros(shape[1])

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def params():
    net = Net()
    return {
        name: {"kernel": jnp.asarray(layer.weight.detach().numpy().T), "bias": jnp.asarray(layer.bias.detach().numpy())}
        for name, layer in net.named_children()
    }


def apply(params, x):
    first, second = params["first"], params["second"]
    return jnp.tanh(x @ first["kernel"] + first["bias"]) @ second["kernel"] + second["bias"]


def adapter(params, rslora=False):
    return lj.init(jax.random.key(0), params, {"**/kernel": VARIANTS[rslora]})


def config(start, rslora=False, **options):
    return peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(NAMES), init_lora_weights=start, use_rslora=rslora, **options
    )


def peft_kernels(model, name):
    """PEFT's A, B and base, transposed to kernels."""
    layer = getattr(model.base_model.model, name)
    arrays = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight
    return [array.detach().numpy().T for array in arrays]


def assert_near(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_factors_and_residual_match_peft(start, rslora):
    base = params()
    model = peft.get_peft_model(Net(), config(start, rslora))
    moved, new = getattr(starts, start)(base, adapter(base, rslora))
    for name in NAMES:
        a, b, residue = peft_kernels(model, name)
        part = new[f"{name}/kernel"]
        assert_near(part.a @ part.b, a @ b)
        assert_near(np.abs(part.a), np.abs(a), 1e-4)  # equal up to the sign of each direction
        assert_near(np.abs(part.b), np.abs(b), 1e-4)
        assert_near(moved[name]["kernel"], residue)


@pytest.mark.filterwarnings("ignore:.*changes the base weights")  # PEFT warns when a second adapter is loaded
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_as_plain_matches_the_adapter_that_peft_saves(start, rslora, tmp_path):
    base = params()
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), config(start, rslora))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    began = getattr(starts, start)(base, adapter(base, rslora))
    after = {}
    for number, name in enumerate(NAMES):  # PEFT's signs for both, then the same training
        rng = np.random.default_rng(number)
        a, b, _ = (array.copy() for array in peft_kernels(model, name))
        a += 0.1 * rng.standard_normal(a.shape).astype(np.float32)
        b += 0.1 * rng.standard_normal(b.shape).astype(np.float32)
        layer = getattr(model.base_model.model, name)
        layer.lora_A["default"].weight.data = torch.from_numpy(a.T.copy())
        layer.lora_B["default"].weight.data = torch.from_numpy(b.T.copy())
        after[f"{name}/kernel"] = lj.Adapter(VARIANTS[rslora], "io", a=jnp.asarray(a), b=jnp.asarray(b))
    model.peft_config["default"].init_lora_weights = start
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    saved = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    plain = starts.as_plain(base, after, *began)
    saved_config = peft.PeftConfig.from_pretrained(tmp_path / "plain")
    for name in NAMES:
        a, b = (saved[f"base_model.model.{name}.lora_{factor}.weight"].T for factor in "AB")
        part = plain[f"{name}/kernel"]
        assert part.a.shape == a.shape and part.b.shape == b.shape
        assert part.variant.rank == saved_config.r
        assert part.variant.alpha == pytest.approx(saved_config.lora_alpha)
        assert_near(part.a @ part.b, a @ b, 1e-4)


def batch():
    """A batch with distinct variances, for distinct leading directions, and a nonzero mean."""
    rng = np.random.default_rng(1)
    return (rng.standard_normal((128, D_IN)) * np.geomspace(8, 0.0001, D_IN) + 0.5).astype(np.float32)


def test_eva_finds_the_same_directions_and_ranks_as_peft():
    base = params()
    torch.manual_seed(0)
    eva_config = EvaConfig(rho=2.0, use_label_mask=False)
    model = peft.get_peft_model(Net(), config("eva", eva_config=eva_config), low_cpu_mem_usage=True)
    options = dict.fromkeys(["prepare_model_inputs_fn", "prepare_layer_inputs_fn"])  # use every row
    loader = [{"x": torch.from_numpy(batch())}]
    peft.initialize_lora_eva_weights(model, loader, show_progress_bar=False, **options)
    fresh = adapter(base)
    seen = starts.activations(apply, base, fresh, jnp.asarray(batch()))
    _, new = starts.eva(base, fresh, seen, rho=2)
    for name in NAMES:
        a, b, _ = peft_kernels(model, name)
        part = new[f"{name}/kernel"]
        layer = getattr(model.base_model.model, name)
        assert part.variant.rank == a.shape[1]
        assert part.variant.scale == pytest.approx(layer.scaling["default"])
        assert not b.any()
        cosines = np.abs(np.sum(np.asarray(part.a) * a, 0))
        assert cosines.min() > 0.99, cosines  # PEFT's decomposition is randomized and stops at 0.99
    assert {part.variant.rank for part in new.values()} != {RANK}, new  # ranks are redistributed


def test_lora_ga_has_the_directions_of_peft_with_another_scaling():
    base, x = params(), batch()

    def train_step():
        loss = (net(torch.from_numpy(x).requires_grad_()) ** 2).sum()
        loss.backward()

    net = Net()
    lora_config = config("lora_ga", lora_ga_config=peft.LoraGAConfig())
    peft.tuners.lora.preprocess_loraga(net, lora_config, train_step)
    model = peft.get_peft_model(net, lora_config)
    gradient = starts.gradients(lambda params, x: (apply(params, x) ** 2).sum(), base, adapter(base), jnp.asarray(x))
    _, new = starts.lora_ga(base, adapter(base), gradient)
    for name, (_, d_out) in NAMES.items():
        a, b, _ = peft_kernels(model, name)
        part = new[f"{name}/kernel"]
        for got, expected in ((np.asarray(part.a), a), (np.asarray(part.b).T, b.T)):
            cosines = np.abs((got * expected).sum(0)) / (np.linalg.norm(got, axis=0) * np.linalg.norm(expected, axis=0))
            assert cosines.min() > 0.999, cosines
        c = d_out**0.25 / 4
        assert_near(np.linalg.norm(part.a, axis=0), np.full(RANK, c))
        assert_near(np.linalg.norm(part.b, axis=1), np.full(RANK, c))
        assert_near(np.linalg.norm(a, axis=0), np.ones(RANK))  # PEFT does not scale A
        assert np.ptp(np.linalg.norm(b, axis=1)) > 0.01  # PEFT scales the rows of B differently


def test_random_factors_have_the_variance_of_peft():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(2000, 40)

    torch.manual_seed(0)
    base = {"first": {"kernel": jnp.zeros((2000, 40))}}
    fresh = adapter(base)
    for start, function in (("gaussian", starts.gaussian), (True, starts.kaiming), ("orthogonal", starts.orthogonal)):
        options = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["first"], init_lora_weights=start)
        a, b, _ = peft_kernels(peft.get_peft_model(Wide(), options), "first")
        part = function(jax.random.key(0), base, fresh).adapter["first/kernel"]
        assert float(part.a.std()) == pytest.approx(a.std(), rel=0.1)
        assert float(part.b.std()) == pytest.approx(b.std(), rel=0.3)
        assert np.abs(part.a @ part.b).max() < 1e-6 and np.abs(a @ b).max() < 1e-6
