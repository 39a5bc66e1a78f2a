"""A checkpoint with a file lost, cut, changed or exchanged gives an error that names it, and never other numbers."""

import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import checkpoint_killed
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import bits, environment
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax as lj
from lora_jax import _checksums
from lora_jax.checkpoint import AdapterRestore, AdapterSave, StateRestore, StateSave, restore, save

BASE = {"kernel": np.ones((64, 32), np.float32)}


def training(seed: int) -> tuple[dict[str, lj.Adapter], dict[str, Any]]:
    """An adapter and a state, cut over eight devices, and no two numbers of them alike."""
    draw = np.random.default_rng(seed).normal
    cut = NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec("x"))
    factors = {
        "a": jax.device_put(jnp.asarray(draw(size=(64, 2)), jnp.float32), cut),
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
    """Two checkpoints that differ in nothing but their numbers."""
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


def damages(file: Path, twin: Path) -> dict[str, bytes | None]:
    """What may have become of a file: other bytes, or None where it is lost."""
    content, draw = file.read_bytes(), random.Random(file.name)
    bits = {0, 8 * len(content) - 1, *(draw.randrange(8 * len(content)) for _ in range(6))}
    foreign = next((same for same in files(twin) if same.name == file.name and same.read_bytes() != content), twin)
    return {
        "lost": None,
        "emptied": b"",
        "cut": content[: len(content) // 2],
        "one byte short": content[:-1],
        "one byte long": content + b"\0",
        "zeros": bytes(len(content)),
        "foreign": foreign.read_bytes() if foreign.is_file() else draw.randbytes(len(content)),
        **{f"bit {bit}": flipped(content, bit) for bit in bits},
    }


def test_no_damage_to_any_file_gives_other_numbers(twins: tuple[Path, Path]) -> None:
    one, other = twins
    expected, counts = got(one), Counter[str]()
    assert bits(expected) == bits(training(1))
    for file in files(one):
        name, content = file.relative_to(one), file.read_bytes()
        for damage, changed in damages(file, other).items():
            file.unlink() if changed is None else file.write_bytes(changed)
            try:
                assert bits(got(one)) == bits(expected)
                counts["the same numbers"] += 1
                # What Orbax keeps of a step besides its items.
                assert name.name in _checksums.LATER, f"{name}, {damage}: nobody noticed"
            except lj.CheckpointError as error:
                inside = name.relative_to("5", name.parts[1]).as_posix()
                assert f"{inside!r}" in str(error), (damage, str(error))
                assert f"{one}/5/{name.parts[1]}." in str(error)
                counts["named"] += 1
            file.write_bytes(content)
    assert bits(got(one)) == bits(expected)
    print(f"{len(files(one))} files, {counts.total()} damages: {dict(counts)}")
    assert counts["named"] > 300


def test_a_file_of_another_checkpoint_is_named(twins: tuple[Path, Path], tmp_path: Path) -> None:
    """The whole of an item but one file, of either kind, from a checkpoint with other numbers."""
    one, other = twins
    for item in ("adapter", "state"):
        shutil.copytree(one, tmp_path / item)
        for file in files(other / "5" / item):
            inside = file.relative_to(other)
            (tmp_path / item / inside).parent.mkdir(exist_ok=True)
            if file.name != _checksums.NAME:
                shutil.copy(file, tmp_path / item / inside)
        with pytest.raises(lj.CheckpointError, match=r"'manifest.ocdbt' has changed\n|is none of its files"):
            got(tmp_path / item)


def test_a_file_that_was_not_written_is_named_unless_it_is_the_system_s(twins: tuple[Path, Path]) -> None:
    one, _ = twins
    item = one / "5" / "adapter"
    (item / ".DS_Store").write_bytes(b"\0")
    assert bits(restore(one)) == bits(training(1)[0])
    (item / "array_metadatas" / "process_1").write_text("{}")
    with pytest.raises(lj.CheckpointError, match="'array_metadatas/process_1' is none of its files"):
        restore(one)
    (item / "array_metadatas" / "process_1").unlink()
    (item / ".DS_Store").unlink()


def test_the_checksums_are_those_of_sha256sum(twins: tuple[Path, Path]) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    item = twins[0] / "5" / "state"
    checked = subprocess.run(["sha256sum", "--check", "--strict", _checksums.NAME], cwd=item, capture_output=True)
    assert checked.returncode == 0
    own = [file for file in files(item) if file.name not in {_checksums.NAME, *_checksums.LATER}]
    assert checked.stdout.count(b": OK\n") == len(own) > 8


# ---------------------------------------------------------------------------------------------------------------------
# A disk that is full


def test_a_save_that_finds_no_room_says_so_and_leaves_the_one_before(tmp_path: Path) -> None:
    """No file can grow beyond a limit, which stops the save at one file or another."""
    limits = [50, 200, 400, 600, 700, 1000]  # the last stops none but the checksums
    program = [sys.executable, checkpoint_killed.__file__, "full", str(tmp_path), *map(str, limits)]
    ran = subprocess.run(program, env=environment(), check=True, timeout=100, capture_output=True, text=True)
    errors = ran.stdout.split("\n\n")[:-1]
    assert len(errors) == len(limits)
    for error in errors:
        assert f"Expected to write a checkpoint; it could not be written, to {tmp_path}.\n" in error
        assert "File too large" in error
    assert bits(restore(tmp_path)) == bits(checkpoint_killed.adapter(1))
    save(tmp_path, checkpoint_killed.adapter(3), base=checkpoint_killed.BASE)
    assert bits(restore(tmp_path)) == bits(checkpoint_killed.adapter(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["1"]  # nothing is left of those that failed


def test_a_run_that_finds_no_room_in_the_background_says_so_and_can_go_on(tmp_path: Path) -> None:
    program = [sys.executable, checkpoint_killed.__file__, "room", str(tmp_path)]
    ran = subprocess.run(program, env=environment(), check=True, timeout=100, capture_output=True, text=True)
    assert f'Failed writing: "{tmp_path}/1.orbax-checkpoint-tmp/' in ran.stdout
    assert "File too large" in ran.stdout
    run = checkpoint_killed.Run("async", tmp_path)
    assert run.restored() == 1
    assert list(run.manager.all_steps()) == [0, 1]
    run.manager.close()
