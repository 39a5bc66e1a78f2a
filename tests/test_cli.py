"""The command line: what each command prints, writes and returns, and what it refuses in one line."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers import sweep

import lora_jax as lj
from lora_jax import checkpoint, many, peft
from lora_jax.cli import main
from lora_jax.cli._app import app

L, D, F, V = 2, 6, 4, 10
PARAMS = {
    f"layers/{i}/{name}": np.random.default_rng(i).standard_normal((D, F)).astype(np.float32)
    for i in range(L)
    for name in ("up", "down")
} | {"head/kernel": np.ones((F, 3), np.float32)}
MAPPING = peft.layer("head", "score") | {"layers/{i}/{name}": peft.linear("model.layers.{i}.mlp.{name}_proj")}
LORA = lj.LoRA(rank=2, alpha=4)
MODEL = "model.safetensors"


def adapter_of(variant: Any = LORA, *, seed: int = 0, zero: str = "", full: bool = False) -> dict[str, lj.Adapter]:
    """An adapter with random factors; `b` is zero at the path `zero`."""
    rng = np.random.default_rng(seed)
    adapter = {}
    for path, kernel in PARAMS.items():
        if path.startswith("layers"):
            shapes = variant.shapes(kernel.shape, "io")
            arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
            if path == zero:
                arrays["b"] *= 0
            adapter[path] = lj.Adapter(variant, "io", **arrays)
    if full:
        adapter["head/kernel"] = lj.Adapter(lj.Full(), "", value=rng.standard_normal((F, 3)).astype(np.float32))
    return adapter


def exported(path: Path, adapter: dict[str, lj.Adapter] | None = None, **names: Any) -> Path:
    adapter = adapter_of() if adapter is None else adapter
    peft.export(path, adapter, MAPPING, base=PARAMS, **({"base_name": "some/model"} | names))
    return path


def loaded(path: Path) -> dict[str, lj.Adapter]:
    return peft.load(path, MAPPING, PARAMS)


def update(part: lj.Adapter) -> np.ndarray[Any, Any]:
    return part.variant.scale * np.asarray(part.a, np.float64) @ np.asarray(part.b, np.float64)


@dataclasses.dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def ran(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return ran


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return exported(tmp_path / "plain")


# inspect


def test_inspect_prints_golden_json(run: Any, tmp_path: Path) -> None:
    one = lj.Adapter(LORA, "io", a=np.ones((D, 2), np.float32), b=np.ones((2, F), np.float32))
    zero = lj.Adapter(lj.LoRA(rank=1, alpha=2), "io", a=np.ones((D, 1), np.float32), b=np.zeros((1, F), np.float32))
    full = lj.Adapter(lj.Full(), "", value=np.ones((F, 3), np.float32))
    adapter = {"layers/0/up": one, "layers/1/up": zero, "head/kernel": full}
    path = exported(tmp_path / "some", adapter, task_type="SEQ_CLS")
    ran = run("inspect", path, "--json")
    norm = pytest.approx(2 * 2 * np.sqrt(D * F))
    assert (ran.code, ran.err) == (0, "")
    common = {"kind": "model.layers.*.mlp.up_proj", "method": "LoRA", "scale": 2.0, "shape": [D, F], "dtype": "float32"}
    assert ran.data == {
        "path": str(path),
        "format": "peft",
        "base": "some/model",
        "task": "SEQ_CLS",
        "parameters": 20 + 10 + 12,
        "bytes": 4 * 42,
        "zero": ["model.layers.1.mlp.up_proj"],
        "kinds": [
            {
                "name": "model.layers.*.mlp.up_proj",
                "layers": 2,
                "zero": 1,
                "norm": {"min": 0.0, "max": norm},
                "method": ["LoRA"],
                "rank": [1, 2],
                "scale": [2.0],
                "shape": [[D, F]],
                "parameters": 30,
                "bytes": 120,
            },
            {
                "name": "score.weight",
                "layers": 1,
                "zero": 0,
                "norm": None,
                "method": ["Full"],
                "rank": [],
                "scale": [],
                "shape": [],
                "parameters": 12,
                "bytes": 48,
            },
        ],
        "layers": [
            {"name": "model.layers.0.mlp.up_proj", "rank": 2, "alpha": 4.0, "norm": norm, "zero": False}
            | {"parameters": 20, "bytes": 80}
            | common,
            {"name": "model.layers.1.mlp.up_proj", "rank": 1, "alpha": 2.0, "norm": 0.0, "zero": True}
            | {"parameters": 10, "bytes": 40}
            | common,
            {"name": "score.weight", "kind": "score.weight", "method": "Full", "rank": None, "alpha": None}
            | {"scale": None, "shape": None, "norm": None, "zero": False, "dtype": "float32"}
            | {"parameters": 12, "bytes": 48},
        ],
    }
    shown = run("inspect", path).out
    assert "up_proj" in shown and "1 of 3 layers have an update of zero." in shown and "layers.1" not in shown
    assert "model.layers.1.mlp.up_proj" in run("inspect", path, "--layers").out


def test_what_is_not_an_adapter_is_an_error_with_advice(run: Any, tmp_path: Path) -> None:
    assert "is not a directory.\n  Pass the directory that PEFT" in run("inspect", tmp_path / "nowhere").err
    assert "has neither.\n  Files of kohya and diffusers can" in run("inspect", model(tmp_path / "model")).err


def test_inspect_splits_the_stacks_of_a_checkpoint(run: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    part = lj.Adapter(
        lj.RSLoRA(rank=4, alpha=2), "bio", a=rng.standard_normal((3, D, 4)), b=rng.standard_normal((3, 4, F))
    )
    part = jax.tree.map(lambda array: array.astype(np.float32), part)
    checkpoint.save(tmp_path / "saved", {"layers/up": part}, base={"layers": {"up": np.ones((3, D, F), np.float32)}})
    data = run("inspect", tmp_path / "saved", "--json").data
    assert data["format"] == "orbax" and data["base"] is None
    assert [kind["name"] for kind in data["kinds"]] == ["layers/up[*]"]
    expected = [np.linalg.norm(update(jax.tree.map(lambda array, i=i: array[i], part))) for i in range(3)]
    np.testing.assert_allclose([layer["norm"] for layer in data["layers"]], expected, rtol=1e-6)
    assert [layer["name"] for layer in data["layers"]] == ["layers/up[0]", "layers/up[1]", "layers/up[2]"]
    some = lj.Adapter(lj.Layers(layers=[2, 4], variant=LORA), "bio", a=part.a[:2, :, :2], b=part.b[:2, :2])
    checkpoint.save(tmp_path / "some", {"layers/up": some}, base={"layers": {"up": np.ones((5, D, F), np.float32)}})
    layers = run("inspect", tmp_path / "some", "--json").data["layers"]
    assert [layer["name"] for layer in layers] == ["layers/up[2]", "layers/up[4]"]
    one = np.linalg.norm(2 * part.a[1, :, :2].astype(float) @ part.b[1, :2])
    assert layers[1]["norm"] == pytest.approx(one)


# diff


def test_diff_compares_updates_and_not_factors(run: Any, tmp_path: Path, plain: Path) -> None:
    assert run("diff", plain, plain).code == 0
    parts = adapter_of()
    scaled = {path: lj.Adapter(LORA, "io", a=part.a * 2, b=part.b / 2) for path, part in parts.items()}
    assert run("diff", plain, exported(tmp_path / "scaled", scaled), "--tolerance", 1e-7).code == 0
    other = adapter_of(lj.LoRA(rank=3, alpha=4), seed=1)
    ran = run("diff", plain, exported(tmp_path / "other", other), "--json")
    assert ran.code == 1 and not ran.data["equal"]
    assert ran.data["configuration"] == {"r": [2, 3]}
    assert ran.data["only"] == [[], []]
    for layer, path in zip(ran.data["layers"], sorted(parts), strict=True):
        one, two = update(parts[path]), update(other[path])
        most = max(np.linalg.norm(one), np.linalg.norm(two))
        assert layer["relative"] == pytest.approx(np.linalg.norm(one - two) / most), path
    shown = run("diff", plain, tmp_path / "other").out
    assert "4 layers differ, 0 are equal." in shown and "model.layers.*.mlp.up_proj" in shown


def test_diff_compares_the_order_of_tokens_but_not_of_names(run: Any, tmp_path: Path) -> None:
    for name, invocation in (("one", (1, 2)), ("other", (2, 1))):
        exported(tmp_path / name, adapter_of(lj.ALoRA(rank=2, alpha=4, invocation=invocation)))
    ran = run("diff", tmp_path / "one", tmp_path / "other", "--json")
    assert ran.code == 1 and ran.data["configuration"] == {"alora_invocation_tokens": [[1, 2], [2, 1]]}
    file = tmp_path / "other" / "adapter_config.json"
    config = json.loads(file.read_text())
    config |= {"alora_invocation_tokens": [1, 2], "target_modules": config["target_modules"][::-1]}
    file.write_text(json.dumps(config))
    assert run("diff", tmp_path / "one", tmp_path / "other").code == 0


def test_diff_names_layers_that_one_has_and_other_shapes(run: Any, tmp_path: Path, plain: Path) -> None:
    adapter = adapter_of(full=True)
    del adapter["layers/0/up"]
    data = run("diff", plain, exported(tmp_path / "other", adapter), "--json").data
    assert data["only"] == [["model.layers.0.mlp.up_proj"], ["score.weight"]]
    checkpoint.save(tmp_path / "saved", adapter, base=PARAMS)
    one_line(run("diff", plain, tmp_path / "saved"), 2, "Expected adapters in one format")
    assert "only in" in run("diff", plain, tmp_path / "other").out
    dora = adapter_of(lj.DoRA(rank=2, alpha=4))
    data = run("diff", plain, exported(tmp_path / "dora", dora), "--json").data
    assert {layer["relative"] for layer in data["layers"]} == {None}
    assert "other methods" in run("diff", plain, tmp_path / "dora").out


# verify


def model(path: Path, **shapes: tuple[int, ...]) -> Path:
    """A torch model in a safetensors file; `shapes` replaces those of tensors, and an empty one removes a tensor."""
    tensors = {f"model.layers.{i}.mlp.{name}_proj.weight": (F, D) for i in range(L) for name in ("up", "down")}
    tensors |= {"score.weight": (3, F)} | shapes
    path.mkdir()
    arrays = {name: np.ones(shape, np.float32) for name, shape in tensors.items() if shape}
    safetensors.numpy.save_file(arrays, path / MODEL, metadata={"format": "pt"})
    return path


def test_verify_compares_with_a_base(run: Any, tmp_path: Path, plain: Path) -> None:
    ran = run("verify", plain, "--base", model(tmp_path / "base"), "--json")
    assert ran.code == 0
    assert ran.data == {
        "path": str(plain),
        "format": "peft",
        "valid": True,
        "problems": {"files": [], "base": [], "server": None},
        "notes": [],
    }
    wrong = {"model.layers.0.mlp.up_proj.weight": (D, D), "model.layers.1.mlp.up_proj.weight": ()}
    ran = run("verify", plain, "--base", model(tmp_path / "wrong", **wrong), "--json")
    assert ran.code == 1 and not ran.data["valid"]
    assert ran.data["problems"]["base"] == [
        "'model.layers.0.mlp.up_proj': the base has the shape (6, 6), and the adapter is for (4, 6)",
        "'model.layers.1.mlp.up_proj': the base has no such module",
    ]
    shown = run("verify", plain, "--base", tmp_path / "wrong").out
    assert "2 problems (files, base verified)" in shown and "base: 'model.layers.1" in shown
    one_line(run("verify", plain, "--base", tmp_path / "nowhere"), 1, "Expected a model in safetensors files")


def test_verify_compares_a_checkpoint_with_its_base(run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_base.py").write_text("from test_cli import PARAMS\nOTHER = {k: v + 1 for k, v in PARAMS.items()}")
    checkpoint.save(tmp_path / "saved", adapter_of(zero="layers/0/up"), base=PARAMS)
    ran = run("verify", "saved", "--base", "my_base:PARAMS", "--json")
    assert ran.code == 0 and ran.data["notes"] == ["1 layer with an update of zero: layers/0/up"]
    ran = run("verify", "saved", "--base", "my_base:OTHER", "--json")
    assert ran.code == 1 and "'layers/0/up' has other values" in ran.data["problems"]["base"][0]
    one_line(run("verify", "saved", "--server", "vllm"), 2, "Convert it first")
    one_line(run("verify", "saved", "--base", model(tmp_path / "torch")), 2, "torch is a torch model")


def test_verify_says_what_a_server_refuses(run: Any, tmp_path: Path, plain: Path) -> None:
    def problems(path: Path, server: str) -> list[str]:
        ran = run("verify", path, "--server", server, "--json")
        assert ran.code == (1 if ran.data["problems"]["server"] else 0)
        return ran.data["problems"]["server"]

    path = "'model.layers.0.mlp.down_proj'"
    dora = exported(tmp_path / "dora", adapter_of(lj.DoRA(rank=2, alpha=4)))
    assert problems(plain, "vllm") == problems(plain, "llama.cpp") == []
    assert problems(dora, "vllm")[0] == f"{path}: it has DoRA, which vLLM refuses"
    assert "note: vllm can serve the merged model: lora-jax merge" in run("verify", dora, "--server", "vllm").out
    assert "mlx-lm reads other files than PEFT's" in problems(plain, "mlx-lm")[0]
    stabilized = exported(tmp_path / "stabilized", adapter_of(lj.RSLoRA(rank=4, alpha=4)))
    assert problems(stabilized, "llama.cpp")[0].startswith(f"{path}: llama.cpp reads the scale 1, and PEFT 2; lora-jax")
    assert run("convert", stabilized, tmp_path / "for_llama", "--to", "llama.cpp").code == 0
    assert problems(tmp_path / "for_llama", "llama.cpp") == []
    assert run("diff", stabilized, tmp_path / "for_llama", "--json").data["layers"][0]["relative"] < 1e-6
    assert problems(stabilized, "vllm") == []
    config = json.loads((plain / "adapter_config.json").read_text())
    config |= {"init_lora_weights": "other", "lora_bias": True, "base_model_name_or_path": None}
    del config["lora_alpha"]
    (plain / "adapter_config.json").write_text(json.dumps(config))
    assert problems(plain, "vllm") == [
        "lora_alpha is missing in the configuration",
        "lora_bias is True, which vLLM refuses",
        "init_lora_weights is 'other', which vLLM refuses",
    ]
    assert problems(plain, "llama.cpp")[0] == "lora_alpha is missing in the configuration"
    assert "llama.cpp needs --base" in run("verify", plain, "--server", "llama.cpp").out
    large = {f"layers/0/{name}": lj.LoRA(rank=32, alpha=4) for name in ("up", "down")}
    ones = {path: np.ones((64, 64), np.float32) for path in large}
    parts = {path: lj.Adapter(lora, "io", a=ones[path][:, :32], b=ones[path][:32]) for path, lora in large.items()}
    peft.export(tmp_path / "large", parts, MAPPING, base=ones)
    assert "vLLM needs --max-lora-rank 32" in run("verify", tmp_path / "large", "--server", "vllm").out


# merge


def test_merge_writes_the_model_with_the_update(run: Any, tmp_path: Path, plain: Path) -> None:
    base = model(tmp_path / "base")
    ran = run("merge", base, plain, tmp_path / "merged", "--json")
    assert ran.code == 0, ran.err
    assert (ran.data["tensors"], ran.data["bytes"], ran.data["files"]) == (5, 4 * (4 * D * F + 3 * F), [MODEL])
    merged = safetensors.numpy.load_file(tmp_path / "merged" / MODEL)
    for path, part in adapter_of().items():
        _, i, name = path.split("/")
        got = merged[f"model.layers.{i}.mlp.{name}_proj.weight"]
        np.testing.assert_allclose(got, 1 + update(part).T, atol=1e-5)
    np.testing.assert_array_equal(merged["score.weight"], 1)
    one_line(run("merge", base, plain, tmp_path / "merged"), 2, "Pass --force to write.")
    ran = run("merge", base, plain, tmp_path / "merged", "--force", "--max-shard-size", "200")
    assert ran.code == 0 and "5 tensors in 3 files" in ran.out
    wrong = model(tmp_path / "wrong", **{"model.layers.0.mlp.up_proj.weight": ()})
    one_line(run("merge", wrong, plain, tmp_path / "out"), 1, "'model.layers.0.mlp.up_proj.weight' is not in the base")
    assert not (tmp_path / "out").exists()


def test_merge_can_untie_a_head(run: Any, tmp_path: Path) -> None:
    table = lj.Adapter(LORA, "io", a=np.ones((V, 2), np.float32), b=np.ones((2, D), np.float32))
    rows, params = {"table": peft.embedding("model.embed_tokens")}, {"table": np.ones((V, D), np.float32)}
    peft.export(tmp_path / "of_table", {"table": table}, rows, base=params)
    of_table = model(tmp_path / "tied", **{"model.embed_tokens.weight": (V, D)})
    (of_table / "config.json").write_text(json.dumps({"architectures": ["MyForCausalLM"]}))
    ran = run("merge", of_table, tmp_path / "of_table", tmp_path / "out")
    assert ran.code == 1 and "Pass --untie 'lm_head'" in ran.err
    ran = run("merge", of_table, tmp_path / "of_table", tmp_path / "untied", "--untie", "lm_head", "--json")
    assert ran.data["tensors"] == 7


# compress and combine


def test_compress_writes_the_best_approximation(run: Any, tmp_path: Path, plain: Path) -> None:
    ran = run("compress", plain, tmp_path / "small", "--rank", 1, "--json")
    assert ran.code == 0 and ran.data["parameters"] == [80, 40]
    assert {tuple(leaf["ranks"]) for leaf in ran.data["leaves"]} == {(2, 1)}
    smaller = loaded(tmp_path / "small")
    expected, residual = lj.compress(adapter_of(), 1)
    for path, part in expected.items():
        np.testing.assert_allclose(update(smaller[path]), update(part), atol=1e-5)
    assert ran.data["leaves"][0]["error"] == pytest.approx(float(residual["layers/0/down"]), rel=1e-4)
    assert (
        json.loads((tmp_path / "small" / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/model"
    )
    assert "40 of 80 parameters" in run("compress", plain, tmp_path / "small", "--energy", 0.5, "--force").out


def test_compress_keeps_a_checkpoint_a_checkpoint(run: Any, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "saved", adapter_of(), base=PARAMS)
    assert run("compress", tmp_path / "saved", tmp_path / "small", "--rank", 1).code == 0
    assert lj.restore(tmp_path / "small", base=PARAMS)["layers/0/up"].variant.rank == 1


def test_combine_is_the_weighted_sum(run: Any, tmp_path: Path, plain: Path) -> None:
    other = exported(tmp_path / "other", adapter_of(seed=1))
    terms = f"one={plain}:0.5", f"two={other}:-2"
    ran = run("combine", tmp_path / "both", *terms, "--how", "concat", "--json")
    assert ran.code == 0 and ran.data["ranks"] == [4, 4]
    assert ran.data["adapters"]["two"] == {"path": str(other), "weight": -2.0}
    one, two, both = adapter_of(), adapter_of(seed=1), loaded(tmp_path / "both")
    for path, part in both.items():
        np.testing.assert_allclose(update(part), 0.5 * update(one[path]) - 2 * update(two[path]), atol=1e-5)


@pytest.mark.parametrize(
    ("how", "options", "method"),
    [
        sweep("linear", [], many.Linear()),
        ("svd", ["--rank", 1], many.Truncate(rank=1)),
        sweep("prune", ["--density", 0.5, "--on", "factors"], many.Prune(density=0.5, on="factors")),
        sweep("ties", ["--density", 0.5, "--sign", "frequency"], many.Ties(density=0.5, sign="frequency")),
        sweep("dare", ["--density", 0.5, "--seed", 3], many.Dare(density=0.5)),
    ],
)
def test_combine_has_each_method(
    how: str, options: list[Any], method: Any, run: Any, tmp_path: Path, plain: Path
) -> None:
    other = exported(tmp_path / "other", adapter_of(seed=1))
    ran = run("combine", tmp_path / "both", f"one={plain}", f"two={other}", "--how", how, *options, "--json")
    assert ran.code == 0 and ran.data["how"] == str(method)
    found = {name: peft.read(path).adapter for name, path in (("one", plain), ("two", other))}
    key = jax.random.key(3) if how == "dare" else None
    expected = many.combine({name: (adapter, 1.0) for name, adapter in found.items()}, method, key=key)
    both = peft.read(tmp_path / "both").adapter
    for path, part in expected.items():
        np.testing.assert_allclose(update(both[path]), update(part), atol=1e-6)


def test_combine_warns_of_different_bases(run: Any, tmp_path: Path, plain: Path) -> None:
    other = exported(tmp_path / "other", adapter_of(seed=1), base_name="another/model")
    ran = run("combine", tmp_path / "both", f"one={plain}", f"two={other}", "--how", "concat")
    assert "the adapters name different bases: one: some/model, two: another/model" in ran.err
    assert run("inspect", tmp_path / "both", "--json").data["base"] is None


def test_what_is_written_of_checkpoints_keeps_the_fingerprint_of_their_base(run: Any, tmp_path: Path) -> None:
    base = lj.quant.quantize(PARAMS, {"layers/0/up": lj.quant.Int8()})
    other = PARAMS | {"layers/1/up": PARAMS["layers/1/up"] + 1}
    for name, params in (("one", base), ("two", base), ("three", other)):
        checkpoint.save(tmp_path / name, adapter_of(), base=params)
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert run("compress", one, tmp_path / "small", "--rank", 1).code == 0
    ran = run("combine", tmp_path / "both", f"one={one}", f"two={two}", "--how", "concat")
    assert ran.code == 0 and not ran.err
    for name in ("small", "both"):
        assert lj.restore(tmp_path / name, base=base).keys() == adapter_of().keys()
        with pytest.raises(lj.CheckpointError, match="'layers/1/up' has other values"):
            lj.restore(tmp_path / name, base=lj.quant.quantize(other, {"layers/0/up": lj.quant.Int8()}))
    ran = run("combine", tmp_path / "unlike", f"one={one}", f"three={three}", "--how", "concat")
    assert ran.code == 0 and "the adapters were saved with different bases: 'layers/0/up' is another" in ran.err


# convert


def test_convert_writes_peft_from_a_checkpoint_and_back(run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ["from lora_jax import peft", "from test_cli import MAPPING, PARAMS", "def rows(): return MAPPING"]
    Path("my_model.py").write_text("\n".join(lines))
    checkpoint.save(tmp_path / "saved", adapter_of(), base=PARAMS)
    arguments = ["--mapping", "my_model:rows", "--base-name", "some/model", "--task", "SEQ_CLS"]
    assert run("convert", "saved", "out", "--to", "peft", *arguments).code == 0
    assert run("inspect", "out", "--json").data["task"] == "SEQ_CLS"
    np.testing.assert_array_equal(loaded(tmp_path / "out")["layers/0/up"].a, adapter_of()["layers/0/up"].a)
    arguments = ["--mapping", "my_model:MAPPING", "--base", "my_model:PARAMS"]
    assert run("convert", "out", "again", "--to", "orbax", *arguments).code == 0
    assert run("diff", "saved", "again").code == 0
    assert lj.restore(tmp_path / "again", base=PARAMS).keys() == adapter_of().keys()


def test_convert_to_kohya_and_back_keeps_the_updates(run: Any, tmp_path: Path, plain: Path) -> None:
    file = tmp_path / "lora.safetensors"
    ran = run("convert", plain, file, "--to", "kohya", "--component", "unet", "--json")
    assert ran.code == 0 and ran.data == {"source": str(plain), "target": str(file), "from": "peft", "to": "kohya"}
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"model.layers.{i}.mlp.{name}_proj" for i in range(L) for name in ("up", "down")))
    for modules, target in ((names, "one"), (model(tmp_path / "base"), "two")):
        assert run("convert", file, tmp_path / target, "--to", "peft", "--modules", modules).code == 0
        assert {layer["relative"] for layer in run("diff", plain, tmp_path / target, "--json").data["layers"]} == {0.0}
    one_line(run("convert", plain, file, "--to", "kohya", "--component", "unet"), 2, "lora.safetensors is a file")
    before = file.read_bytes()
    ran = run("convert", file, file, "--to", "diffusers", "--modules", names, "--force")
    one_line(ran, 2, "Expected another directory than that of the input, or another file")
    assert file.read_bytes() == before
    assert run("convert", plain, tmp_path / "diffusers", "--to", "diffusers", "--component", "unet").code == 0
    assert [entry.name for entry in (tmp_path / "diffusers").iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert run("convert", tmp_path / "diffusers", tmp_path / "three", "--to", "peft").code == 0
    assert run("diff", plain, tmp_path / "three", "--tolerance", 1e-6, "--json").data["only"] == [[], []]


def test_convert_reads_the_base_from_a_checkpoint(run: Any, tmp_path: Path, plain: Path, monkeypatch: Any) -> None:
    import orbax.checkpoint as ocp

    monkeypatch.chdir(tmp_path)
    Path("my_rows.py").write_text("from test_cli import MAPPING")
    tree: dict[str, Any] = {"layers": {str(i): {} for i in range(L)}}
    for i in range(L):
        tree["layers"][str(i)] = {name: PARAMS[f"layers/{i}/{name}"] for name in ("up", "down")}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "base", tree)
    ran = run("convert", plain, "out", "--to", "orbax", "--mapping", "my_rows:MAPPING", "--base", "base")
    assert ran.code == 0, ran.err
    assert lj.restore(tmp_path / "out", base=tree).keys() == adapter_of().keys()
    ran = run("convert", plain, "out2", "--to", "orbax", "--mapping", "my_rows:MAPPING", "--base", "nowhere")
    assert ran.code == 1 and "Expected an Orbax checkpoint of a tree in nowhere" in ran.err


# Errors


def one_line(ran: Ran, code: int, text: str) -> None:
    assert ran.code == code, ran
    assert ran.out == "" and "Traceback" not in ran.err
    first, *rest = ran.err.splitlines()
    assert first.startswith("lora-jax: ") and text in ran.err, ran.err
    assert all(line.startswith("  ") for line in rest)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["inspect"], "DIRECTORY"),
        (["inspect", "x", "--lyers"], "--lyers"),
        (["insect"], 'Unknown command "insect"'),
        (["compress", "{}", "out"], "Expected either --rank or --energy."),
        (["compress", "{}", "out", "--rank", "x"], 'unable to convert "x" into int'),
        (["compress", "{}", "out", "--energy", "2"], "Expected a number in (0, 1) for `energy`"),
        (["compress", "{}", "{}", "--rank", "1", "--force"], "Expected another directory than that of the input"),
        (["combine", "out", "--how", "concat"], "Expected at least one adapter"),
        (["combine", "out", "{}", "--how", "concat"], "Expected NAME=DIRECTORY:WEIGHT"),
        (["combine", "out", "a={}:x", "--how", "concat"], "Expected NAME=DIRECTORY:WEIGHT"),
        (["combine", "out", "a={}", "a={}", "--how", "concat"], "with a name of its own"),
        (["combine", "out", "a={}", "--how", "concat", "--rank", "2"], "Expected options of concat (none); got --rank"),
        (["combine", "out", "a={}", "--how", "dare"], "Expected --density and --seed for dare"),
        (["combine", "out", "a={}", "--how", "mean"], "mean"),
        (["convert", "{}", "out", "--to", "orbax"], "Expected --mapping: bart, bert"),
        (["convert", "{}", "out", "--to", "orbax", "--mapping", "brt"], "got 'brt'"),
        (["convert", "{}", "out", "--to", "orbax", "--mapping", "no_such:x"], "cannot be imported"),
        (["convert", "{}", "out", "--to", "orbax", "--mapping", "bert"], "Expected --base"),
        (["convert", "{}", "out", "--to", "peft"], "Expected another format than that of the source, to convert to"),
        (["convert", "{}", "out", "--to", "vllm", "--mapping", "bert"], "(--base, --base-name, --task); got --mapping"),
        (["convert", "{}/adapter_model.safetensors", "{}", "--to", "peft", "--force"], "than that of the input"),
        (
            ["verify", "{}", "--component", "unet"],
            "Expected options of verify without --server (none); got --component",
        ),
        (["convert", "nowhere", "out", "--to", "orbax"], "Expected PEFT's format as that of the source"),
        (["convert", "{}", "out.safetensors", "--to", "kohya", "--component", "unit"], "got 'unit'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    arguments: list[str], text: str, run: Any, plain: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(plain.parent)
    one_line(run(*(argument.format(plain) for argument in arguments)), 2, text)
    assert not Path("out").exists()


def test_a_target_with_entries_is_refused_without_force(run: Any, tmp_path: Path, plain: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    one_line(run("compress", plain, tmp_path / "out", "--rank", 1), 2, "has 1 entries. Pass --force to write.")
    one_line(run("compress", plain, tmp_path / "out" / "mine.txt", "--rank", 1), 2, "mine.txt is a file")
    assert run("compress", plain, tmp_path / "out", "--rank", 1, "--force").code == 0
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def damaged(path: Path, how: str) -> Path:
    """A copy of a PEFT directory, damaged."""
    exported(path)
    config, tensors = path / "adapter_config.json", path / "adapter_model.safetensors"
    match how:
        case "truncated":
            tensors.write_bytes(tensors.read_bytes()[:-9])
        case "not JSON":
            config.write_text("{")
        case "no configuration":
            config.unlink()
        case "no tensors":
            tensors.unlink()
        case "pickle":
            tensors.rename(path / "adapter_model.bin")
        case "rank":
            config.write_text(config.read_text().replace('"r": 2', '"r": 3'))
        case "empty":
            config.unlink()
            tensors.unlink()
    return path


DAMAGED = ["truncated", "not JSON", "no configuration", "no tensors", "pickle", "rank", "empty"]


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_adapter_is_one_error_and_exit_code_1(how: str, run: Any, tmp_path: Path, plain: Path) -> None:
    path = damaged(tmp_path / "damaged", how)
    commands = [
        ["inspect", path],
        ["diff", plain, path],
        ["compress", path, tmp_path / "out", "--rank", 1],
        ["combine", tmp_path / "out", f"a={path}", "--how", "concat"],
        ["convert", path, tmp_path / "out", "--to", "llama.cpp"],
    ]
    for command in commands if how == "truncated" else commands[:1]:
        one_line(run(*command), 1, "Expected")
    assert not (tmp_path / "out").exists()
    with pytest.raises(lj.CheckpointError):
        run("inspect", path, "--traceback")
    ran = run("verify", path, "--json")
    if how == "empty":
        one_line(ran, 1, "has neither")
    else:
        assert ran.code == 1 and len(ran.data["problems"]["files"]) == 1


def test_names_in_files_do_not_control_the_terminal(run: Any, tmp_path: Path) -> None:
    evil = {path: peft.linear(path.replace("/", "\x1b[31m")) for path in PARAMS}
    peft.export(tmp_path / "evil", adapter_of(), evil, base=PARAMS, base_name="\x1b]0;title\x07[bold]")
    for command in (["inspect", tmp_path / "evil"], ["verify", tmp_path / "evil", "--server", "diffusers"]):
        shown = run(*command).out
        assert "\x1b" not in shown and "\x07" not in shown and "\\x1b[31m" in shown
    assert "[bold]" in run("inspect", tmp_path / "evil").out


def test_advice_names_options_of_the_command(run: Any, tmp_path: Path, plain: Path) -> None:
    rows = lj.Adapter(lj.Rows(ids=[1]), "io", rows=np.ones((1, D), np.float32))
    base = {"table": np.ones((V, D), np.float32)}
    peft.export(tmp_path / "rows", {"table": rows}, {"table": peft.embedding("embed")}, base=base)
    ran = run("inspect", tmp_path / "rows")
    assert ran.code == 1 and "Pass --base, the directory of the model" in ran.err
    arguments = ["--base", model(tmp_path / "base", **{"embed.weight": (V, D)}), "--json"]
    assert run("inspect", tmp_path / "rows", *arguments).data["layers"][0]["norm"] == pytest.approx(np.sqrt(D))


def test_combine_adds_changes_of_modules_in_full(run: Any, tmp_path: Path) -> None:
    path = exported(tmp_path / "full", adapter_of(full=True))
    terms = f"one={path}", f"two={path}:2"
    ran = run("combine", tmp_path / "out", *terms, "--how", "concat")
    assert ran.code == 1 and "pass --base" in ran.err
    ran = run("combine", tmp_path / "out", *terms, "--how", "concat", "--base", model(tmp_path / "base"))
    assert ran.code == 0, ran.err
    change = adapter_of(full=True)["head/kernel"].value - 1
    np.testing.assert_allclose(loaded(tmp_path / "out")["head/kernel"].value, 1 + 3 * change, atol=1e-5)


def test_an_unexpected_error_is_one_line_too(run: Any, plain: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("lora_jax.cli._inspect.described", lambda found: 1 / 0)
    one_line(run("inspect", plain), 1, "ZeroDivisionError: division by zero\n  --traceback shows where")


# The program


def test_help_has_an_example_for_each_command(run: Any) -> None:
    shown = run("--help").out
    for name in ("inspect", "diff", "verify", "merge", "convert", "compress", "combine"):
        assert name in shown and f"Example: `lora-jax {name} " in app[name].help
    shown = run("merge", "--help").out
    assert "Example: lora-jax merge Qwen3-8B my_adapter merged" in shown and "--untie" in shown and "--json" in shown
    assert run("--version").out.strip() == lj.__version__


def test_completion_knows_the_commands() -> None:
    script = app.generate_completion(shell="bash")
    assert "inspect" in script and "--energy" in script


def test_a_bar_is_shown_only_on_a_terminal(run: Any, tmp_path: Path, plain: Path, monkeypatch: Any) -> None:
    assert run("compress", plain, tmp_path / "one", "--rank", 1).err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert "Compressing" in run("compress", plain, tmp_path / "two", "--rank", 1).err


def test_the_program_runs_in_a_process_of_its_own(plain: Path) -> None:
    command = [sys.executable, "-m", "lora_jax.cli", "inspect", plain, "--json"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stderr == "", ran.stderr
    assert json.loads(ran.stdout)["parameters"] == 80


def test_a_missing_extra_is_one_line(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["inspect", "x"]) == 2
    assert capsys.readouterr().err == 'lora-jax needs cyclopts and rich: pip install "lora_jax[cli]"\n'
