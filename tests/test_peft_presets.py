"""Presets of `transformers`' Flax models: logits with PEFT's adapters, against `data/presets`, which torch computed."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch_pairs
from zoo.model import framework

import lora_jax as lj
from lora_jax import peft

REFERENCE = Path(__file__).parent / "data" / "presets"


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_a_leaf_is_not_tied(tied: bool, tmp_path: Path) -> None:
    params = {"embedder/input_embedding": jnp.ones((10, 8))} | ({} if tied else {"lm_head/w": jnp.ones((8, 10))})
    part = lj.Adapter(lj.LoRA(rank=2, alpha=4), "io", a=jnp.ones((10, 2)), b=jnp.ones((2, 8)))
    adapter, mapping = {"embedder/input_embedding": part}, peft.presets.tunix_llama3()
    peft.export(tmp_path, adapter, mapping, base=params)
    names = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert any("lm_head" in name for name in names) is tied
    assert list(peft.load(tmp_path, mapping, params)) == list(adapter)


def flax_model(name: str) -> Any:
    hf = framework("transformers")
    if not hasattr(hf, "FlaxPreTrainedModel"):
        pytest.skip("needs transformers<5, which has Flax models")
    shapes = {"clip": ((1, 5), (1, 8, 8, 3)), "whisper": (1, 4, 12)}
    options = {"input_shape": shapes[name]} if name in shapes else {}
    model = getattr(hf, f"Flax{torch_pairs.MODELS[name][2]}")
    return model(torch_pairs.config(hf, name), _do_init=False, **options)


@pytest.mark.sweep
@pytest.mark.parametrize("name", torch_pairs.MODELS)
def test_an_adapter_of_peft_gives_the_logits_of_torch(name: str, key: jax.Array, tmp_path: Path) -> None:
    model, mapping = flax_model(name), getattr(peft.presets, name)()
    reference = np.load(REFERENCE / name / "reference.npz")
    state = {key.removeprefix("weights/"): reference[key] for key in reference if key.startswith("weights/")}
    shapes = jax.eval_shape(lambda key: model.init_weights(key, model.input_shape), key)
    params = torch_pairs.with_torch_values(shapes, mapping, state)

    def apply(params: Any) -> Any:
        result = model(*torch_pairs.inputs(name), params=params)
        return result.logits_per_image if name == "clip" else result.logits

    adapter = peft.load(REFERENCE / name, mapping, params)
    np.testing.assert_allclose(jax.jit(apply)(params), reference["base"], atol=1e-4, rtol=1e-4)
    got = jax.jit(lj.lora(apply))(params, adapter)
    np.testing.assert_allclose(got, reference["adapted"], atol=1e-4, rtol=1e-4)
    assert np.abs(reference["adapted"] - reference["base"]).max() > 0.05

    # What is exported is PEFT's file again, so torch has these logits with it.
    peft.export(tmp_path, adapter, mapping, base=params)
    files = [safetensors.numpy.load_file(path / "adapter_model.safetensors") for path in (tmp_path, REFERENCE / name)]
    assert files[0].keys() == files[1].keys()
    for tensor, expected in zip(*(dict(sorted(file.items())).values() for file in files), strict=True):
        np.testing.assert_allclose(tensor, expected, rtol=1e-6)
