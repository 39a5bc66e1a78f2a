"""A missing, truncated, changed or exchanged file of a checkpoint is an error that names it, never a wrong value."""

import contextlib
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoint_killed
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from helpers import bits, environment
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax as lj
from lora_jax.checkpoint import AdapterRestore, AdapterSave, StateRestore, StateSave, _checksums, restore, save

BASE = {"kernel": np.ones((64, 32), np.float32)}


def training(seed: int) -> tuple[dict[str, lj.Adapter], dict[str, Any]]:
    """An adapter and a state of distinct values, sharded over eight devices."""
    draw = np.random.default_rng(seed).normal
    sharding = NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec("x"))
    factors = {
        "a": jax.device_put(jnp.asarray(draw(size=(64, 2)), jnp.float32), sharding),
        "b": jnp.asarray(draw(size=(2, 32)), jnp.bfloat16),
    }
    adapter = {"kernel": lj.Adapter(lj.LoRA(rank=2, alpha=4), "io", **factors)}
    state = {"mu": jax.tree.map(jnp.negative, adapter), "key": jax.random.key(seed), "step": seed, "note": "a run"}
    return adapter, state


def put(path: Path, seed: int) -> None:
    adapter, state = training(seed)
    with ocp.CheckpointManager(path) as manager:
        manager.save(5, args=ocp.args.Composite(adapter=AdapterSave(adapter, base=BASE), state=StateSave(state)))


def got(path: Path) -> Any:
    state = training(0)[1]
    with ocp.CheckpointManager(path) as manager:
        items = ocp.args.Composite(adapter=AdapterRestore(base=BASE), state=StateRestore(state))
        restored = manager.restore(5, args=items)
    return restored.adapter, restored.state


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints that differ only in their values."""
    root = tmp_path_factory.mktemp("twins")
    for seed, name in enumerate(("one", "other"), 1):
        put(root / name, seed)
    return root / "one", root / "other"


def files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@contextlib.contextmanager
def damaged(file: Path, changed: bytes | None) -> Iterator[None]:
    """Replaces the bytes of a file, or removes it for None, and restores it afterwards."""
    content = file.read_bytes()
    file.unlink() if changed is None else file.write_bytes(changed)
    try:
        yield
    finally:
        file.write_bytes(content)


def damages(file: Path, twin: Path) -> dict[str, bytes | None]:
    """The bytes of a damaged file by kind of damage; None for a missing file."""
    content, draw = file.read_bytes(), random.Random(file.name)
    bits = {0, 8 * len(content) - 1, *(draw.randrange(8 * len(content)) for _ in range(6))}
    foreign = next((same for same in files(twin) if same.name == file.name and same.read_bytes() != content), twin)
    return {
        "lost": None,
        "emptied": b"",
        "truncated": content[: len(content) // 2],
        "one byte short": content[:-1],
        "one byte long": content + b"\0",
        "zeros": bytes(len(content)),
        "foreign": foreign.read_bytes() if foreign.is_file() else draw.randbytes(len(content)),
        **{f"bit {bit}": flipped(content, bit) for bit in bits},
    }


def test_checksums_find_every_damage_to_every_file(twins: tuple[Path, Path]) -> None:
    """Covers all files of the items; Orbax's own files of a step have no checksum."""
    one, other = twins
    count = 0
    for item in (one / "5" / "adapter", one / "5" / "state"):
        for file in files(item):
            name, content = file.relative_to(item).as_posix(), file.read_bytes()
            for damage, changed in damages(file, other).items() if file.name not in _checksums.UNCHECKED else ():
                with damaged(file, changed), pytest.raises(lj.CheckpointError) as error:
                    _checksums.verify(epath.Path(item))
                assert f"{name!r}" in str(error.value), (damage, str(error.value))
                assert f"in {item}." in str(error.value)
                count += 1
            assert file.read_bytes() == content
        _checksums.verify(epath.Path(item))
    assert count > 300


def test_no_kind_of_damage_gives_wrong_values(twins: tuple[Path, Path]) -> None:
    """Covers each kind of damage, for one file of each item and for all files without a checksum."""
    one, other = twins
    expected = got(one)
    assert bits(expected) == bits(training(1))
    for item in ("adapter", "state"):
        own = [file for file in files(one / "5" / item) if file.name not in _checksums.UNCHECKED]
        for number, kind in enumerate(damages(own[0], other)):
            file = own[number % len(own)]
            changed = [*damages(file, other).values()][number % len(damages(file, other))]
            with damaged(file, changed), pytest.raises(lj.CheckpointError) as error:
                got(one)
            assert f"{file.relative_to(one / '5' / item).as_posix()!r}" in str(error.value), (kind, str(error.value))
    for file in (file for file in files(one) if file.name in _checksums.UNCHECKED):
        for changed in dict.fromkeys(damages(file, other).values()):
            with damaged(file, changed):
                assert bits(got(one)) == bits(expected)


@pytest.mark.sweep
def test_no_damage_to_any_file_gives_wrong_values(twins: tuple[Path, Path]) -> None:
    """Covers each kind of damage for every file."""
    one, other = twins
    expected, counts = got(one), Counter[str]()
    for file in files(one):
        name = file.relative_to(one)
        for damage, changed in damages(file, other).items():
            with damaged(file, changed):
                try:
                    assert bits(got(one)) == bits(expected)
                    counts["the same numbers"] += 1
                    # Orbax's own files of a step.
                    assert name.name in _checksums.UNCHECKED, f"{name}, {damage}: nobody noticed"
                except lj.CheckpointError as error:
                    inside = name.relative_to(Path("5", name.parts[1])).as_posix()
                    assert f"{inside!r}" in str(error), (damage, str(error))
                    assert f"{one}/5/{name.parts[1]}." in str(error)
                    counts["named"] += 1
    assert bits(got(one)) == bits(expected)
    print(f"{len(files(one))} files, {counts.total()} damages: {dict(counts)}")
    assert counts["named"] > 300


def test_a_file_of_another_checkpoint_is_reported(twins: tuple[Path, Path], tmp_path: Path) -> None:
    """Replaces one file of an item by the same file of a checkpoint with other values."""
    one, other = twins
    for item in ("adapter", "state"):
        shutil.copytree(one, tmp_path / item)
        for file in files(other / "5" / item):
            inside = file.relative_to(other)
            (tmp_path / item / inside).parent.mkdir(exist_ok=True)
            if file.name != _checksums.NAME:
                shutil.copy(file, tmp_path / item / inside)
        with pytest.raises(lj.CheckpointError, match=r"'manifest.ocdbt' has changed\n|is not a file of this"):
            got(tmp_path / item)


def test_an_unknown_file_is_reported_unless_the_system_made_it(twins: tuple[Path, Path]) -> None:
    one, _ = twins
    item = one / "5" / "adapter"
    (item / ".DS_Store").write_bytes(b"\0")
    assert bits(restore(one, base=None)) == bits(training(1)[0])
    (item / "array_metadatas" / "process_1").write_text("{}")
    with pytest.raises(lj.CheckpointError, match="'array_metadatas/process_1' is not a file of this checkpoint"):
        restore(one, base=None)
    (item / "array_metadatas" / "process_1").unlink()
    (item / ".DS_Store").unlink()


def test_checksums_match_sha256sum(twins: tuple[Path, Path]) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    item = twins[0] / "5" / "state"
    checked = subprocess.run(["sha256sum", "--check", "--strict", _checksums.NAME], cwd=item, capture_output=True)
    assert checked.returncode == 0
    own = [file for file in files(item) if file.name not in {_checksums.NAME, *_checksums.UNCHECKED}]
    assert checked.stdout.count(b": OK\n") == len(own) > 8


# ---------------------------------------------------------------------------------------------------------------------
# A full disk


LIMITS = [50, 200, 400, 600, 700, 1000]  # the last affects only the file of checksums


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of saves, and of a run that saves in the background, on a full disk, and their errors.

    The disk is simulated by limits on the size of files, which stop a save at different files.
    """
    root = tmp_path_factory.mktemp("full")
    words = ["full", root / "saves", *LIMITS, "--", "room", root / "run"]
    program = [sys.executable, checkpoint_killed.__file__, *map(str, words)]
    ran = subprocess.run(program, env=environment(), check=True, timeout=100, capture_output=True, text=True)
    return root, ran.stdout


def test_a_save_on_a_full_disk_raises_and_keeps_the_previous_one(full: tuple[Path, str]) -> None:
    root = full[0] / "saves"
    errors = full[1].split("\n\n")[:-1]
    assert len(errors) == len(LIMITS)
    for error in errors:
        assert f"Cannot write a checkpoint to {root}.\n" in error
        assert "File too large" in error
    assert bits(restore(root, base=None)) == bits(checkpoint_killed.adapter(1))
    save(root, checkpoint_killed.adapter(3), base=checkpoint_killed.BASE)
    assert bits(restore(root, base=None)) == bits(checkpoint_killed.adapter(3))
    assert [entry.name for entry in root.iterdir()] == ["1"]  # no files of the failed saves remain


def test_a_background_save_on_a_full_disk_raises_and_the_run_can_continue(full: tuple[Path, str]) -> None:
    root, output = full[0] / "run", full[1].split("\n\n")[-1]
    assert f'Failed writing: "{root}/1.orbax-checkpoint-tmp/' in output
    assert "File too large" in output
    run = checkpoint_killed.Run("async", root)
    assert run.restored() == 1
    assert list(run.manager.all_steps()) == [0, 1]
    run.manager.close()
