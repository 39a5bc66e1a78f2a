"""`restore` returns what was saved, bit for bit and for the right base, or raises an error with the reason."""

import asyncio
import dataclasses
import gc
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_killed
import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import stored_run
from etils import epath
from flax import nnx
from helpers import bits, environment
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from zoo import ZOO

import lora_jax as lj
from lora_jax.checkpoint import AdapterRestore, AdapterSave, StateRestore, _checksums, _fingerprint, restore, save
from lora_jax.checkpoint._manifest import _VARIANTS

P = PartitionSpec


def normal(shape: tuple[int, ...], dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def make_base(depth: int = 2) -> dict[str, Any]:
    """A base with a list, and matrices larger than the sample of the fingerprint."""
    layers = [{"kernel": normal((16, 8), seed=layer), "bias": jnp.zeros(8)} for layer in range(depth)]
    return {"layers": layers, "query": {"kernel": normal((16, 4, 8), jnp.bfloat16)}}


def trained(init: Callable[[], dict[str, lj.Adapter]], seed: int = 0) -> dict[str, lj.Adapter]:
    """An adapter like a trained one, with the shapes of `init`."""
    return jax.tree.map(lambda leaf: normal(leaf.shape, leaf.dtype, seed), jax.eval_shape(init))


SPEC = {
    "layers/0/kernel": lj.LoRA(rank=2, alpha=4),
    "layers/*/kernel": lj.RSLoRA(rank=3, alpha=0.1),
    "layers/0/bias": lj.Full(),
    "query/kernel": lj.LoRA(rank=2, alpha=16, axes="ioo"),
}


def make_adapter(dtype: Any = jnp.float32, seed: int = 0) -> dict[str, lj.Adapter]:
    return trained(lambda: lj.init(jax.random.key(0), make_base(), SPEC, param_dtype=dtype), seed)


def assert_same(got: Any, expected: Any) -> None:
    """Compares bit for bit, including the tree structure with variants and axes."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    chex.assert_trees_all_equal(got, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that tests only read."""
    path = tmp_path_factory.mktemp("saved")
    save(path, make_adapter(), base=make_base())
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that tests may change."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Changes the manifest and updates the checksums."""
    file = path / "0" / "adapter" / "adapter.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    _checksums.write(epath.Path(file.parent))


def error(path: Path, **options: Any) -> str:
    with pytest.raises(lj.CheckpointError) as caught:
        restore(path, **{"base": None, **options})
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Round trips


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_restore_after_save_is_the_identity(dtype: Any, tmp_path: Path) -> None:
    adapter = make_adapter(dtype)
    save(tmp_path, adapter, base=make_base())
    assert_same(restore(tmp_path, base=make_base()), adapter)
    assert list(restore(tmp_path, base=None)) == list(adapter)


@pytest.mark.parametrize("name", ["scanned_transformer", "nnx_transformer"])
def test_restore_after_save_is_the_identity_for_every_container(name: str, tmp_path: Path, key: jax.Array) -> None:
    model = ZOO[name](key, jnp.float32)
    kernels = lj.kernels(model.apply, model.params, *model.args)
    adapter = trained(lambda: lj.init(key, model.params, model.spec, kernels=kernels))
    save(tmp_path, adapter, base=model.params)
    assert_same(restore(tmp_path, base=model.params), adapter)


@pytest.mark.parametrize(
    "names", [("a/b", "a"), ("", " ", "ü/λ"), ("..", "."), ("/x", "x/", "c.value", "c"), ("'q'", '"')]
)
def test_any_text_can_be_a_path(names: tuple[str, ...], tmp_path: Path) -> None:
    adapter = {name: lj.Adapter(lj.Full(), "", value=normal((3,), seed=seed)) for seed, name in enumerate(names)}
    save(tmp_path, adapter, base=dict.fromkeys(names, jnp.ones(3)))
    assert_same(restore(tmp_path, base=None), adapter)


def test_a_base_that_is_one_array_has_the_empty_path(tmp_path: Path) -> None:
    adapter = lj.init(jax.random.key(0), jnp.ones((4, 3)), {"**": lj.LoRA(rank=2, alpha=4)})
    save(tmp_path, adapter, base=jnp.ones((4, 3)))
    assert_same(restore(tmp_path, base=jnp.ones((4, 3))), adapter)


def test_numpy_arrays_and_scalars_can_be_saved(tmp_path: Path) -> None:
    variant = lj.LoRA(rank=np.int64(2), alpha=np.float32(0.1))
    adapter = {"k": lj.Adapter(variant, "io", a=np.ones((4, 2), np.float32), b=np.zeros((2, 3), np.float32))}
    save(tmp_path, adapter, base={"k": np.ones((4, 3))})
    assert_same(restore(tmp_path, base=None), jax.tree.map(jnp.asarray, adapter))


def test_saving_again_replaces_the_checkpoint(tmp_path: Path) -> None:
    for seed in range(3):
        save(tmp_path, make_adapter(seed=seed), base=make_base())
    other = {"query/kernel": make_adapter()["query/kernel"]}
    save(str(tmp_path), other, base=make_base())
    assert_same(restore(str(tmp_path), base=None), other)
    assert [entry.name for entry in tmp_path.iterdir()] == ["3"]


def test_a_relative_path_is_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save("run/adapter", make_adapter(), base=make_base())
    assert_same(restore(tmp_path / "run" / "adapter", base=None), make_adapter())


def test_the_manifest_is_readable(saved: Path) -> None:
    text = (saved / "0" / "adapter" / "adapter.json").read_text()
    manifest = json.loads(text)
    assert (manifest["format"], manifest["version"]) == ("lora_jax.adapter", 1)
    part = manifest["adapter"]["layers/1/kernel"]
    fields = {"rank": 3, "alpha": 0.1, "dropout": 0.0, "axes": None}
    assert part["variant"] == {"name": "RSLoRA", **fields}
    assert (part["scale"], part["axes"]) == (lj.RSLoRA(rank=3, alpha=0.1).scale, "io")
    assert part["arrays"]["a"] == {"shape": [16, 3], "dtype": "float32"}
    assert "scale" not in manifest["adapter"]["layers/0/bias"]
    assert list(manifest["base"]) == list(_fingerprint.fingerprint(make_base()))
    assert '\n        "b": {"shape": [3, 8], "dtype": "float32"}\n' in text


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        save(tmp_path, make_adapter(seed=seed), base=make_base())
    restore(tmp_path, base=make_base(), shardings=SingleDeviceSharding(jax.devices()[1]))
    assert capfd.readouterr() == ("", "")


def test_saving_works_inside_a_running_event_loop(tmp_path: Path) -> None:
    async def cell_of_a_notebook() -> dict[str, lj.Adapter]:
        save(tmp_path, make_adapter(), base=make_base())
        return restore(tmp_path, base=make_base())

    assert_same(asyncio.run(cell_of_a_notebook()), make_adapter())


# ---------------------------------------------------------------------------------------------------------------------
# Errors of saving


@dataclasses.dataclass(frozen=True, repr=False)
class Mine(lj.LoRA):
    """A variant that is not registered."""


KERNEL = make_adapter()["query/kernel"]
SHAPE = jax.eval_shape(lambda: KERNEL)
UNSAVABLE: dict[str, tuple[Any, str]] = {
    "params": (make_base(), "Expected an adapter: a dict from paths to `Adapter`, as `init` returns; got list at"),
    "empty": ({}, "with at least one leaf; got an empty one"),
    "shapes": ({"query/kernel": SHAPE}, "Expected arrays to save; got ShapeDtypeStruct as 'a' at 'query/kernel'"),
    "variant": (
        {"query/kernel": lj.Adapter(Mine(rank=2, alpha=4), "ioo", **KERNEL.arrays)},
        "which are restored by name; got Mine(rank=2, alpha=4) at 'query/kernel'",
    ),
    "path": (
        {"quary/kernel": KERNEL},
        "1 of the adapter's 1 paths are not in `base`.\n  'quary/kernel'; the closest paths are 'query/kernel'",
    ),
}


@pytest.mark.parametrize("name", UNSAVABLE)
def test_an_invalid_save_raises_before_any_file_changes(name: str, tmp_path: Path) -> None:
    adapter, text = UNSAVABLE[name]
    with pytest.raises(lj.CheckpointError) as caught:
        save(tmp_path / "new", adapter, base=make_base())
    assert text in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_another_byte_order_is_an_error_before_it_is_saved(tmp_path: Path) -> None:
    """The files would have the order of the machine, and the manifest the other one, with which nothing is restored."""
    arrays = {"a": np.ones((4, 1), ">f4"), "b": np.ones((1, 3), np.float32)}
    adapter = {"kernel": lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", **arrays)}
    with pytest.raises(
        lj.CheckpointError, match=r"got >f4 as 'a' at 'kernel'.\n  Convert it: array.astype\('float32'\)"
    ):
        lj.save(tmp_path / "saved", adapter, base={"kernel": np.ones((4, 3), np.float32)})
    assert not (tmp_path / "saved").exists()


def test_a_save_under_jit_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(lj.CheckpointError, match="Save outside `jit`"):
        jax.jit(lambda adapter: save(tmp_path, adapter, base=make_base()))(make_adapter())


def test_saving_donated_arrays_is_an_error() -> None:
    adapter = {"query/kernel": jax.tree.map(jnp.copy, KERNEL)}
    jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(jnp.negative, tree), donate_argnums=0)(adapter))
    with pytest.raises(lj.CheckpointError, match="'a' at 'query/kernel' is deleted, because it was donated to"):
        AdapterSave(adapter, base=make_base())


def test_saving_to_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(lj.CheckpointError, match="Expected a directory to save to; got a file"):
        save(tmp_path / "file", make_adapter(), base=make_base())


def test_a_save_does_not_delete_other_checkpoints(tmp_path: Path) -> None:
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(5, args=ocp.args.Composite(adapter=saving(), opt_state=ocp.args.StandardSave({"mu": jnp.ones(3)})))
    with pytest.raises(lj.CheckpointError, match=r"directories with 'opt_state', which this save would delete"):
        save(tmp_path, make_adapter(), base=make_base())
    assert_same(restore(tmp_path, base=None), make_adapter())
    (tmp_path / "runs" / "7").mkdir(parents=True)
    (tmp_path / "runs" / "7" / "model.bin").write_bytes(b"years of work")
    with pytest.raises(lj.CheckpointError, match=r"directories with 'model.bin', which this save would delete"):
        save(tmp_path / "runs", make_adapter(), base=make_base())


# ---------------------------------------------------------------------------------------------------------------------
# The base


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    base = make_base()
    change(base)
    return base


STRUCTURES: dict[str, tuple[Any, str]] = {
    "deeper": (make_base(depth=4), "  'layers/2/bias' is in `base` and was not when the adapter was saved\n"),
    "shallower": (make_base(depth=1), "  'layers/1/bias' is not in `base`\n"),
    "missing": (changed(lambda base: base.pop("query")), "  'query/kernel' is not in `base`\n"),
    "nested": ({"params": make_base()}, "(`variables` is not `variables['params']`)"),
    "shape": (
        changed(lambda base: base["query"].update(kernel=jnp.ones((16, 2, 8), jnp.bfloat16))),
        "  'query/kernel' has shape (16, 2, 8); it had (16, 4, 8)\n",
    ),
}
CONTENTS: dict[str, tuple[Any, str]] = {
    "values": (
        changed(lambda base: base["layers"][1].update(bias=jnp.ones(8))),
        "  'layers/1/bias' has other values\n",
    ),
    "dtype": (
        changed(lambda base: base["layers"][0].update(bias=jnp.zeros(8, jnp.float16))),
        "  'layers/0/bias' has dtype float16; it had float32\n",
    ),
    "another": (jax.tree.map(lambda leaf: leaf + 1, make_base()), "and 5 differences.\n"),
}


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("allow", [False, True])
def test_a_base_of_other_paths_or_shapes_is_an_error(name: str, allow: bool, saved: Path) -> None:
    base, text = STRUCTURES[name]
    got = error(saved, base=base, allow_base_mismatch=allow)
    assert text in got
    assert f"Expected `base` to be the base that the adapter in {saved}" in got
    assert "`allow_base_mismatch` allows other values and dtypes, not other paths or shapes." in got


@pytest.mark.parametrize("name", CONTENTS)
def test_a_base_of_other_values_is_an_error_unless_allowed(name: str, saved: Path) -> None:
    base, text = CONTENTS[name]
    got = error(saved, base=base)
    assert text in got
    assert "or pass allow_base_mismatch=True to use this one." in got
    assert_same(restore(saved, base=base, allow_base_mismatch=True), make_adapter())


def test_many_differences_are_counted_and_the_first_are_shown(saved: Path) -> None:
    got = error(saved, base=make_base(depth=30))
    assert "got another one, with 61 leaves (saved: 5) and 56 differences." in got
    assert "… and 48 more" in got


def test_only_the_structure_of_abstract_leaves_is_checked(saved: Path, tmp_path: Path) -> None:
    shapes = jax.eval_shape(lambda: make_base())
    assert_same(restore(saved, base=shapes), make_adapter())
    assert "is not in `base`" in error(saved, base=jax.eval_shape(lambda: make_base(depth=1)))
    save(tmp_path, make_adapter(), base=shapes)
    assert_same(restore(tmp_path, base=make_base()), make_adapter())
    assert "has dtype float32" in error(tmp_path, base=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), make_base()))


def test_the_fingerprint_changes_with_the_scale_and_with_any_row() -> None:
    kernel = np.random.default_rng(0).normal(size=(768, 768)).astype(np.float32)
    original = _fingerprint.fingerprint(kernel)
    assert _fingerprint.fingerprint(kernel * np.float32(1.0001)) != original
    rows, columns = _fingerprint._indices(kernel.shape)
    assert len(set(rows)) == len(set(columns)) == 64  # spread over distinct rows and columns
    assert _fingerprint.fingerprint(np.ones((8, 8))) != _fingerprint.fingerprint(np.eye(8))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("shape", [(), (0, 4), (3,), (64, 32), (16, 4, 8)], ids=str)
def test_the_fingerprint_does_not_depend_on_the_sharding(shape: tuple[int, ...], kind: AxisType) -> None:
    # Values that addition changes: −0 becomes 0, and a processor may flush subnormals to 0.
    leaf = np.resize(np.array([-0.0, 1.5, 1e-40, -1e-40, np.nan, np.inf], np.float32), shape)
    expected = _fingerprint.fingerprint({"leaf": leaf})
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    specs = [P()] if len(shape) < 2 or not leaf.size else [P("x"), P(None, "y"), P(("x", "y"))]
    places: list[Any] = [jax.devices()[3], *(NamedSharding(mesh, spec) for spec in specs)]
    places += [NamedSharding(mesh, spec, memory_kind="pinned_host") for spec in specs[:1]]
    for place in places:
        assert _fingerprint.fingerprint({"leaf": jax.device_put(leaf, place)}) == expected
        with jax.set_mesh(mesh):
            assert _fingerprint.fingerprint({"leaf": jax.device_put(leaf, place)}) == expected


def test_the_fingerprint_gathers_no_leaf() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    leaf = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    compiled = _fingerprint._lookup.lower(leaf, _fingerprint._indices(leaf.shape), NamedSharding(mesh, P())).compile()
    assert "all-gather" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 64 * 32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e5m2", "float4_e2m1fn", "int8", "int4", "complex64"])
def test_the_fingerprint_is_bitwise_for_every_dtype(dtype: str) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    leaf = (np.arange(64).reshape(16, 4) % 7).astype(jnp.dtype(dtype))
    if jnp.issubdtype(dtype, np.floating):
        leaf = (leaf.astype(np.float32) * float(jnp.finfo(dtype).smallest_subnormal)).astype(dtype)
    expected = _fingerprint.fingerprint({"leaf": leaf}, {"leaf"})
    assert "content" in expected["leaf"]
    for place in (jax.devices()[0], NamedSharding(mesh, P("x"))):
        assert _fingerprint.fingerprint({"leaf": jax.device_put(leaf, place)}, {"leaf"}) == expected
    changed = leaf.copy()
    changed[3, 1] = 2
    assert _fingerprint.fingerprint({"leaf": changed}, {"leaf"}) != expected


def test_leaves_that_are_not_weights_are_described_by_type() -> None:
    others = {"key": jax.random.key(0), "name": "gelu", "none": None, "count": jnp.uint32(3), "mask": np.ones(2, bool)}
    assert _fingerprint.fingerprint(others) == {
        "count": {"shape": [], "dtype": "uint32"},
        "key": {"shape": [], "dtype": "key<fry>"},
        "mask": {"shape": [2], "dtype": "bool"},
        "name": {"shape": [], "dtype": "str"},
    }


class Dropping(nnx.Module):
    """A model whose state changes with each call, while its weights do not."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear, self.dropout = nnx.Linear(8, 8, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(self.linear(x))


def test_changed_random_state_does_not_change_the_base(tmp_path: Path) -> None:
    model = Dropping(nnx.Rngs(0))
    adapter = lj.init(jax.random.key(1), nnx.state(model), {"linear/kernel": lj.LoRA(rank=2, alpha=4)})
    model(jnp.ones((1, 8)))
    save(tmp_path, adapter, base=nnx.state(model))
    assert_same(restore(tmp_path, base=nnx.state(Dropping(nnx.Rngs(0, dropout=7)))), adapter)
    assert_same(restore(tmp_path, base=nnx.state(model, nnx.Param)), adapter)
    assert "'linear/kernel' has other values" in error(tmp_path, base=nnx.state(Dropping(nnx.Rngs(1))))


def test_only_weights_identify_a_base(tmp_path: Path) -> None:
    """The fingerprint covers adapted leaves and floating-point leaves, and ignores all others."""
    weights = {"packed": np.arange(12, dtype=np.int8).reshape(4, 3), "norm": 0.5, "kernel": normal((4, 3))}
    others = {"step": 3, "mask": np.array([True]), "ids": jnp.arange(3), "key": jax.random.key(0), "name": "gelu"}
    adapter = lj.init(jax.random.key(0), {"packed": jnp.ones((4, 3))}, {"packed": lj.LoRA(rank=2, alpha=4)})
    save(tmp_path, adapter, base=weights | others)
    other = {"step": 4, "mask": np.array([False]), "ids": jnp.arange(4), "key": jax.random.PRNGKey(1), "name": None}
    for rest in ({}, other, {"more": np.arange(2)}):
        assert_same(restore(tmp_path, base=weights | rest), adapter)
    for name, value in {"packed": -weights["packed"], "norm": 0.25, "kernel": normal((4, 3), seed=1)}.items():
        assert error(tmp_path, base=weights | {name: value}).count("has other values") == 1
    assert "'packed' has dtype int32; it had int8" in error(tmp_path, base=weights | {"packed": np.ones((4, 3), int)})


WIDE = np.random.default_rng(0).normal(size=(16, 8))  # NumPy's float64, which JAX converts to float32
KINDS = {"float64": WIDE, "float32": WIDE.astype(np.float32), "jax": jnp.asarray(WIDE)}


@pytest.mark.parametrize(("stored", "current"), [*itertools.permutations(KINDS, 2), ("float64", "float64")])
def test_a_base_is_compared_at_the_precision_of_jax(stored: str, current: str, tmp_path: Path) -> None:
    adapter = lj.init(jax.random.key(0), {"kernel": KINDS[stored]}, {"kernel": lj.LoRA(rank=2, alpha=4)})
    save(tmp_path, adapter, base={"kernel": KINDS[stored]})
    assert_same(restore(tmp_path, base={"kernel": KINDS[current]}), adapter)
    assert "'kernel' has other values" in error(tmp_path, base={"kernel": KINDS[current] + np.float32(1e-6)})
    with jax.enable_x64(True):
        assert "'kernel' has dtype float64; it had float32" in error(tmp_path, base={"kernel": WIDE})


def test_a_base_in_64_bits_is_compared_in_64_bits(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        adapter = lj.init(jax.random.key(0), {"kernel": WIDE}, {"kernel": lj.LoRA(rank=2, alpha=4)})
        save(tmp_path, adapter, base={"kernel": WIDE})
        restore(tmp_path, base={"kernel": jnp.asarray(WIDE)})
        assert "'kernel' has other values" in error(tmp_path, base={"kernel": WIDE + 1e-12})
    restore(tmp_path, base={"kernel": WIDE})


def lookups(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collects the shapes of all leaves whose values are read for a fingerprint."""
    shapes, lookup = [], _fingerprint._lookup

    def counted(values: jax.Array, *args: Any) -> Any:
        shapes.append(values.shape)
        return lookup(values, *args)

    monkeypatch.setattr(_fingerprint, "_lookup", counted)
    return shapes


def test_the_fingerprint_of_a_base_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, shapes = make_base(), lookups(monkeypatch)
    with ocp.CheckpointManager(tmp_path) as manager:
        for step in range(3):
            manager.save(step, args=ocp.args.Composite(adapter=AdapterSave(make_adapter(), base=base)))
            assert len(shapes) == len(jax.tree.leaves(base))
        base["layers"][1] = {"kernel": normal((16, 8), seed=9), "bias": base["layers"][1]["bias"]}
        manager.save(3, args=ocp.args.Composite(adapter=AdapterSave(make_adapter(), base=base)))
    assert shapes[5:] == [(16, 8)]
    restore(tmp_path, base=base)
    assert len(shapes) == 6
    assert "'layers/1/kernel' has other values" in error(tmp_path, base=make_base())


def test_a_cached_fingerprint_is_not_used_for_another_array() -> None:
    gc.collect()
    before = len(_fingerprint._cache)
    for number in range(50):  # most reuse the address of an earlier one
        leaf = jnp.full((4, 3), float(number))
        expected = _fingerprint.fingerprint(np.full((4, 3), number, np.float32))
        assert _fingerprint.fingerprint(leaf) == _fingerprint.fingerprint(leaf) == expected
    del leaf
    assert len(_fingerprint._cache) == before
    leaf = np.zeros((4, 3), np.float32)
    zeros = _fingerprint.fingerprint(leaf)
    leaf[1, 1] = 1  # a NumPy array may change
    assert _fingerprint.fingerprint(leaf) != zeros


def test_a_base_that_was_donated_is_an_error(tmp_path: Path) -> None:
    base = make_base()
    save(tmp_path, make_adapter(), base=base)
    jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(jnp.negative, tree), donate_argnums=0)(base))
    with pytest.raises(lj.CheckpointError, match="'layers/0/bias' is deleted, because it was donated to"):
        save(tmp_path, make_adapter(), base=base)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of earlier versions


def test_a_run_stored_by_version_1_is_restored() -> None:
    base, adapter = stored_run.base(), stored_run.adapter()
    manifest = json.loads((stored_run.STORED / "5" / "adapter" / "adapter.json").read_text())
    assert (manifest["version"], manifest["lora_jax"]) == (1, "0.1.0")
    # Added to the format after the run was stored; `test_mixtures.py` and `test_variants.py` save them.
    later = {"Mixture", "DeLoRA", "IA3", "Layers", "LoRAXS", "MiSS", "QALoRA"}
    assert {part["variant"]["name"] for part in manifest["adapter"].values()} == set(_VARIANTS) - later
    assert_same(restore(stored_run.STORED, base=base), adapter)
    with ocp.CheckpointManager(stored_run.STORED) as manager:
        items = {"adapter": AdapterRestore(base=base), "state": StateRestore(stored_run.state())}
        restored = manager.restore(5, args=ocp.args.Composite(**items))
    assert_same(restored.adapter, adapter)
    assert bits(restored.state) == bits(stored_run.state())


def test_a_field_of_a_variant_is_read_by_its_former_name(tmp_path: Path) -> None:
    base = {"kernel": normal((4, 3))}
    adapter = lj.init(jax.random.key(0), base, {"kernel": lj.DoRA(rank=2, alpha=4, rank_stabilized=True)})
    save(tmp_path, adapter, base=base)
    variant = json.loads((tmp_path / "0" / "adapter" / "adapter.json").read_text())["adapter"]["kernel"]["variant"]
    variant["rank_stabilised"] = variant.pop("rank_stabilized")
    edit(tmp_path, lambda m: m["adapter"]["kernel"].update(variant=variant))
    assert_same(restore(tmp_path, base=base), adapter)


def test_a_base_described_by_version_1_is_checked_by_its_weights() -> None:
    base = stored_run.base()
    others = {"dropout": {"count": jnp.uint32(9), "key": jax.random.key(1)}}
    assert_same(restore(stored_run.STORED, base=base | others), stored_run.adapter())
    in_jax = jax.tree.map(jnp.asarray, base | {"activation": 0})
    assert_same(restore(stored_run.STORED, base=in_jax), stored_run.adapter())
    head = {"kernel": base["head"]["kernel"] + 1e-12, "mask": base["head"]["mask"]}
    changes = {"embedding": -base["embedding"], "packed": -base["packed"], "head": head}
    for name, value in changes.items():
        assert f"'{name}{'/kernel' * (name == 'head')}' has other values" in error(
            stored_run.STORED, base=base | {name: value}
        )


# ---------------------------------------------------------------------------------------------------------------------
# Shardings


def devices(array: jax.Array) -> set[int]:
    return {device.id for device in array.devices()}


def test_without_shardings_arrays_are_placed_as_init_places_them(saved: Path) -> None:
    adapter = restore(saved, base=None)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    kernel = jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, P("x")))
    # An array committed to one device cannot be combined with one on eight.
    assert len(devices(jax.jit(jnp.matmul)(kernel, adapter["query/kernel"].a))) == 8


def test_one_sharding_may_apply_to_all_arrays(saved: Path) -> None:
    mesh = jax.make_mesh((8,), ("x",))
    adapter = restore(saved, base=None, shardings=NamedSharding(mesh, P()))
    assert_same(adapter, make_adapter())
    assert all(leaf.sharding == NamedSharding(mesh, P()) for leaf in jax.tree.leaves(adapter))


@pytest.mark.parametrize("kind", ["device", "pinned_host"])
def test_shardings_may_be_a_tree_with_the_structure_of_the_adapter(kind: str, tmp_path: Path) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"))

    def sharding(leaf: jax.Array) -> NamedSharding:
        return NamedSharding(mesh, P("x") if leaf.shape[0] % 4 == 0 else P(None, "y"), memory_kind=kind)

    adapter = jax.device_put(make_adapter(), jax.tree.map(sharding, make_adapter()))
    save(tmp_path, adapter, base=make_base())
    got = restore(tmp_path, base=None, shardings=jax.tree.map(lambda leaf: leaf.sharding, adapter))
    assert_same(jax.device_get(got), jax.device_get(make_adapter()))
    assert [leaf.sharding for leaf in jax.tree.leaves(got)] == [leaf.sharding for leaf in jax.tree.leaves(adapter)]
    assert_same(restore(tmp_path, base=None), make_adapter())  # to one device, from eight


def test_shardings_may_be_a_prefix_with_none(saved: Path) -> None:
    place = SingleDeviceSharding(jax.devices()[5])
    adapter = restore(saved, base=None, shardings=dict.fromkeys(make_adapter()) | {"query/kernel": place})
    assert {path: devices(jax.tree.leaves(part)[0]) for path, part in adapter.items()} == {
        path: {5} if path == "query/kernel" else {0} for path in adapter
    }


def test_shardings_that_do_not_fit_are_an_error(saved: Path) -> None:
    mesh = jax.make_mesh((8,), ("x",))
    place = NamedSharding(mesh, P("x"))
    for shardings in ({"query/kernel": place}, place, "x"):
        got = error(saved, shardings=shardings)
        assert (
            f"Expected `shardings` to be a Sharding, or a tree of them that is a prefix of the adapter in {saved}"
            in got
        )
        assert "Leave `shardings` out to restore onto the default device." in got


# ---------------------------------------------------------------------------------------------------------------------
# Errors of restoring


def test_restoring_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    assert f"lora_jax wrote, at {tmp_path}/no; the directory does not exist." in error(tmp_path / "no")
    assert "the directory contains none" in error(tmp_path)
    (tmp_path / "0.orbax-checkpoint-tmp").mkdir()
    got = error(tmp_path)
    assert "contains only an incomplete one, whose save was interrupted" in got
    assert "Pass the path that `save` wrote to, or the directory of a CheckpointManager" in got


def test_a_checkpoint_of_another_kind_is_an_error(tmp_path: Path) -> None:
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.StandardSave({"w": jnp.ones(3)}))
        manager.wait_until_finished()
    assert f"wrote, at {tmp_path}/0/adapter; the directory does not exist." in error(tmp_path)


def replace(manifest: Any, path: str, **fields: Any) -> None:
    manifest["adapter"][path]["variant"].update(fields)


EDITS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "newer": (lambda m: m.update(version=2), "format version 1 or older; got version 2, written by lora_jax"),
    "no version": (lambda m: m.pop("version"), "got version None"),
    "other format": (
        lambda m: m.update(format="peft"),
        "Expected a manifest of format 'lora_jax.adapter'; got another format",
    ),
    "unknown variant": (
        lambda m: replace(m, "query/kernel", name="Unknown"),
        f"one of the variants {', '.join(_VARIANTS)}; got 'Unknown' at 'query/kernel', in ",
    ),
    "unknown field": (
        lambda m: replace(m, "query/kernel", beta=1),
        "its manifest has unexpected contents (TypeError(",
    ),
    "edited alpha": (
        lambda m: replace(m, "query/kernel", alpha=8),
        "Expected LoRA(rank=2, alpha=8) to have the saved scale 8.0; got 4.0 at 'query/kernel'",
    ),
    "no adapter": (lambda m: m.pop("adapter"), "its manifest has unexpected contents (KeyError('adapter'))"),
    "no base": (lambda m: m.pop("base"), "its manifest has unexpected contents (KeyError('base'))"),
    "other shape": (
        lambda m: m["adapter"]["layers/0/bias"]["arrays"]["value"].update(shape=[9]),
        "ValueError: got float32[8]; the manifest has float32[9]",
    ),
    "float64": (
        lambda m: m["adapter"]["layers/0/bias"]["arrays"]["value"].update(dtype="float64"),
        "Expected to restore float64 at 'layers/0/bias'",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_invalid_manifest_is_an_error(name: str, copy: Path) -> None:
    change, text = EDITS[name]
    edit(copy, change)
    got = error(copy, base=make_base())
    assert text in got
    assert str(copy) in got


def test_a_corrupt_manifest_is_an_error(copy: Path) -> None:
    file = copy / "0" / "adapter" / "adapter.json"
    content = file.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"\xff" + content):
        file.write_bytes(damaged)
        assert "'adapter.json' has changed" in error(copy)
        _checksums.write(epath.Path(file.parent))
        assert "Expected a complete checkpoint; its manifest is not valid JSON" in error(copy)


# ---------------------------------------------------------------------------------------------------------------------
# Killed processes


def run(*commands: tuple[object, ...]) -> str:
    """The output of `checkpoint_killed.py` for several commands in one process."""
    words = [str(word) for command in commands for word in (*command, "--")]
    program = [sys.executable, checkpoint_killed.__file__, *words]
    ran = subprocess.run(program, env=environment(), check=True, timeout=1800, stdout=subprocess.PIPE, text=True)
    return ran.stdout


def killed_runs(root: Path, kills: int) -> list[tuple[object, ...]]:
    return [("run", kind, root / kind, kills, kills) for kind in ("async", "sync", "single")]


DELAYS = [0.04 * count for count in range(1, 11)]


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory in which saves were killed in several ways, and the output."""
    root = tmp_path_factory.mktemp("kills")
    return root, run(("events", root / "events"), ("timed", root / "timed", *DELAYS), *killed_runs(root, 5))


def number_of(path: Path) -> float:
    """The number of the adapter at a path, which must be complete."""
    got = restore(path, base=checkpoint_killed.BASE)
    number = float(got["bias"].value[0])
    assert_same(got, jax.tree.map(jnp.asarray, checkpoint_killed.adapter(number)))
    return number


@pytest.mark.sweep
def test_a_save_killed_before_any_write_leaves_a_complete_checkpoint(kills: tuple[Path, str]) -> None:
    root = kills[0] / "events"
    numbers = [number_of(root / str(moment)) for moment in range(len(list(root.iterdir())) - 1)]
    assert len(numbers) > 12
    assert numbers == sorted(numbers)  # the first adapter until the second is complete
    assert set(numbers) == {1, 2}
    for moment in range(0, len(numbers), 5):
        save(root / str(moment), checkpoint_killed.adapter(3), base=checkpoint_killed.BASE)
        assert number_of(root / str(moment)) == 3
        assert len(list((root / str(moment)).iterdir())) == 1  # no files of the killed save remain


@pytest.mark.sweep
def test_saves_killed_in_sequence_leave_a_complete_checkpoint(kills: tuple[Path, str]) -> None:
    assert number_of(kills[0] / "timed") in range(len(DELAYS) + 1)


def check_kills(printed: str, kind: str, kills: int) -> None:
    """Checks which steps were restored; the run itself compares the contents bit for bit."""
    reports = [report for line in printed.splitlines() if (report := json.loads(line))["kind"] == kind]
    assert len(reports) == kills + 1
    assert [report["restored"] for report in reports] == [report["newest"] for report in reports]
    newest = [report["newest"] for report in reports]
    assert newest == sorted(newest)
    half = sum(report["half written"] for report in reports)
    assert half > 5 or kills < 50  # a few kills may all fall between two saves
    print(f"{kind}: {len(reports)} kills, {half} left an incomplete step, and each run resumed; steps {newest}")


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["async", "sync", "single"])
def test_a_run_killed_at_any_moment_resumes_from_its_newest_checkpoint(kind: str, kills: tuple[Path, str]) -> None:
    check_kills(kills[1], kind, 5)


@pytest.mark.slow
def test_a_run_killed_repeatedly_resumes_from_its_newest_checkpoint(tmp_path: Path) -> None:
    printed = run(*killed_runs(tmp_path, 50))
    for kind in ("async", "sync", "single"):
        check_kills(printed, kind, 50)


# If one array cannot be read, Orbax closes its event loop before TensorStore has answered for the others.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_checkpoint_can_be_read_while_another_process_saves(tmp_path: Path) -> None:
    save(tmp_path, checkpoint_killed.adapter(0), base=checkpoint_killed.BASE)
    process = subprocess.Popen(
        [sys.executable, checkpoint_killed.__file__, "many", str(tmp_path), "8"], env=environment()
    )
    numbers = [0.0]
    while process.poll() is None:
        numbers.append(number_of(tmp_path))
    assert process.returncode == 0
    assert numbers == sorted(numbers)
    assert number_of(tmp_path) == 7


# ---------------------------------------------------------------------------------------------------------------------
# With a CheckpointManager


def saving(adapter: Any = None) -> AdapterSave:
    return AdapterSave(make_adapter() if adapter is None else adapter, base=make_base())


def test_an_asynchronous_save_writes_the_adapter_at_the_time_of_the_call(tmp_path: Path) -> None:
    spoil = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    with ocp.CheckpointManager(tmp_path) as manager:
        for step in range(3):
            adapter = {"k": lj.Adapter(lj.Full(), "", value=jnp.full((1000, 1000), 1.0 + step))}
            manager.save(
                step, args=ocp.args.Composite(adapter=AdapterSave(adapter, base={"k": jnp.ones((1000, 1000))}))
            )
            for _ in range(3):
                adapter = spoil(adapter)
            jax.block_until_ready(adapter)
            manager.wait_until_finished()
            restored = manager.restore(step, args=ocp.args.Composite(adapter=AdapterRestore(base=None)))
            assert np.all(np.asarray(restored.adapter["k"].value) == 1.0 + step)


def test_the_newest_adapter_of_a_run_can_be_restored_without_the_state(tmp_path: Path) -> None:
    with ocp.CheckpointManager(tmp_path) as manager:
        for step in (10, 9, 100):
            items = ocp.args.Composite(
                adapter=saving(make_adapter(seed=step)), state=ocp.args.StandardSave({"n": step})
            )
            manager.save(step, args=items, force=True)
    assert_same(restore(tmp_path, base=make_base()), make_adapter(seed=100))


def test_a_manager_checks_the_base_unless_told_otherwise(tmp_path: Path) -> None:
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.Composite(adapter=saving()))
        manager.wait_until_finished()
        with pytest.raises(ValueError, match="missing 1 required keyword-only argument: 'base'"):
            manager.restore(0)
        unchecked = manager.restore(0, args=ocp.args.Composite(adapter=AdapterRestore(base=None)))
        assert_same(unchecked.adapter, make_adapter())
        assert manager.item_metadata(0).adapter["version"] == 1
        wrong = AdapterRestore(base=make_base(depth=3))
        with pytest.raises(lj.CheckpointError, match="'layers/2/bias' is in `base`"):
            manager.restore(0, args=ocp.args.Composite(adapter=wrong))


def test_a_step_that_the_manager_skips_computes_no_fingerprint(tmp_path: Path) -> None:
    with ocp.CheckpointManager(tmp_path, options=ocp.CheckpointManagerOptions(save_interval_steps=2)) as manager:
        args = [saving(), saving()]
        assert [manager.save(step, args=ocp.args.Composite(adapter=item)) for step, item in enumerate(args)] == [
            True,
            False,
        ]
    assert ["manifest" in vars(item) for item in args] == [True, False]


def test_an_adapter_may_be_the_only_item_of_a_checkpointer(tmp_path: Path) -> None:
    with ocp.Checkpointer(lj.checkpoint.AdapterHandler()) as checkpointer:
        checkpointer.save(tmp_path / "one", args=saving())
        assert_same(checkpointer.restore(tmp_path / "one", args=AdapterRestore(base=None)), make_adapter())
