"""Files that are damaged or made to do harm: each is a clear error, or loads as what it says."""

import collections
import json
import os
import random
import re
import resource
import time
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import mutated_files
import numpy as np
import pytest
import safetensors.numpy
from mutated_files import MAPPING, PARAMS

import lora_jax as lj
from lora_jax import peft
from lora_jax.peft import _patterns, _safetensors, _write

MEMORY = 2**24  # bytes that a load of a small file may take, as traced
RESIDENT = 2**28  # bytes by which the process may grow; JAX's caches do


def outcome(directory: Path) -> tuple[str, Any]:
    """Loads an adapter; returns the kind of its error, or "read" and what it means."""
    try:
        adapter = peft.load(directory, MAPPING, PARAMS)
    except lj.CheckpointError as error:
        text = str(error)
        assert str(directory) in text and len(text.splitlines()) > 1 and len(text) < 20_000, text
        start = text.split(";")[0].replace(str(directory), "")
        return start.split(", in ")[0].split(" in  to fit")[0], None
    return "read", mutated_files.meaning(adapter)


def is_same(got: Any, expected: Any, tolerance: float) -> bool:
    """Whether two adapters mean the same; a value that is the base's need not be there."""
    for path in got.keys() | expected.keys():
        one, other = dict(got.get(path, {})), dict(expected.get(path, {}))
        zero = {"value": np.asarray(PARAMS[path]), "bias": np.zeros(1)}
        for name in one.keys() | other.keys():
            first, second = (entry.get(name, zero.get(name)) for entry in (one, other))
            if name == "rows" and first is not None and second is not None:
                if list(first) != list(second):
                    return False
                first, second = (np.array(list(rows.values())) for rows in (first, second))
            if name == "variant":
                if first != second:
                    return False
            elif first is None or second is None:
                return False
            elif not np.allclose(first, second, rtol=0, atol=tolerance * max(1e-30, np.abs(second).max())):
                return False
    return True


def snapshot(directory: Path) -> Any:
    """Everything below a directory, without following links."""
    return sorted(
        (str(path), path.lstat().st_size, path.lstat().st_mtime_ns, path.lstat().st_mode)
        for path in directory.rglob("*")
    )


def resident() -> int:
    """The largest resident set of this process up to now, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def check(count: int, seed: int, tmp_path: Path, *, trace: bool) -> None:
    """Loads damaged adapters; prints how many had which outcome. Tracing allocations takes as long as loading."""
    bases = {name: mutated_files.stored(*parts) for name, parts in mutated_files.adapters().items()}
    directory = tmp_path / "outside" / "adapter"
    directory.mkdir(parents=True)
    (directory.parent / "victim").write_text("as it was")
    whole = {}
    for name, file in bases.items():
        text = mutated_files.joined(file.header)
        tensors = len(text).to_bytes(8, "little") + text + file.data
        mutated_files.write(mutated_files.Case("", name, mutated_files.joined(file.config), tensors, None), directory)
        kind, whole[name] = outcome(directory)
        assert kind == "read" and is_same(whole[name], mutated_files.expected(directory), 1e-2), name

    rng = random.Random(seed)
    counts: collections.Counter[str] = collections.Counter()
    slowest, largest, at_first = 0.0, 0, resident()
    if trace:
        tracemalloc.start()
    try:
        for _ in range(count):
            case = mutated_files.case(rng, bases)
            mutated_files.write(case, directory)
            before = snapshot(directory.parent)
            start, used = time.process_time(), tracemalloc.get_traced_memory()[0]
            if trace:
                tracemalloc.reset_peak()
            kind, got = outcome(directory)
            slowest = max(slowest, time.process_time() - start)
            largest = max(largest, tracemalloc.get_traced_memory()[1] - used)
            assert snapshot(directory.parent) == before, case
            if got is not None:
                tolerance = 2e-2 if b'16"' in case.tensors else 1e-5
                assert is_same(got, mutated_files.expected(directory), tolerance), (case.name, case.base)
                kind = "read, as before" if is_same(got, whole[case.base], tolerance) else "read, as the file now says"
            counts[kind] += 1
    finally:
        tracemalloc.stop()
    grown = resident() - at_first
    assert largest < MEMORY and grown < RESIDENT
    print(f"\n{count} damaged adapters; at most {slowest:.2f} s of the processor for one")
    print(f"largest allocation {largest / 2**20:.1f} MiB, " * trace + f"resident set grown by {grown / 2**20:.0f} MiB")
    for kind, number in counts.most_common():
        print(f"{number:>7} {kind}")


def test_damaged_adapters_are_refused_or_load_as_what_they_say(tmp_path: Path) -> None:
    check(120, 0, tmp_path, trace=True)


@pytest.mark.sweep
def test_ten_thousand_damaged_adapters_are_refused_or_load_as_what_they_say(tmp_path: Path) -> None:
    check(10_000, 1, tmp_path, trace=False)


def check_model(count: int, seed: int, tmp_path: Path) -> None:
    """Reads damaged models; the values of those that are read are those of the library safetensors."""
    files = mutated_files.model(tmp_path / "whole")
    shapes = jax.eval_shape(lambda: PARAMS)
    whole = peft.load_params(tmp_path / "whole", MAPPING, shapes)
    assert all(np.array_equal(whole[path], PARAMS[path]) for path in PARAMS)
    rng, counts = random.Random(seed), collections.Counter[str]()
    directory = tmp_path / "damaged"
    directory.mkdir()
    for _ in range(count):
        contents = mutated_files.damaged_model(rng, files)
        for name, content in contents.items():
            (directory / name).write_bytes(content)
        try:
            read = peft.load_params(directory, MAPPING, shapes)
        except lj.CheckpointError as error:
            assert "that float32, the dtype of" in str(error) or str(directory) in str(error)
            assert len(str(error)) < 20_000
            counts[str(error).split(";")[0].split(", in ")[0]] += 1
        else:
            expected = mutated_files.of_model(directory)
            assert all(np.array_equal(read[path], expected[path], equal_nan=True) for path in PARAMS)
            counts["read"] += 1
        try:
            peft.guess(shapes, directory)
        except lj.CheckpointError as error:
            assert len(str(error)) < 20_000
    print(f"\n{count} damaged models", *counts.most_common(), sep="\n")
    assert counts["read"] > count / 20 and counts.total() - counts["read"] > count / 4


def check_converted(count: int, seed: int, tmp_path: Path) -> None:
    """Converts damaged files of diffusers; what is written is what the formulas make of them."""
    config, tensors = mutated_files.adapters()["LoRA"]
    linear = {name: tensor for name, tensor in tensors.items() if ".lora_" in name and tensor.ndim == 2}
    file = mutated_files.stored(config, {name: tensor for name, tensor in linear.items() if "embed" not in name})
    mutated_files.write(
        mutated_files.Case("", "", mutated_files.joined(file.config), mutated_files.encoded(file), None), tmp_path
    )
    source, out = peft.convert(tmp_path, tmp_path / "whole", to="diffusers", component="unet"), tmp_path / "out"
    whole = mutated_files.parsed(source.read_bytes())
    rng, counts = random.Random(seed), collections.Counter[str]()
    path = tmp_path / "damaged.safetensors"
    for _ in range(count):
        path.write_bytes(mutated_files.damaged_diffusers(rng, whole))
        try:
            peft.convert(path, out, to="peft")
        except (lj.CheckpointError, lj.SpecError, lj.AdapterError) as error:
            assert len(str(error)) < 20_000 and not out.exists()
            counts[str(error).split(";")[0].replace(str(tmp_path), "")] += 1
            continue
        written = json.loads((out / mutated_files.CONFIG).read_text())
        got = mutated_files.of_peft(written, safetensors.numpy.load_file(out / mutated_files.TENSORS))
        expected = mutated_files.of_diffusers(path)
        assert got.keys() == expected.keys()
        for module, update in expected.items():
            np.testing.assert_allclose(got[module], update, rtol=0, atol=2e-2 * max(1e-30, np.abs(update).max()))
        counts["converted"] += 1
        for one in out.iterdir():
            one.unlink()
        out.rmdir()
    print(f"\n{count} damaged files of diffusers", *counts.most_common(), sep="\n")
    assert counts["converted"] > count / 20 and counts.total() - counts["converted"] > count / 4


def test_damaged_models_are_refused_or_read_as_what_they_say(tmp_path: Path) -> None:
    check_model(15, 0, tmp_path)


def test_damaged_files_of_diffusers_are_refused_or_converted_as_what_they_say(tmp_path: Path) -> None:
    check_converted(40, 0, tmp_path)


@pytest.mark.sweep
def test_thousands_of_damaged_models_and_files_of_diffusers(tmp_path: Path) -> None:
    for name, run in (("models", check_model), ("converted", check_converted)):
        (tmp_path / name).mkdir()
        run(1_000, 1, tmp_path / name)


# The files themselves


def write_adapter(directory: Path) -> None:
    """Writes a whole adapter."""
    adapter = {"fc/kernel": lj.Adapter(lj.LoRA(rank=2, alpha=4), "io", a=np.ones((8, 2)), b=np.ones((2, 6)))}
    adapter = jax.tree.map(lambda array: array.astype(np.float32), adapter)
    peft.export(directory, adapter, MAPPING, base=PARAMS)


def refused(directory: Path) -> str:
    with pytest.raises(lj.CheckpointError) as error:
        peft.load(directory, MAPPING, PARAMS)
    return str(error.value)


@pytest.mark.parametrize("name", [mutated_files.CONFIG, mutated_files.TENSORS])
def test_only_regular_files_are_read(name: str, tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)  # would wait for a writer
    assert refused(tmp_path).startswith(f"Expected a valid {name}; it is not a regular file, in {tmp_path}.")
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")  # would never end
    assert "it is not a regular file" in refused(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert f"{name} cannot be read.\n  IsADirectoryError" in refused(tmp_path)


def test_links_are_read_as_in_the_cache_of_hugging_face(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    write_adapter(blobs)
    snapshot.mkdir()
    for name in (mutated_files.CONFIG, mutated_files.TENSORS):
        (snapshot / name).symlink_to(Path("..") / "blobs" / name)
    assert list(peft.load(snapshot, MAPPING, PARAMS)) == ["fc/kernel"]


def test_an_export_replaces_links_and_does_not_follow_them(tmp_path: Path) -> None:
    directory, victim = tmp_path / "adapter", tmp_path / "victim"
    directory.mkdir()
    victim.write_text("as it was")
    for name in (mutated_files.CONFIG, mutated_files.TENSORS):
        (directory / name).symlink_to(victim)
        (directory / f".{name}.new").symlink_to(victim)
    write_adapter(directory)
    assert victim.read_text() == "as it was"
    assert not any((directory / name).is_symlink() for name in (mutated_files.CONFIG, mutated_files.TENSORS))
    assert len(list(directory.iterdir())) == 4  # and the two links of other names
    assert list(peft.load(directory, MAPPING, PARAMS)) == ["fc/kernel"]


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / mutated_files.TENSORS).mkdir()
    with pytest.raises(lj.CheckpointError, match=f"Cannot write a PEFT adapter to {tmp_path}"):
        write_adapter(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [mutated_files.TENSORS]
    adapter = {"a": lj.Adapter(lj.Full(), "", value=np.ones(3, np.int32))}
    expected = r"in float64, float32, float16, bfloat16 to export; (.|\n)*'base_model.model.m.a' in int32"
    with pytest.raises(lj.AdapterError, match=expected):
        peft.export(tmp_path / "new", adapter, {"a": peft.vector("m", parameter="a")}, base={"a": np.ones(3)})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("module", ["../../x", "/etc/passwd", "a\0b", "a\nb", "ä" * 100, "a\\b", '"}'])
def test_a_module_may_have_any_name(module: str, tmp_path: Path) -> None:
    params = {"fc": PARAMS["fc/kernel"]}
    adapter = {"fc": lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", a=np.ones((8, 1), np.float32), b=np.ones((1, 6), "f"))}
    before = snapshot(tmp_path)
    peft.export(tmp_path / "adapter", adapter, {"fc": peft.linear(module)}, base=params)
    assert [name for name, *_ in snapshot(tmp_path) if "adapter" not in name] == [name for name, *_ in before]
    assert list(peft.load(tmp_path / "adapter", {"fc": peft.linear(module)}, params)) == ["fc"]


def test_a_name_without_utf_8_is_not_written(tmp_path: Path) -> None:
    adapter = {"fc": lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", a=np.ones((8, 1), np.float32), b=np.ones((1, 6), "f"))}
    with pytest.raises(lj.CheckpointError, match=r"Cannot write(.|\n)*UnicodeEncodeError"):
        peft.export(tmp_path, adapter, {"fc": peft.linear("\ud800")}, base={"fc": PARAMS["fc/kernel"]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 10_000])
def test_a_file_that_changes_while_it_is_read_is_refused(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path)
    os.utime(tmp_path / mutated_files.TENSORS, (0, 0))
    parse = _safetensors.parse

    def parsed(content: bytes, path: Path) -> Any:
        os.truncate(path, size)
        return parse(content, path)

    monkeypatch.setattr(_safetensors, "parse", parsed)
    assert "it changed while it was read" in refused(tmp_path)


def sparse(path: Path, numbers: int) -> None:
    """Writes a file with one tensor of zeros that takes no space on the disk."""
    fields = {"dtype": "F32", "shape": [numbers], "data_offsets": [0, 4 * numbers]}
    text = json.dumps({"base_model.model.x.weight": fields}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + 4 * numbers)


def test_a_file_that_is_larger_than_the_model_is_not_read(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    sparse(tmp_path / mutated_files.TENSORS, 2**40)
    text = refused(tmp_path)
    assert "it has 4,398,046,511,104 bytes of values, and an adapter of these parameters has at most 67," in text


def test_a_file_is_read_and_written_one_tensor_at_a_time(tmp_path: Path) -> None:
    tensors = {f"t{at}": np.zeros(2**20, np.float32) for at in range(4)}
    tracemalloc.start()
    try:
        with (tmp_path / "file").open("wb") as file:
            _write.write_arrays(file, tensors, {})
        assert tracemalloc.get_traced_memory()[1] < 2**20
        _safetensors.read_arrays(tmp_path / "file", None)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**22 + 2**21
    finally:
        tracemalloc.stop()
    assert [*safetensors.numpy.load_file(tmp_path / "file")] == [*tensors]


# Patterns


def pattern(rng: random.Random, depth: int = 0) -> str:
    """An expression of what Python and RE2 have, and some that RE2 does not have."""
    kind = rng.random()
    if depth > 3 or kind < 0.35:
        return rng.choice(["a", "b", "0", ".", r"\.", "[ab]", "[^a]", r"[a-c\d]", r"\w", r"\d", r"\W", "ab"])
    one, other = pattern(rng, depth + 1), pattern(rng, depth + 1)
    if kind < 0.55:
        return one + other
    if kind < 0.67:
        return rng.choice(["(", "(?:", f"(?P<n{rng.randrange(10**9)}>"]) + one + "|" + other + ")"
    if kind < 0.8:
        return f"({one})" + rng.choice(["*", "+", "?", "{2}", "{1,2}", "{,2}", "{1,}", "*?", "+?", "??", "{"])
    if kind < 0.87:
        return rng.choice(["^", "$", r"\b", r"\B", r"\A", r"\Z"]) + one
    return rng.choice(["(?=", "(?!"]) + one + ")" + other


def test_patterns_match_as_in_python(count: int = 600) -> None:
    rng = random.Random(0)
    matched = 0
    for _ in range(count):
        text = pattern(rng)
        name = "".join(rng.choice("ab.0") for _ in range(rng.randrange(1, 9)))
        if not _patterns.problems([text]):
            assert _patterns.fullmatch(text, name) == (re.fullmatch(text, name) is not None), (text, name)
            found = _patterns.Patterns({text: True}).find(name, False)
            assert found == (re.match(rf"(.*\.)?({text})$", name) is not None), (text, name)
            matched += found
    assert matched > count / 20


UNSLOTH = (  # as its adapters have for vision models
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj|"
    r"out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|"
    r"attn|mlp|feed_forward|ffn|dense)\.(?:(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj)))"
)


def test_expressions_of_published_adapters_match_and_those_that_take_forever_do_not() -> None:
    name = "model.language_model.layers.3.self_attn.q_proj"
    for text in (UNSLOTH, r"model\.(.+)\.(\d|1\d)\.self_attn\.(q|k)_proj"):
        assert not _patterns.problems([text]) and _patterns.fullmatch(text, name)
    [(_, reason)] = _patterns.problems([r"^(?!.*vision).*proj$"])
    assert reason == "is not a regular expression that is supported (invalid perl operator: (?!)"
    start = time.process_time()
    for text in (*mutated_files.EVIL, "a{1000000000}", "(a{0,1000000}){0,1000000}"):
        assert _patterns.problems([text]) or not _patterns.fullmatch(text, name * 2)
    assert time.process_time() - start < 5


def test_as_many_patterns_as_modules_are_looked_up() -> None:
    names = [f"model.layers.{at}.experts.{at}.up" for at in range(5_000)]
    patterns = _patterns.Patterns({"^" + re.escape(name): at for at, name in enumerate(names)})
    start = time.process_time()
    assert [patterns.find(name, None) for name in names] == list(range(5_000))
    assert time.process_time() - start < 5
