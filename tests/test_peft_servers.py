"""Files for servers, each read as the server reads it; and for kohya and diffusers. `oracle/test_peft_servers.py` runs
diffusers, mlx-lm and vLLM's checks.
"""

import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from helpers import bits
from jax import Array

import lora_jax as lj
from lora_jax import peft

L, D, H, HD, F, V = 2, 8, 2, 4, 6, 10
QUERY = peft.Part("model.layers.{i}.q", interleaved=HD, factor=0.5)
MAPPING = {
    "embed": peft.embedding("model.embed_tokens"),
    "query": peft.linear(QUERY, axes="bioo"),
    "up": peft.linear("model.layers.{i}.up"),
    "out": peft.linear("model.out", axes="iio"),
    "conv": peft.conv("model.conv"),
    "head/kernel": peft.linear("score"),
    "head/bias": peft.vector("score"),
}
SHAPES = {
    "embed": (V, D),
    "query": (L, D, H, HD),
    "up": (L, D, F),
    "out": (H, HD, D),
    "conv": (3, 3, D, F),
    "head/kernel": (D, F),
    "head/bias": (F,),
}
AXES = {"embed": "io", "query": "bioo", "up": "bio", "out": "iio", "conv": "iiio", "head/kernel": "io", "head/bias": ""}


def array(*shape: int, seed: int = 0) -> Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


PARAMS = {path: array(*shape, seed=at) for at, (path, shape) in enumerate(SHAPES.items())}


def made(variants: dict[str, Any]) -> dict[str, lj.Adapter]:
    """An adapter with random arrays, without a compilation."""
    adapter = {}
    for at, (path, variant) in enumerate(variants.items()):
        shapes = variant.shapes(SHAPES[path], AXES[path])
        arrays = {name: array(*shape, seed=10 * at + i) for i, (name, shape) in enumerate(shapes.items())}
        adapter[path] = lj.Adapter(variant, AXES[path] if variant.needs_axes else "", **arrays)
    return adapter


def export(adapter: Any, path: Path, server: str | None, **kwargs: Any) -> dict[str, np.ndarray]:
    """Exports, and returns the tensors of the one file."""
    peft.export(path, adapter, MAPPING, base=PARAMS, for_server=server, **kwargs)
    (file,) = path.glob("*.safetensors")
    return safetensors.numpy.load_file(file)


def config_of(path: Path) -> Any:
    return json.loads((path / "adapter_config.json").read_text())


def merged(adapter: Any) -> dict[str, np.ndarray]:
    """What the dense kernels change by, as torch has its weights; independent of the library's reading of mappings."""
    after = lj.merge(PARAMS, adapter)
    change = {path: np.asarray(after[path] - PARAMS[path]) for path in PARAMS}
    order = [0, 2, 1, 3, 4, 6, 5, 7]  # two heads of size 4: the pairs (0, 1), (2, 3) become (0, 2), (1, 3)
    weights = {"model.embed_tokens": change["embed"], "model.out": change["out"].reshape(H * HD, D).T}
    weights |= {"model.conv": change["conv"].transpose(3, 2, 0, 1), "score": change["head/kernel"].T}
    for i in range(L):
        weights[f"model.layers.{i}.q"] = change["query"][i].reshape(D, -1).T[order] / 0.5
        weights[f"model.layers.{i}.up"] = change["up"][i].T
    return {module: weight for module, weight in weights.items() if weight.any()}


def check(got: dict[str, np.ndarray], adapter: Any) -> None:
    expected = merged(adapter)
    assert set(got) == set(expected)
    for module, weight in expected.items():
        np.testing.assert_allclose(got[module], weight, rtol=1e-4, atol=1e-5)


def product(b: np.ndarray, a: np.ndarray, scale: float) -> np.ndarray:
    return scale * np.einsum("or,r...->o...", b.reshape(b.shape[:2]), a)


UNEQUAL = {
    "query": lj.LoRA(rank=2, alpha=4),
    "up": lj.RSLoRA(rank=3, alpha=2),
    "out": lj.LoRA(rank=1, alpha=4),
    "embed": lj.LoRA(rank=4, alpha=3),
}
EQUAL = {"query": lj.LoRA(rank=2, alpha=4), "up": lj.LoRA(rank=2, alpha=4)}
STABLE = {"query": lj.RSLoRA(rank=4, alpha=4), "up": lj.RSLoRA(rank=2, alpha=4)}
ADAPTERS = {"unequal": UNEQUAL, "equal": EQUAL, "rank-stabilized": STABLE}
each = pytest.mark.parametrize("variants", ADAPTERS.values(), ids=ADAPTERS)


# llama.cpp: the scale is α over the rank of the tensor, or 1 if α is 0; all else of the configuration is ignored


def as_llama(tensors: dict[str, np.ndarray], alpha: float) -> dict[str, np.ndarray]:
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(.*)\.lora_(embedding_)?([AB])(\.weight)?", name)
        assert found and (found[2] is None) == (found[4] is not None)
        pairs.setdefault(found[1], {})[found[3]] = tensor.T if found[2] else tensor
    changes = {}
    for module, pair in pairs.items():
        is_table = "embed" in module
        rank = pair["B"].shape[0] if is_table else pair["B"].shape[1]
        scale = alpha / rank if alpha else 1.0
        changes[module] = scale * (pair["A"] @ pair["B"] if is_table else pair["B"] @ pair["A"])
    return changes


@each
def test_llama_cpp_applies_the_scale_of_each_leaf(variants: Any, tmp_path: Path) -> None:
    adapter = made(variants)
    tensors = export(adapter, tmp_path, "llama.cpp", base_name="some/model")
    config = config_of(tmp_path)
    check(as_llama(tensors, config["lora_alpha"]), adapter)
    assert not config["use_rslora"] and not config["alpha_pattern"]
    assert config["base_model_name_or_path"] == "some/model"
    back = peft.load(tmp_path, MAPPING, PARAMS)  # the files are PEFT's too
    check({module: weight for module, weight in merged(back).items()}, adapter)
    if variants is EQUAL:
        assert bits(back) == bits(adapter)


def test_an_alpha_of_zero_is_not_read_as_one(tmp_path: Path) -> None:
    for at, variants in enumerate([{"out": lj.LoRA(rank=2, alpha=0)}, {"out": lj.LoRA(rank=2, alpha=0)} | EQUAL]):
        tensors = export(made(variants), tmp_path / str(at), "llama.cpp")
        alpha = config_of(tmp_path / str(at))["lora_alpha"]
        assert alpha and not as_llama(tensors, alpha)["model.out"].any()


# diffusers: keys with the component in front; the scale is that of the metadata, or 1


def as_diffusers(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    modules = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    assert {name for name in tensors if "lora_B.weight" in name} == {f"{module}.lora_B.weight" for module in modules}
    return {
        module.removeprefix("unet."): product(tensors[f"{module}.lora_B.weight"], tensors[f"{module}.lora_A.weight"], 1)
        for module in modules
    }


def metadata_of(file: Path) -> Any:
    with safetensors.safe_open(file, "numpy") as opened:
        return json.loads(opened.metadata()["lora_adapter_metadata"])


def test_diffusers_reads_the_scale_of_each_leaf_with_and_without_metadata(tmp_path: Path) -> None:
    variants = {path: variant for path, variant in UNEQUAL.items() if path != "embed"}
    adapter = made(variants | {"conv": lj.LoRA(rank=4, alpha=1)})
    tensors = export(adapter, tmp_path, "diffusers", component="unet")
    check(as_diffusers(tensors), adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert all(name.startswith("unet.model.") or name.startswith("unet.score") for name in tensors)
    metadata = metadata_of(tmp_path / "pytorch_lora_weights.safetensors")
    ranks = {
        f"^{re.escape(module)}": tensors[f"unet.{module}.lora_A.weight"].shape[0] for module in as_diffusers(tensors)
    }
    others = {module: rank for module, rank in ranks.items() if rank != metadata["unet.r"]}
    assert metadata["unet.r"] == metadata["unet.lora_alpha"] and not metadata["unet.use_rslora"]
    assert metadata["unet.rank_pattern"] == metadata["unet.alpha_pattern"] == others
    assert metadata["unet.target_modules"] == sorted(as_diffusers(tensors))


def test_components_may_be_in_the_names_of_modules(tmp_path: Path) -> None:
    mapping = {"a": peft.linear("unet.fc"), "b": peft.linear("text_encoder.fc")}
    params = {"a": array(D, F), "b": array(D, F)}
    adapter = {
        "a": lj.Adapter(lj.LoRA(rank=2, alpha=4), "io", a=array(D, 2), b=array(2, F)),
        "b": lj.Adapter(lj.LoRA(rank=3, alpha=4), "io", a=array(D, 3), b=array(3, F)),
    }
    peft.export(tmp_path, adapter, mapping, base=params, for_server="diffusers")
    tensors = safetensors.numpy.load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "unet.fc.lora_A.weight": (2, D),
        "unet.fc.lora_B.weight": (F, 2),
        "text_encoder.fc.lora_A.weight": (3, D),
        "text_encoder.fc.lora_B.weight": (F, 3),
    }
    np.testing.assert_allclose(tensors["unet.fc.lora_B.weight"], 2 * adapter["a"].b.T, rtol=1e-6)


def test_diffusers_has_magnitudes_and_biases_of_b(tmp_path: Path) -> None:
    adapter = made({"out": lj.DoRA(rank=2, alpha=6), "conv": lj.DoRA(rank=1, alpha=6)})
    tensors = export(adapter, tmp_path / "dora", "diffusers", component="transformer")
    np.testing.assert_array_equal(tensors["transformer.model.out.lora_magnitude_vector"], adapter["out"].magnitude)
    assert tensors["transformer.model.conv.lora_magnitude_vector"].shape == (1, F, 1, 1)
    got = product(tensors["transformer.model.out.lora_B.weight"], tensors["transformer.model.out.lora_A.weight"], 1)
    a, b = np.asarray(adapter["out"].a), np.asarray(adapter["out"].b)
    np.testing.assert_allclose(got, 3 * (a.reshape(-1, 2) @ b).T, rtol=1e-5, atol=1e-6)
    adapter = made({"head/kernel": lj.LoRA(rank=2, alpha=6), "head/bias": lj.LoRABias(scale=3)})
    tensors = export(adapter, tmp_path / "bias", "diffusers", component="unet")
    np.testing.assert_allclose(tensors["unet.score.lora_B.bias"], 3 * adapter["head/bias"].bias, rtol=1e-6)
    assert metadata_of(tmp_path / "bias" / "pytorch_lora_weights.safetensors")["unet.lora_bias"]


# mlx-lm: one rank and one scale, and the axes as here


@each
def test_mlx_lm_reads_one_rank_and_one_scale(variants: Any, tmp_path: Path) -> None:
    adapter = made(variants)
    tensors = export(adapter, tmp_path, "mlx-lm")
    config = config_of(tmp_path)
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == -1
    given = config["lora_parameters"]
    changes = {}
    for module in given["keys"]:
        a, b = tensors.pop(f"{module}.lora_a"), tensors.pop(f"{module}.lora_b")
        assert a.shape[1] == b.shape[0] == given["rank"]
        change = given["scale"] * (a @ b)
        changes[module] = change if "embed" in module else change.T
    assert not tensors and given["dropout"] == 0
    check(changes, adapter)


def test_mlx_lm_has_magnitudes_and_no_tied_head(tmp_path: Path) -> None:
    adapter = made({"out": lj.DoRA(rank=2, alpha=6)})
    tensors = export(adapter, tmp_path / "dora", "mlx-lm")
    np.testing.assert_array_equal(tensors["model.out.m"], adapter["out"].magnitude)
    assert config_of(tmp_path / "dora")["fine_tune_type"] == "dora"
    mapping = {"embed": peft.embedding("model.embed_tokens", head="lm_head")}
    peft.export(tmp_path / "tied", made({"embed": UNEQUAL["embed"]}), mapping, base=PARAMS, for_server="mlx-lm")
    assert config_of(tmp_path / "tied")["lora_parameters"]["keys"] == ["model.embed_tokens"]


# vLLM: PEFT's files, with fewer of its features


@each
def test_vllm_reads_pefts_files(variants: Any, tmp_path: Path) -> None:
    adapter = made(variants)
    assert export(adapter, tmp_path / "a", "vllm").keys() == export(adapter, tmp_path / "b", None).keys()
    assert config_of(tmp_path / "a") == config_of(tmp_path / "b")
    check(merged(peft.load(tmp_path / "a", MAPPING, PARAMS)), adapter)


def test_vllm_has_full_values_of_classifiers_only(tmp_path: Path) -> None:
    adapter = made({"head/bias": lj.Full(), "up": lj.LoRA(rank=2, alpha=4)})
    tensors = export(adapter, tmp_path, "vllm")
    assert tensors["base_model.model.score.weight"].shape == (F, D)
    assert config_of(tmp_path)["modules_to_save"] == ["score"]


# Dtypes


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
@pytest.mark.parametrize("server", ["llama.cpp", "mlx-lm", "diffusers"])
def test_dtypes_are_kept_and_products_rounded_once(dtype: Any, server: str, tmp_path: Path) -> None:
    variants = {"out": lj.LoRA(rank=2, alpha=14 / 3), "query": lj.LoRA(rank=1, alpha=2)}
    adapter = {
        path: lj.Adapter(part.variant, part.axes, a=part.a.astype(dtype), b=part.b.astype(dtype))
        for path, part in made(variants).items()
    }
    tensors = export(adapter, tmp_path, server, component="unet" if server == "diffusers" else None)
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(dtype)}
    name, ratio = {
        "llama.cpp": ("base_model.model.model.out.lora_B.weight", 7 / 3),
        "mlx-lm": ("model.out.lora_b", 7 / 6),
        "diffusers": ("unet.model.out.lora_B.weight", 7 / 3),
    }[server]
    got = tensors[name] if server == "mlx-lm" else tensors[name].T
    expected = (np.asarray(adapter["out"].b).astype(np.float32) * np.float32(ratio)).astype(dtype)
    np.testing.assert_array_equal(got, expected)


def test_a_scale_that_does_not_fit_a_dtype_is_refused(tmp_path: Path) -> None:
    part = made({"out": lj.LoRA(rank=2, alpha=200_000)})["out"]
    adapter = {"out": lj.Adapter(part.variant, "iio", a=part.a, b=jnp.full((2, D), 2, np.float16))}
    assert refused(adapter, tmp_path, for_server="diffusers", component="unet") == (
        "Expected a scale that can be multiplied into the factors of 'unet.model.out'; 100000 times values of up to 2 "
        "is not finite in float16.\n  Cast the adapter to float32."
    )


# Refusals

ALL = {
    "query": lj.DoRA(rank=2, alpha=4),
    "conv": lj.DoRA(rank=2, alpha=4),
    "head/kernel": lj.Full(),
    "embed": lj.Rows(ids=(1, 2)),
}


def refused(adapter: Any, path: Path, mapping: Any = MAPPING, **kwargs: Any) -> str:
    with pytest.raises((lj.AdapterError, lj.SpecError)) as error:
        peft.export(path / "new", adapter, mapping, base=PARAMS, **kwargs)
    assert not (path / "new").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("server", "name", "lines"),
    [
        (
            "vllm",
            "vLLM",
            [
                "'query': it has DoRA, which vLLM refuses",
                "'conv': it has DoRA, which",
                "'embed': it has Rows, which vLLM",
            ],
        ),
        (
            "llama.cpp",
            "llama.cpp",
            [
                "'query': it has DoRA, which llama.cpp refuses when it converts the files",
                "'head/kernel': it has Full, which llama.cpp refuses, or in norms ignores",
                "'embed': it has Rows, which llama.cpp refuses when it converts the files",
            ],
        ),
        (
            "diffusers",
            "diffusers",
            [
                "'query': its module 'model.layers.0.q' does not begin with a component, such as 'unet'; pass",
                "'embed': its module 'model.embed_tokens' does not begin",
            ],
        ),
        (
            "mlx-lm",
            "mlx-lm",
            [
                "'conv': it has factors of a module of kind 'conv', which mlx-lm has no place for",
                "'head/kernel': it has Full, which mlx-lm has no place for",
                "'embed': it has Rows, which mlx-lm has no place for",
            ],
        ),
    ],
)
def test_what_a_server_does_not_read_is_in_one_error(server: str, name: str, lines: Any, tmp_path: Path) -> None:
    text = refused(made(ALL), tmp_path, for_server=server)
    assert text.startswith(f"Expected an adapter that {name} and the mapping can express; got:\n")
    assert text.endswith("or change the leaves, or serve the merged model, `peft.export_merged`; nothing was written.")
    assert not [line for line in lines if line not in text]
    assert ("'head/kernel'" in text) == (server != "vllm") and ("'query'" in text) == (server != "mlx-lm")


@pytest.mark.parametrize(
    ("variants", "server", "expected"),
    [
        ({"out": lj.ALoRA(rank=2, alpha=4, invocation=(5,))}, "vllm", "'out': it has ALoRA, which vLLM refuses"),
        ({"conv": lj.LoRA(rank=2, alpha=4)}, "vllm", "factors of a module of kind 'conv', which vLLM does not adapt"),
        ({"conv": lj.LoRA(rank=2, alpha=4)}, "llama.cpp", "of kind 'conv', which llama.cpp does not adapt"),
        ({"out": lj.VeRA(rank=2, seed=0)}, "vllm", "'out': it has VeRA, which vLLM refuses"),
        ({"out": lj.VeRA(rank=2, seed=0)}, "diffusers", "'out': it has VeRA, which diffusers does not read"),
        ({"embed": lj.LoRA(rank=2, alpha=4)}, "diffusers", "of kind 'embedding', which diffusers does not read"),
        ({"embed": lj.DoRA(rank=2, alpha=4)}, "mlx-lm", "DoRA of a table, which mlx-lm normalizes by row"),
        (
            {"head/kernel": lj.LoRA(rank=2, alpha=4), "head/bias": lj.LoRABias(scale=2)},
            "llama.cpp",
            "'head/bias': it has LoRABias, which llama.cpp refuses when",
        ),
        (
            {"head/kernel": lj.LoRA(rank=2, alpha=4), "head/bias": lj.Full()},
            "vllm",
            "vLLM does not read Full of the bias of a layer that has factors",
        ),
    ],
)
def test_variants_and_layers_that_a_server_does_not_read_are_refused(
    variants: Any, server: str, expected: str, tmp_path: Path
) -> None:
    component = "unet" if server == "diffusers" else None
    assert expected in refused(made(variants), tmp_path, for_server=server, component=component)


def test_llama_cpp_refuses_tied_heads_and_conv1d(tmp_path: Path) -> None:
    mapping = {
        "embed": peft.embedding("wte", head="lm_head"),
        "head/kernel": peft.linear("c_fc", conv1d=True, axes="io"),
    }
    text = refused(made(dict.fromkeys(mapping, lj.LoRA(rank=2, alpha=4))), tmp_path, mapping, for_server="llama.cpp")
    assert "'embed': it has factors of a table that is tied to 'lm_head', which llama.cpp refuses when" in text
    assert "'head/kernel': it has factors of a Conv1D module, which llama.cpp transposes when it converts them" in text


def test_unknown_servers_and_components_are_refused(tmp_path: Path) -> None:
    adapter = made(EQUAL)
    assert (
        "Expected one of 'vllm', 'llama.cpp', 'diffusers', 'mlx-lm' for `for_server`, or None; got 'tgi'."
        in refused(adapter, tmp_path, for_server="tgi")
    )
    expected = "Expected no `component`, which diffusers' files have; got 'unet' for vLLM."
    assert expected in refused(adapter, tmp_path, for_server="vllm", component="unet")
    expected = "Expected one of 'unet', 'transformer'"
    assert expected in refused(adapter, tmp_path, for_server="diffusers", component="vae")
