"""Compares the initializations with PEFT on the same weights; `make test-oracle`.

Random values of torch's generator are excluded. The scaling of LoRA-GA, where PEFT differs from the authors' code, and
the size of CorDA's factors, which in PEFT depends on the number of tokens, are compared up to these differences.
"""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.config import EvaConfig
from peft.tuners.lora.corda import preprocess_corda
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


def peft_eva(batches, **options):
    """PEFT's model after EVA, with every row, or those that are not masked if a batch has labels."""
    torch.manual_seed(0)
    model = peft.get_peft_model(MaskedNet(), config("eva", eva_config=EvaConfig(**options)), low_cpu_mem_usage=True)
    functions = {} if "labels" in batches[0] else dict.fromkeys(["prepare_model_inputs_fn", "prepare_layer_inputs_fn"])
    peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False, **functions)
    return model


class MaskedNet(Net):
    def forward(self, input_ids, attention_mask=None, labels=None):
        return super().forward(input_ids)


@pytest.mark.parametrize("keep_scale", [True, False])
def test_eva_finds_the_same_directions_and_ranks_as_peft(keep_scale):
    base, fresh = params(), adapter(params())
    model = peft_eva([{"input_ids": torch.from_numpy(batch())}], rho=2.0, adjust_scaling_factors=keep_scale)
    seen = starts.activations(apply, base, fresh, jnp.asarray(batch()))
    _, new = starts.eva(base, fresh, seen, rho=2, keep_scale=keep_scale)
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
    assert {part.variant.alpha for part in new.values()} != {ALPHA} or not keep_scale


def test_whitened_directions_of_eva_have_the_size_of_peft():
    base, fresh = params(), adapter(params())
    model = peft_eva([{"input_ids": torch.from_numpy(batch())}], rho=1.0, whiten=True)
    seen = starts.activations(apply, base, fresh, jnp.asarray(batch()))
    twice = jax.tree.map(jnp.add, seen, seen)  # PEFT sees a batch again to find out that it converged
    _, new = starts.eva(base, fresh, twice, whiten=True)
    for name in NAMES:
        a, _, _ = peft_kernels(model, name)
        got = np.linalg.norm(new[f"{name}/kernel"].a, axis=0)
        np.testing.assert_allclose(got, np.linalg.norm(a, axis=0), rtol=1e-3)


def test_token_weights_count_the_tokens_that_peft_counts():
    x = batch().reshape(8, 16, D_IN)
    x[:, ::3] = x[:, ::3, ::-1]  # other directions, which are masked
    labels = np.full((8, 16), 1)
    labels[:, ::3] = -100
    attention_mask = np.ones((8, 16), int)
    attention_mask[5:, 10:] = 0
    arrays = {"input_ids": x, "labels": labels, "attention_mask": attention_mask}
    model = peft_eva([{name: torch.from_numpy(array) for name, array in arrays.items()}], rho=1.0)
    base, fresh = params(), adapter(params())
    counted = (labels != -100) & (attention_mask == 1)
    seen, every = (
        starts.activations(apply, base, fresh, jnp.asarray(x), token_weights=weights) for weights in (counted, None)
    )
    for name in NAMES:
        a, _, _ = peft_kernels(model, name)
        masked, whole = (starts.eva(base, fresh, sums).adapter[f"{name}/kernel"].a for sums in (seen, every))
        assert seen[f"{name}/kernel"].count[0] == counted.sum()
        assert np.abs(np.sum(np.asarray(masked) * a, 0)).min() > 0.99
        assert np.abs(np.sum(np.asarray(whole) * a, 0)).min() < 0.9


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_matches_peft_up_to_a_number_per_kernel(mode, rslora):
    base, fresh, x = params(), adapter(params(), rslora), batch()
    net = Net()
    lora_config = config("corda", rslora, corda_config=peft.tuners.lora.config.CordaConfig(corda_method=mode))
    preprocess_corda(net, lora_config, lambda: net(torch.from_numpy(x)))
    model = peft.get_peft_model(net, lora_config)
    moved, new = starts.corda(base, fresh, starts.activations(apply, base, fresh, jnp.asarray(x)), mode=mode)
    for name in NAMES:
        a, b, residue = peft_kernels(model, name)
        part = new[f"{name}/kernel"]
        assert_near(part.a @ part.b, a @ b, 1e-3)
        assert_near(moved[name]["kernel"], residue, 1e-4)
        c = np.linalg.norm(a) / np.linalg.norm(part.a)
        assert_near(np.abs(part.a) * c, np.abs(a), 1e-2)
        assert_near(np.abs(part.b) / c, np.abs(b), 1e-2)


def test_mica_matches_peft():
    base = params()
    model = peft.get_peft_model(Net(), config("mica"))
    same, new = starts.mica(base, adapter(base))
    assert same is base
    trained = {name for name, leaf in model.named_parameters() if leaf.requires_grad}
    assert trained == {
        f"base_model.model.{name}.lora_A.default.weight" for name in NAMES
    }  # as with `optim.select("b")`
    for name in NAMES:
        a, b, _ = peft_kernels(model, name)
        part = new[f"{name}/kernel"]
        assert not a.any() and not part.a.any()
        assert_near(np.abs(part.b), np.abs(b), 1e-4)


# What PEFT multiplies each factor with, of the unit singular vectors, beside the singular values of the gradient in B.
PEFT_SCALES = {
    "stable": lambda s, d_out, w, g: (1, d_out**0.25 / 4),
    "unit": lambda s, d_out, w, g: (1, 1),
    "gd": lambda s, d_out, w, g: (1 / s, 1 / s),
    "weight_svd": lambda s, d_out, w, g: (1, np.linalg.svd(w)[1][0] / g[0]),
}


@pytest.mark.parametrize("scale", PEFT_SCALES)
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga_has_the_directions_of_peft_with_another_scaling(direction, scale):
    base, x = params(), batch()

    def train_step():
        loss = (net(torch.from_numpy(x).requires_grad_()) ** 2).sum()
        loss.backward()

    net = Net()
    ga = peft.LoraGAConfig(direction=direction, scale={"gd": "gd_scale"}.get(scale, scale))
    lora_config = config("lora_ga", lora_ga_config=ga)
    peft.tuners.lora.preprocess_loraga(net, lora_config, train_step)
    model = peft.get_peft_model(net, lora_config)
    gradient = starts.gradients(lambda params, x: (apply(params, x) ** 2).sum(), base, adapter(base), jnp.asarray(x))
    _, new = starts.lora_ga(base, adapter(base), gradient, direction=direction, scale=scale)
    for name, (_, d_out) in NAMES.items():
        a, b, _ = peft_kernels(model, name)
        part = new[f"{name}/kernel"]
        for got, expected in ((np.asarray(part.a), a), (np.asarray(part.b).T, b.T)):
            cosines = np.abs((got * expected).sum(0)) / (np.linalg.norm(got, axis=0) * np.linalg.norm(expected, axis=0))
            assert cosines.min() > 0.999, cosines
        w, singular = base[name]["kernel"], np.linalg.svd(gradient[f"{name}/kernel"])[1]
        of_b = {"ArB2r": slice(RANK, 2 * RANK), "A2rBr": slice(RANK), "ArBr": slice(0, 2 * RANK, 2)}[direction]
        singular = singular[of_b]
        size_a, size_b = PEFT_SCALES[scale](part.variant.scale, d_out, w, singular)
        assert_near(np.linalg.norm(a, axis=0), np.full(RANK, size_a), 1e-4)
        assert_near(np.linalg.norm(b, axis=1), size_b * singular, 1e-2)  # of a randomized decomposition
        largest = np.linalg.svd(w)[1][:RANK]
        c = {
            "stable": d_out**0.25 / 4,
            "unit": 1,
            "gd": 1 / part.variant.scale,
            "weight_svd": np.sqrt(largest / part.variant.scale).mean(),
        }[scale]
        for size in (np.linalg.norm(part.a, axis=0), np.linalg.norm(part.b, axis=1)):
            assert_near(size, np.full(RANK, c))


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
