"""Conversion between the files of PEFT, kohya's scripts and diffusers. `oracle/test_peft_servers.py` runs diffusers."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lj
from lora_jax import peft

D, F = 8, 6
Tensors = dict[str, np.ndarray]
MODULES = ["down_blocks.0.attn1.to_q", "down_blocks.0.attn1.to_out.0", "mid_block.conv_in"]
SHAPES = {"q": (D, F), "out": (F, D), "conv": (3, 3, D, F)}
AXES = {"q": "io", "out": "io", "conv": "iiio"}
MAPPING = {
    "q": peft.linear(MODULES[0]),
    "out": peft.linear(MODULES[1]),
    "conv": peft.conv(MODULES[2]),
}
NAMES = {  # the names in a file of kohya, written by hand
    "q": "lora_unet_down_blocks_0_attn1_to_q",
    "out": "lora_unet_down_blocks_0_attn1_to_out_0",
    "conv": "lora_unet_mid_block_conv_in",
}


def array(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


PARAMS = {path: jnp.asarray(array(*shape, seed=at)) for at, (path, shape) in enumerate(SHAPES.items())}
DOWN, UP = array(2, D), array(F, 2)
FC = {"lora_unet_fc_in.lora_down.weight": DOWN, "lora_unet_fc_in.lora_up.weight": UP}
UNEQUAL = {"q": lj.LoRA(rank=2, alpha=4), "out": lj.LoRA(rank=3, alpha=2), "conv": lj.LoRA(rank=1, alpha=5)}
DORA = {path: lj.DoRA(rank=2, alpha=3) for path in SHAPES}


def exported(variants: dict[str, Any], path: Path) -> dict[str, lj.Adapter]:
    """Writes an adapter for PEFT, and returns it."""
    adapter = {}
    for at, (leaf, variant) in enumerate(variants.items()):
        shapes = variant.shapes(SHAPES[leaf], AXES[leaf])
        arrays = {name: jnp.asarray(array(*shape, seed=10 * at + i)) for i, (name, shape) in enumerate(shapes.items())}
        adapter[leaf] = lj.Adapter(variant, AXES[leaf], **arrays)
    peft.export(path, adapter, MAPPING, base=PARAMS)
    return adapter


def check(got: Any, expected: Any) -> None:
    """Compares what two adapters change the dense kernels to."""
    assert set(got) == set(expected)
    one, other = lj.merge(PARAMS, got), lj.merge(PARAMS, expected)
    for path in PARAMS:
        np.testing.assert_allclose(one[path], other[path], rtol=1e-5, atol=1e-5)


def write(path: Path, tensors: Tensors, metadata: Any = None) -> Path:
    safetensors.numpy.save_file(tensors, path / "lora.safetensors", metadata)
    return path / "lora.safetensors"


def kohya_product(tensors: Tensors, name: str) -> np.ndarray:
    """As kohya's scripts compute it: the scale is α over the rank; an α of 0 or none is the rank."""
    down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
    alpha = tensors.get(f"{name}.alpha", np.zeros(()))
    scale = float(alpha) / down.shape[0] if alpha else 1.0
    return scale * np.einsum("or,r...->o...", up.reshape(up.shape[:2]), down)


def test_kohyas_files_have_underscores_and_an_alpha_for_each_module(tmp_path: Path) -> None:
    adapter = exported(UNEQUAL, tmp_path / "peft")
    file = peft.convert(tmp_path / "peft", tmp_path / "new" / "lora.safetensors", to="kohya", component="unet")
    assert file == tmp_path / "new" / "lora.safetensors" and [*file.parent.iterdir()] == [file]
    tensors = safetensors.numpy.load_file(file)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        f"{NAMES['q']}.lora_down.weight": (2, D),
        f"{NAMES['q']}.lora_up.weight": (F, 2),
        f"{NAMES['q']}.alpha": (),
        f"{NAMES['out']}.lora_down.weight": (3, F),
        f"{NAMES['out']}.lora_up.weight": (D, 3),
        f"{NAMES['out']}.alpha": (),
        f"{NAMES['conv']}.lora_down.weight": (1, D, 3, 3),
        f"{NAMES['conv']}.lora_up.weight": (F, 1, 1, 1),
        f"{NAMES['conv']}.alpha": (),
    }
    after = lj.merge(PARAMS, adapter)
    change = {path: np.asarray(after[path] - PARAMS[path]) for path in PARAMS}
    for path in ("q", "out"):
        np.testing.assert_allclose(kohya_product(tensors, NAMES[path]), change[path].T, rtol=1e-4, atol=1e-5)
    expected = change["conv"].transpose(3, 2, 0, 1)
    np.testing.assert_allclose(kohya_product(tensors, NAMES["conv"]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variants", [UNEQUAL, DORA], ids=["LoRA", "DoRA"])
def test_an_adapter_is_the_same_after_all_formats(variants: Any, tmp_path: Path) -> None:
    adapter = exported(variants, tmp_path / "peft")
    kohya = peft.convert(tmp_path / "peft", tmp_path / "lora.safetensors", to="kohya", component="unet")
    diffusers = peft.convert(kohya, tmp_path / "diffusers", to="diffusers", modules=MODULES)
    assert diffusers == tmp_path / "diffusers" / "pytorch_lora_weights.safetensors"
    again = peft.convert(diffusers.parent, tmp_path / "again.safetensors", to="kohya")
    peft.convert(again, tmp_path / "back", to="peft", modules=[f"unet.{module}" for module in MODULES])
    check(peft.load(tmp_path / "back", MAPPING, PARAMS), adapter)
    peft.convert(diffusers, tmp_path / "direct", to="peft")
    direct = peft.load(tmp_path / "direct", MAPPING, PARAMS)
    check(direct, adapter)
    assert {path: part.variant.rank for path, part in direct.items()} == {path: v.rank for path, v in variants.items()}
    peft.convert(kohya, tmp_path / "exact", to="peft", modules=iter(MODULES))
    exact = peft.load(tmp_path / "exact", MAPPING, PARAMS)
    assert {path: part.variant for path, part in exact.items()} == variants
    np.testing.assert_array_equal(exact["conv"].b, adapter["conv"].b)


def test_magnitudes_are_columns_in_kohyas_files(tmp_path: Path) -> None:
    adapter = exported(DORA, tmp_path / "peft")
    file = peft.convert(tmp_path / "peft", tmp_path / "lora.safetensors", to="kohya", component="unet")
    tensors = safetensors.numpy.load_file(file)
    np.testing.assert_array_equal(tensors[f"{NAMES['q']}.dora_scale"], adapter["q"].magnitude[:, None])
    assert tensors[f"{NAMES['conv']}.dora_scale"].shape == (F, 1, 1, 1)


def test_names_of_kohyas_files_are_those_of_the_components(tmp_path: Path) -> None:
    a, b = array(2, D), array(F, 2)
    names = ["unet.a.b_c", "text_encoder.fc", "text_encoder_2.fc"]
    tensors = {f"{name}.lora_A.weight": a for name in names} | {f"{name}.lora_B.weight": b for name in names}
    file = peft.convert(write(tmp_path, tensors), tmp_path / "both.safetensors", to="kohya")
    got = safetensors.numpy.load_file(file)
    assert {name.partition(".")[0] for name in got} == {"lora_unet_a_b_c", "lora_te1_fc", "lora_te2_fc"}
    assert got["lora_te2_fc.alpha"] == 2  # without an α the scale is 1
    back = peft.convert(file, tmp_path / "back.safetensors", to="diffusers", modules=names)
    assert safetensors.numpy.load_file(back).keys() == tensors.keys()
    peft.convert(back, tmp_path / "one", to="peft", component="text_encoder_2")
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["target_modules"] == ["fc"]
    one = {name: tensor for name, tensor in tensors.items() if not name.startswith("text_encoder_2")}
    file = peft.convert(write(tmp_path, one), tmp_path / "one.safetensors", to="kohya")
    assert {name.partition(".")[0] for name in safetensors.numpy.load_file(file)} == {"lora_unet_a_b_c", "lora_te_fc"}


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (0.0, 1.0), (1.0, 0.5)])
def test_the_scale_of_kohyas_files_is_alpha_over_the_rank(alpha: Any, scale: float, tmp_path: Path) -> None:
    tensors = {"lora_unet_fc.lora_down.weight": array(2, D), "lora_unet_fc.lora_up.weight": array(F, 2)}
    tensors |= {} if alpha is None else {"lora_unet_fc.alpha": np.array(alpha, np.float32)}
    peft.convert(write(tmp_path, tensors), tmp_path / "peft", to="peft", modules=["fc"])
    part = peft.load(tmp_path / "peft", {"q": peft.linear("fc")}, {"q": PARAMS["q"]})["q"]
    assert part.variant == lj.LoRA(rank=2, alpha=2 * scale)


def test_modules_without_a_component_are_of_the_given_one(tmp_path: Path) -> None:
    file = write(tmp_path, FC)
    target = peft.convert(file, tmp_path / "new", to="diffusers", modules=["fc.in"], component="transformer")
    assert {name.partition(".")[0] for name in safetensors.numpy.load_file(target)} == {"transformer"}
    text = refused(target, tmp_path / "x.safetensors", to="kohya", component="transformer")
    assert text.startswith("Expected no `component`, which the names in ") and text.endswith("got 'transformer'.")


def test_an_adapter_of_scale_zero_is_not_read_as_one(tmp_path: Path) -> None:
    exported({"q": lj.LoRA(rank=2, alpha=0)}, tmp_path / "peft")
    file = peft.convert(tmp_path / "peft", tmp_path / "lora.safetensors", to="kohya", component="unet")
    assert not kohya_product(safetensors.numpy.load_file(file), NAMES["q"]).any()


def test_diffusers_files_of_others_are_read(tmp_path: Path) -> None:
    a, b = array(2, D), array(F, 2)
    factors = {"unet.fc.lora.down.weight": a, "unet.fc.lora.up.weight": b}
    configured = {"unet.fc.lora_A.weight": a, "unet.fc.lora_B.weight": b}
    stated = json.dumps({"unet.r": 2, "unet.lora_alpha": 6, "unet.target_modules": ["fc"]})
    for at, (tensors, metadata, scale) in enumerate(
        [
            (factors, None, 1),
            (factors | {"unet.fc.alpha": np.ones(1, np.float32)}, None, 0.5),
            (configured, {"lora_adapter_metadata": stated}, 3),
        ]
    ):
        peft.convert(write(tmp_path, tensors, metadata), tmp_path / str(at), to="peft")
        part = peft.load(tmp_path / str(at), {"q": peft.linear("fc")}, {"q": PARAMS["q"]})["q"]
        assert part.variant == lj.LoRA(rank=2, alpha=2 * scale)


# Refusals


def refused(source: Path, target: Path, **kwargs: Any) -> str:
    with pytest.raises(lj.LoRAError) as error:
        peft.convert(source, target, **kwargs)
    assert not target.exists()
    return str(error.value)


def test_kohyas_names_need_the_modules(tmp_path: Path) -> None:
    file, target = write(tmp_path, FC), tmp_path / "new"
    text = refused(file, target, to="peft")
    assert text.startswith(
        "Expected the names of the model's torch modules as `modules`: a file of kohya has underscores"
    )
    assert "got None" in text
    assert "is of no module" in refused(
        write(tmp_path, {"lora_unet_.alpha": DOWN}), target, to="peft", modules=["", "a"]
    )
    file = write(tmp_path, FC)
    assert "got 'fc_in'" in refused(file, target, to="peft", modules="fc_in")
    assert "'lora_unet_fc_in' is of no module in `modules`" in refused(file, target, to="peft", modules=["fc_out"])
    text = refused(file, target, to="peft", modules=["fc_in", "fc.in"])
    assert "'lora_unet_fc_in' is the names of 2: fc.in, fc_in in `modules`" in text


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"lora_unet_fc_in.hada_w1_a": DOWN}, "'lora_unet_fc_in.hada_w1_a' (2, 8) is not of the factors of a module"),
        ({"lora_unet_x.alpha": np.ones(1, np.float32)}, "'lora_unet_x' is of no module in `modules`"),
        ({"lora_unet_fc_in.lora_mid.weight": DOWN}, "lora_mid.weight' (2, 8) is not of the factors"),
        (
            {"lora_unet_fc_in.lora_up.weight": array(F, 3)},
            "'unet.fc_in' has factors of shapes (2, 8) and (6, 3), which",
        ),
        ({"lora_unet_fc_in.dora_scale": array(1, D)}, "'unet.fc_in' has a magnitude of shape (1, 8); expected (6,)"),
        ({"lora_unet_fc_in.lora_up.weight": None}, "'unet.fc_in' has only one of its two factors"),
        (
            {"lora_unet_fc_in.lora_down.weight": array(2, D, 3)},
            "has factors of shapes (2, 8, 3) and (6, 2), which do not fit",
        ),
        ({"lora_unet_fc_in.alpha": array(2)}, "'unet.fc_in' has an alpha of shape (2,); expected one value"),
    ],
)
def test_what_is_not_read_in_kohyas_files_is_refused(tensors: Any, expected: str, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in (FC | tensors).items() if tensor is not None}
    text = refused(write(tmp_path, tensors), tmp_path / "new", to="peft", modules=["fc_in"])
    assert text.startswith(
        f"Expected factors of linear modules and convolutions in {tmp_path / 'lora.safetensors'}; got"
    )
    assert expected in text


@pytest.mark.parametrize(
    ("tensors", "metadata", "expected"),
    [
        ({"unet.fc.lora_embedding_A": DOWN}, None, "'unet.fc.lora_embedding_A' (2, 8) is not of the factors of"),
        ({"unet.fc.lora.up.weight": UP}, None, "'unet.fc' has two tensors that are its b"),
        ({"unet.lora_A.weight": DOWN}, None, "'unet.lora_A.weight' (2, 8) is not of the factors of"),
        ({"vae.fc.lora_A.weight": DOWN}, None, "'vae.fc.lora_A.weight' (2, 8) is not of the factors of a component's"),
        ({}, {"lora_adapter_metadata": "["}, "a valid lora_adapter_metadata; JSONDecodeError"),
        ({}, {"lora_adapter_metadata": "[]"}, "lora_adapter_metadata; it has a list in place of"),
        ({}, {"lora_adapter_metadata": '{"unet.lora_alpha": "1"}'}, "its metadata of 'unet': lora_alpha is '1'"),
        (
            {},
            {"lora_adapter_metadata": '{"unet.lora_alpha": 1}'},
            "'unet.fc' has rank 2, and the configuration states 8",
        ),
        ({}, {"lora_adapter_metadata": '{"vae.r": 2}'}, "its metadata 'vae.r' are of no component"),
        ({}, {"lora_adapter_metadata": '{"unet.peft_type": "ADALORA"}'}, "peft_type is 'ADALORA'; only 'LORA' can be"),
    ],
)
def test_what_is_not_read_in_diffusers_files_is_refused(
    tensors: Any, metadata: Any, expected: str, tmp_path: Path
) -> None:
    tensors = {"unet.fc.lora_A.weight": DOWN, "unet.fc.lora_B.weight": UP} | tensors
    assert expected in refused(write(tmp_path, tensors, metadata), tmp_path / "new", to="peft")


def test_what_a_format_has_no_place_for_is_refused(tmp_path: Path) -> None:
    kernel = lj.Adapter(lj.LoRA(rank=2, alpha=4), "io", a=jnp.asarray(DOWN.T), b=jnp.asarray(UP.T))
    params = {"a": PARAMS["q"], "b": PARAMS["q"], "bias": jnp.ones(F)}
    mapping = {"a": peft.linear("x.fc_in"), "b": peft.linear("x_fc.in"), "bias": peft.vector("x.fc_in")}
    source, target = tmp_path / "peft", tmp_path / "lora.safetensors"
    peft.export(source, {"a": kernel, "b": kernel}, mapping, base=params)
    text = refused(source, target, to="kohya", component="unet")
    assert "'unet.x_fc.in' and 'unet.x.fc_in' have the same name 'lora_unet_x_fc_in'" in text
    text = refused(source, target, to="kohya")
    assert text.startswith("Expected an adapter that the format 'kohya' has a place for; got 2 problems:\n")
    assert "'x.fc_in' is of a component that kohya's names have no prefix for" in text
    assert "'x.fc_in' does not begin with a component, as unet, transformer" in refused(source, target, to="diffusers")
    biased = {"a": kernel, "bias": lj.Adapter(lj.LoRABias(scale=2), "", bias=jnp.ones(F))}
    peft.export(source, biased, mapping, base=params)
    text = refused(source, target, to="kohya", component="unet")
    assert "'unet.x.fc_in' has a bias of B, which kohya's files have no place for" in text
    table = {"a": peft.embedding("embed")}
    peft.export(source, {"a": kernel}, table, base=params)
    text = refused(source, target, to="diffusers", component="unet")
    assert "'unet.embed' has factors of an embedding, which diffusers does not read" in text
    peft.export(
        source, {"bias": lj.Adapter(lj.Full(), "", value=jnp.ones(F))}, {"bias": peft.vector("fc")}, base=params
    )
    text = refused(source, target, to="diffusers", component="unet")
    assert "'base_model.model.fc.bias' (6,) is not of the factors of a module" in text
    both = {"base_model.model.fc.lora_A.weight": DOWN, "base_model.model.fc.lora_embedding_A": DOWN}
    safetensors.numpy.save_file(both, source / "adapter_model.safetensors")
    assert "'fc' has two tensors that are its a" in refused(source, target, to="kohya", component="unet")
    mixed = FC | {"lora_unet_b.lora_down.weight": DOWN, "lora_unet_b.lora_up.weight": UP}
    mixed |= {"lora_unet_b.dora_scale": array(F, 1)}
    text = refused(write(tmp_path / "peft", mixed), tmp_path / "new", to="peft", modules=["fc_in", "b"])
    assert "'fc_in' has no magnitude, and others have" in text


def test_configurations_that_are_not_converted_are_refused(tmp_path: Path) -> None:
    exported({"q": lj.ALoRA(rank=2, alpha=4, invocation=(5,))}, tmp_path / "peft")
    target = tmp_path / "lora.safetensors"
    assert "alora_invocation_tokens is set" in refused(tmp_path / "peft", target, to="kohya", component="unet")
    exported(UNEQUAL, tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    for change, expected in [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"target_parameters": ["experts.up"]}, "target_parameters is set"),
        ({"rank_pattern": {}}, "'mid_block.conv_in' has rank 1, and the configuration states"),
    ]:
        (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config | change))
        assert expected in refused(tmp_path / "peft", target, to="kohya", component="unet")


def test_arguments_of_a_conversion_are_checked(tmp_path: Path) -> None:
    file = write(tmp_path, FC)
    assert "Expected one of 'peft', 'kohya', 'diffusers' for `to`; got 'gguf'." in refused(
        file, tmp_path / "x", to="gguf"
    )
    text = refused(file, tmp_path / "x", to="kohya")
    assert "Expected a file whose name ends in .safetensors for `target`, for to='kohya'; got" in text
    assert "Expected a directory for `target`" in refused(file, tmp_path / "x.safetensors", to="peft", modules=[])
    text = refused(file, tmp_path / "x.safetensors", to="kohya")
    assert "Expected another format for `to` than that of the source, 'kohya'; got to='kohya'." in text
    text = refused(file, tmp_path / "x", to="peft", modules=["fc_in"], component="text_encoder")
    assert "Expected one of 'unet' for `component`, as PEFT's files are of one; got 'text_encoder'." in text
    assert "for `component`; got 'vae'" in refused(file, tmp_path / "x", to="peft", component="vae")
    text = refused(write(tmp_path, {"model.fc.weight": DOWN}), tmp_path / "x", to="peft")
    assert text.startswith("Expected names of tensors as in a file of PEFT, kohya or diffusers, in ")
    (tmp_path / "empty").mkdir()
    text = refused(tmp_path / "empty", tmp_path / "x", to="peft")
    assert "adapter_model.safetensors or pytorch_lora_weights.safetensors; got neither in " in text
    text = refused(tmp_path / "none", tmp_path / "x", to="peft")
    assert text == f"Expected a directory or a file of tensors to convert; there is no {tmp_path / 'none'}."
