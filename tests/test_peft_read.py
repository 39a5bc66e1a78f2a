"""Adapters in PEFT's format that are read without a mapping."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from test_peft import CONFIG, FC, LAYERS, LORA, VARIANTS, D, F, V, change, config_of, made, params_of, product, write

import lora_jax as lj
from lora_jax import peft


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_read_is_written_as_it_was(kind: str, tmp_path: Path) -> None:
    shape, axes, row, _ = LAYERS[kind]
    for at, variant in enumerate(VARIANTS):
        one, other = tmp_path / f"{at}", tmp_path / f"{at} again"
        adapter = {"kernel": made(variant, shape, axes if variant.needs_axes else "")}
        peft.export(one, adapter, {"kernel": row}, base=params_of({"kernel": shape}))
        found = peft.read(one)
        assert {type(part.variant) for part in found.adapter.values()} == {type(variant)}
        peft.export(other, found.adapter, found.mapping, base=found.params)
        assert files(one) == files(other)


def test_paths_are_torch_modules_and_axes_are_those_of_torch(tmp_path: Path) -> None:
    config = CONFIG | {"rank_pattern": {r"^fc": 3}, "target_modules": ["fc", "up"], "lora_bias": True}
    shapes = {"m.fc.lora_A.weight": (2, D), "m.fc.lora_B.weight": (F, 2), "m.fc.lora_B.bias": (F,)}
    shapes |= {"conv.lora_A.weight": (2, D, 3, 5), "conv.lora_B.weight": (F, 2, 1, 1), "conv.lora_B.bias": (F,)}
    shapes |= {"fc.lora_A.weight": (3, D), "fc.lora_B.weight": (F, 3), "fc.lora_B.bias": (F,), "norm.weight": (D,)}
    shapes |= {"vit.cls": (1, 1, D), "clip.scale": ()}
    tensors = write(tmp_path, config | {"target_modules": ["fc", "conv"]}, shapes)
    found = peft.read(tmp_path)
    assert {path: (part.variant, part.axes) for path, part in found.adapter.items()} == {
        "m.fc/weight": (LORA, "oi"),
        "m.fc/bias": (lj.LoRABias(scale=2), ""),
        "conv/weight": (LORA, "oiii"),
        "conv/bias": (lj.LoRABias(scale=2), ""),
        "fc/weight": (lj.LoRA(rank=3, alpha=4), "oi"),
        "fc/bias": (lj.LoRABias(scale=4 / 3), ""),
        "norm/weight": (lj.Full(), ""),
        "vit/cls": (lj.Full(), ""),
        "clip/scale": (lj.Full(), ""),
    }
    assert {path: leaf.shape for path, leaf in found.params.items()} == {
        "m.fc/weight": (F, D),
        "m.fc/bias": (F,),
        "conv/weight": (F, D, 3, 5),
        "conv/bias": (F,),
        "fc/weight": (F, D),
        "fc/bias": (F,),
        "norm/weight": (D,),
        "vit/cls": (1, 1, D),
        "clip/scale": (),
    }
    peft.export(tmp_path / "again", found.adapter, found.mapping, base=found.params)
    again = safetensors.numpy.load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model."): array.tobytes() for name, array in again.items()} == {
        name: array.tobytes() for name, array in tensors.items()
    }
    np.testing.assert_allclose(change(found.adapter["m.fc/weight"]), product(tensors, "m.fc", 2), rtol=1e-5, atol=1e-6)


def test_adapters_of_one_model_are_combined_without_it(tmp_path: Path) -> None:
    params, mapping = params_of({"a": (D, F), "b": (D, F)}), {"{name}": peft.linear("model.{name}")}
    for seed in range(2):
        parts = {path: made(LORA, (D, F), "io", seed=7 * seed + at) for at, path in enumerate(params)}
        peft.export(tmp_path / f"{seed}", parts, mapping, base=params)
    one, other = (peft.read(tmp_path / f"{seed}") for seed in range(2))
    sums = lj.many.combine({"one": (one.adapter, 0.5), "other": (other.adapter, 2.0)}, "concat")
    peft.export(tmp_path / "sum", sums, one.mapping, base=one.params)
    first, second = (peft.load(tmp_path / f"{seed}", mapping, params) for seed in range(2))
    for path, part in peft.load(tmp_path / "sum", mapping, params).items():
        expected = 0.5 * change(first[path]) + 2 * change(second[path])
        np.testing.assert_allclose(change(part), expected, rtol=1e-4, atol=1e-5)


def test_a_head_with_the_factors_of_an_embedding_is_tied_to_it(tmp_path: Path) -> None:
    params, mapping = params_of({"embed": (V, D)}), {"embed": peft.embedding("embed_tokens", head="lm_head")}
    adapter = {"embed": made(lj.LoRA(rank=2, alpha=4), (V, D), "io")}
    peft.export(tmp_path, adapter, mapping, base=params)
    found = peft.read(tmp_path)
    assert list(found.adapter) == ["embed_tokens/weight"]
    smaller, _ = lj.compress(found.adapter, rank=1)
    peft.export(tmp_path / "smaller", smaller, found.mapping, base=found.params)
    assert list(peft.load(tmp_path / "smaller", mapping, params)) == ["embed"]
    shapes = {"embed_tokens.lora_embedding_A": (2, V), "embed_tokens.lora_embedding_B": (D, 2)}
    write(tmp_path, CONFIG | {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, shapes)
    assert peft.read(tmp_path).mapping == {"embed_tokens/weight": peft.embedding("embed_tokens", head="lm_head")}
    shapes |= {"lm_head.lora_A.weight": (2, D), "lm_head.lora_B.weight": (V, 2)}
    write(tmp_path, CONFIG | {"target_modules": ["embed_tokens", "lm_head"]}, shapes)
    assert list(peft.read(tmp_path).adapter) == ["embed_tokens/weight", "lm_head/weight"]
    peft.export(tmp_path, {"embed": made(LORA, (V, D), "io")}, mapping, base=params)
    config = config_of(tmp_path) | {"alpha_pattern": {"lm_head": 3}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert [part.variant.alpha for part in peft.read(tmp_path).adapter.values()] == [4, 3]


def test_copies_of_the_base_become_values_of_the_parameters(tmp_path: Path) -> None:
    shapes = {"lm_head.lora_A.weight": (2, D), "lm_head.lora_B.weight": (V, 2)}
    copy = {"base_model.model.lm_head.base_layer.weight": np.ones((V, D), np.float32)}
    write(tmp_path, CONFIG | {"target_modules": ["lm_head"]}, shapes, **copy)
    assert peft.read(tmp_path).params["lm_head/weight"].sum() == V * D


def save(path: Path, tensors: dict[str, Any], name: str = "model.safetensors") -> None:
    path.mkdir(exist_ok=True)
    safetensors.numpy.save_file({name: np.array(array) for name, array in tensors.items()}, path / name)


def test_trainable_tokens_and_vera_are_read_with_the_base(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    params = params_of({"embed": (V, D), "up": (D, F), "down": (F, D)})
    save(base, {"embed.weight": params["embed"], "up.weight": params["up"].T, "down.weight": params["down"].T})
    mapping = {"embed": peft.embedding("embed"), "up": peft.linear("up"), "down": peft.linear("down")}
    tokens = {"embed": made(lj.Rows(ids=(7, 2)), (V, D), "io"), "up": made(LORA, (D, F), "io")}
    peft.export(adapter, tokens, mapping, base=params)
    with pytest.raises(
        lj.CheckpointError, match=r"(?s)1 problem:\n  'embed' has trainable tokens, which `base` is needed for\n"
    ):
        peft.read(adapter)
    found = peft.read(adapter, base=base)
    np.testing.assert_allclose(found.adapter["embed/weight"].rows, tokens["embed"].rows, atol=1e-6)
    vera = {path: made(lj.VeRA(rank=3, seed=7), params[path].shape, "io") for path in ("up", "down")}
    peft.export(adapter, vera, mapping, base=params)
    with pytest.raises(lj.CheckpointError, match=r"(?s)2 problems:\n  'down' has VeRA, which `base` is needed for\n"):
        peft.read(adapter)
    found = peft.read(adapter, base=base)
    for path, part in vera.items():
        assert found.adapter[f"{path}/weight"].variant == part.variant
        np.testing.assert_allclose(found.adapter[f"{path}/weight"].lambda_b, part.lambda_b, rtol=1e-6)
    before = files(adapter)
    peft.export(adapter, found.adapter, found.mapping, base=found.params)
    assert files(adapter) == before
    save(base, {"up.weight": jnp.ones(3), "down.weight": np.ones((2, 2), np.int8)})
    with pytest.raises(lj.CheckpointError, match=r"'down' has VeRA, and `base` has a weight \(2, 2\) of dtype I8\n"):
        peft.read(adapter, base=base)


def test_tensors_that_do_not_determine_a_module_are_refused(tmp_path: Path) -> None:
    for shapes, expected in [
        ({"fc.lora_A.weight": (2, D)}, "'fc' has factors of shapes (2, 8); expected A and B"),
        ({"f*.lora_A.weight": (2, D)}, "'f*' is not the name of a torch module"),
        ({"fc.a/b": (2, D)}, "'fc' is not the name of a torch module, or has a parameter without one"),
    ]:
        write(tmp_path, CONFIG, shapes)
        with pytest.raises(lj.CheckpointError) as raised:
            peft.read(tmp_path)
        assert f"Expected tensors of torch modules in {tmp_path}; got 1 problem:\n  {expected}" in str(raised.value)
    write(tmp_path, CONFIG | {"peft_type": "IA3"}, {"fc.lora_A.weight": (2, D)})
    with pytest.raises(lj.CheckpointError, match="peft_type is 'IA3'; 'LORA', 'VERA' and 'ADALORA'"):
        peft.read(tmp_path)
    write(tmp_path, CONFIG, FC | {"fc.lora_diag": (2,)})
    with pytest.raises(lj.CheckpointError, match=r"1 tensor that no leaf of `params` takes:\n.*fc.lora_diag"):
        peft.read(tmp_path)


# Files of a model


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    from lora_jax.peft._stored import stored_tensors

    save(tmp_path, {"a": np.arange(6.0).reshape(2, 3)}, "one.safetensors")
    save(tmp_path, {"b": jnp.ones(2, jnp.bfloat16)}, "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    tensors = stored_tensors(tmp_path)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} == {
        "a": ("F64", (2, 3)),
        "b": ("BF16", (2,)),
    }
    assert tensors["a"].read().tolist() == [[0, 1, 2], [3, 4, 5]]
    for content, expected in [
        ({"weight_map": {"a": "../one.safetensors"}}, "'../one.safetensors', which is not a safetensors file of its"),
        ({"weight_map": {"c": "one.safetensors"}}, "states that 'c' is in one.safetensors, which lacks it"),
        ({"weight_map": {"c": "none.safetensors"}}, "none.safetensors cannot be read"),
        ([], "it has a list in place of a JSON object"),
    ]:
        index.write_text(json.dumps(content))
        with pytest.raises(lj.CheckpointError) as raised:
            stored_tensors(tmp_path)
        assert expected in str(raised.value)


def test_adalora_is_read_and_experts_are_refused(tmp_path: Path) -> None:
    config = {"peft_type": "ADALORA", "init_r": 4, "lora_alpha": 8, "target_modules": ["fc"]}
    tables = {"e.lora_embedding_A": (4, D), "e.lora_embedding_B": (F, 4), "h.lora_A.weight": (4, F)}
    write(tmp_path, config | {"rank_pattern": {"e.lora_E": "no mask"}}, tables | {"h.lora_B.weight": (D, 4)})
    with pytest.raises(lj.CheckpointError, match=r"rank_pattern of 'e.lora_E' is 'no mask'"):
        peft.read(tmp_path)
    tensors = write(tmp_path, config, {"fc.lora_A": (4, D), "fc.lora_B": (F, 4), "fc.lora_E": (4, 1)})
    found = peft.read(tmp_path)
    [(path, part)] = found.adapter.items()
    assert (path, part.variant, part.axes) == ("fc/weight", lj.AdaLoRA(rank=4, alpha=8), "oi")
    expected = 2 * tensors["fc.lora_B"] @ (tensors["fc.lora_E"] * tensors["fc.lora_A"])
    merged = lj.merge({"fc/weight": jnp.zeros((F, D))}, {"fc/weight": part})["fc/weight"]
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)
    write(tmp_path, CONFIG | {"target_parameters": ["experts.up"]}, {"experts.lora_A.weight": (4, D)})
    with pytest.raises(lj.CheckpointError, match="target_parameters is set, whose tensors do not show the experts"):
        peft.read(tmp_path)
