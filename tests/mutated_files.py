"""Adapters in PEFT's format with seeded damage, and what a reader that knows nothing of lora_jax makes of them."""

import json
import math
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

import lora_jax as lj
from lora_jax import peft

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
SHAPES = {
    "fc/kernel": (8, 6),
    "fc/bias": (6,),
    "layers/up/kernel": (2, 8, 5),
    "qkv/kernel": (8, 12),
    "embed/embedding": (10, 8),
    "conv/kernel": (3, 4, 5),
    "score/kernel": (8, 3),
    "score/bias": (3,),
}
PARAMS = {
    path: jnp.asarray(np.random.default_rng(at).standard_normal(shape).astype(np.float32))
    for at, (path, shape) in enumerate(SHAPES.items())
}
MAPPING = {
    **peft.layer("fc", "model.fc"),
    **peft.layer("score", "score"),
    "layers/up/kernel": peft.linear("model.layers.{i}.up"),
    "qkv/kernel": peft.linear([peft.Part(f"model.{name}") for name in "qkv"]),
    "embed/embedding": peft.embedding("model.embed_tokens"),
    "conv/kernel": peft.conv("model.conv"),
}
# Each torch module: its leaf, where it is in the leaf, the shapes of its factors without the rank.
MODULES: dict[str, tuple[str, Any, tuple[int, ...], tuple[int, ...]]] = {
    "model.fc": ("fc/kernel", ..., (8,), (6,)),
    "model.layers.0.up": ("layers/up/kernel", 0, (8,), (5,)),
    "model.layers.1.up": ("layers/up/kernel", 1, (8,), (5,)),
    "model.q": ("qkv/kernel", (..., slice(0, 4)), (8,), (4,)),
    "model.k": ("qkv/kernel", (..., slice(4, 8)), (8,), (4,)),
    "model.v": ("qkv/kernel", (..., slice(8, 12)), (8,), (4,)),
    "model.embed_tokens": ("embed/embedding", ..., (10,), (8,)),
    "model.conv": ("conv/kernel", ..., (4, 3), (5,)),
}
SAVED = {"score.weight": "score/kernel", "score.bias": "score/bias", "model.fc.weight": "fc/kernel"}
SAVED |= {"model.fc.bias": "fc/bias", "model.fc.base_layer.bias": "fc/bias"}
EVIL = ["(.*)*!", "([a-z.]+)+!", "(a|a|[a-z.])*!", "((.*)*)*!", "(.*.*.*.*.*.*.*.*.*.*.*.*)!", "([a-z]{1,50}.?){1,50}!"]
DTYPES = {np.float16: "F16", np.dtype(jnp.bfloat16).type: "BF16", np.float64: "F64", np.float32: "F32"}


class File(NamedTuple):
    """An adapter before it is written: entries of the header and of the configuration in order, and the values."""

    header: list[tuple[str, Any]]
    data: bytes
    config: list[tuple[str, Any]]


# Adapters


def adapters() -> dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Configurations and tensors of whole adapters, one for each way of `load`."""
    rng = np.random.default_rng(0)

    def low_rank(modules: Any, rank: Callable[[str], int] = lambda module: 2) -> dict[str, np.ndarray]:
        found = {}
        for module in modules:
            _, _, d_in, d_out = MODULES[module]
            names = ("lora_A.weight", "lora_B.weight")
            shapes = [(rank(module), *d_in), (*d_out, rank(module), *(1,) * (len(d_in) - 1))]
            if module == "model.embed_tokens":
                names = ("lora_embedding_A", "lora_embedding_B")
            for name, shape in zip(names, shapes, strict=True):
                found[f"{PREFIX}{module}.{name}"] = rng.standard_normal(shape).astype(np.float32)
        return found

    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": list(MODULES), "lora_dropout": 0.0}
    config |= {"base_model_name_or_path": "some/model", "bias": "none", "use_rslora": False, "use_dora": False}
    patterns = {"rank_pattern": {r"^model\.fc": 3}, "alpha_pattern": {"layers.1.up": 6, r"model\.(q|k)": 1.5}}
    plain = low_rank(MODULES, lambda module: 3 if module == "model.fc" else 2)
    saved = {f"{PREFIX}score.weight": (3, 8), f"{PREFIX}score.bias": (3,)}
    plain |= {name: rng.standard_normal(shape).astype(np.float32) for name, shape in saved.items()}

    linear = [name for name in MODULES if name not in ("model.embed_tokens", "model.conv")]
    dora = low_rank(linear)
    for name in linear:
        dora[f"{PREFIX}{name}.lora_magnitude_vector"] = rng.standard_normal(MODULES[name][3]).astype(np.float32)
    tokens = low_rank(["model.fc"])
    tokens[f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"] = np.ones((2, 8), np.float32)
    tokens[f"{PREFIX}model.fc.lora_B.bias"] = np.ones(6, np.float32)
    half = {name: array.astype(jnp.bfloat16) for name, array in low_rank(linear).items()}
    vera = {"base_model.vera_A": rng.standard_normal((3, 8)), "base_model.vera_B": rng.standard_normal((6, 3))}
    for name in linear:
        vera[f"{PREFIX}{name}.vera_lambda_d"] = rng.standard_normal(3)
        vera[f"{PREFIX}{name}.vera_lambda_b"] = rng.standard_normal(MODULES[name][3])
    vera = {name: array.astype(np.float32) for name, array in vera.items()}
    settings = {"peft_type": "VERA", "r": 3, "projection_prng_key": 0, "save_projection": True, "d_initial": 0.1}
    return {
        "LoRA": (config | patterns | {"modules_to_save": ["score"]}, plain),
        "DoRA": (config | {"use_dora": True, "target_modules": linear}, dora),
        "rows and biases": (
            config | {"target_modules": ["fc"], "lora_bias": True, "trainable_token_indices": {"embed_tokens": [7, 2]}},
            tokens,
        ),
        "rsLoRA, bfloat16": (config | {"use_rslora": True, "target_modules": r"model\.(?!conv).*(fc|up|q|k|v)"}, half),
        "aLoRA": (config | {"alora_invocation_tokens": [5, 6], "target_modules": ["fc", "up"]}, low_rank(linear[:3])),
        "VeRA": (settings | {"target_modules": linear, "vera_dropout": 0.0}, vera),
    }


def stored(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> File:
    header, data = [("__metadata__", {"format": "pt"})], b""
    for name, array in tensors.items():
        fields = {"dtype": DTYPES[array.dtype.type], "shape": list(array.shape)}
        header.append((name, fields | {"data_offsets": [len(data), len(data) + array.nbytes]}))
        data += array.tobytes()
    return File(header, data, list(config.items()))


# Damage


class Raw(str):
    """Text of JSON that `json` does not write."""


DEEP = Raw("[" * 20_000 + "]" * 20_000)
NUMBERS = [0, 1, -1, 2, 3, 2**31, 2**63 - 1, 2**63, 2**64, 10**18, 10**400, Raw("1" + "0" * 5000), 1.5, -0.0, 1e-320]
NUMBERS += [Raw("1e999"), Raw("NaN"), Raw("-Infinity"), Raw("1e400"), 1e308, 3]
STRINGS = [
    "",
    "x",
    "\0",
    "../../../x",
    "/etc/passwd",
    "\ud800",
    "\N{GREEK SMALL LETTER ALPHA}",
    "k" * 5_000,
    "(",
    "^",
    "all-linear",
]
VALUES = [
    *NUMBERS,
    *STRINGS,
    None,
    True,
    False,
    [],
    [[]],
    {},
    {"a": 1},
    [1, 2],
    [5, 6],
    ["fc"],
    ["x"],
    list(range(300)),
]
VALUES += [{"fc": 2}, {"fc": 3}, {"up": 2, "fc": 3}, DEEP, {"": 2}, [""], ["model.fc", "model.fc"], [10**30], [-1]]
VALUES += EVIL + [{evil: 2} for evil in EVIL] + [{"fc|" + evil: 3} for evil in EVIL]
KEYS = ["peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"]
KEYS += ["lora_dropout", "modules_to_save", "trainable_token_indices", "alora_invocation_tokens", "save_projection"]
KEYS += ["init_lora_weights", "layers_to_transform", "exclude_modules", "layers_pattern", "target_parameters", "bias"]
KEYS += ["d_initial", "vera_dropout", "projection_prng_key", "fan_in_fan_out", "ensure_weight_tying", "lora_bias"]
PLAUSIBLE: dict[str, list[Any]] = {
    "lora_alpha": [1, 2.5, 0, -3, 1e-3, 16],
    "alpha_pattern": [
        {"up": 3},
        {r"layers\.\d\.up": 0.5, "up": 2},
        {"^model": 1},
        {"fc|q": 0},
        {"(?!x).*[kv]": 7},
        None,
    ],
    "rank_pattern": [{"up": 2}, {r"^model\.fc": 3, "fc": 1}, {"fc": 3, r"f.": 1}, {".*": 2}, None],
    "target_modules": ["all-linear", r"model\..+", ["fc", "up", "q", "k", "v", "conv", "embed_tokens"], ["fc"], None],
    "use_rslora": [True, False, None],
    "use_dora": [True, False, None],
    "lora_dropout": [0.1, 0, 1, 0.999],
    "modules_to_save": [["score"], [], None, ["fc"]],
    "trainable_token_indices": [[7, 2], {"embed_tokens": [2, 7]}, {"tokens": [0, 9]}, [9, 10], [1, 1], None],
    "alora_invocation_tokens": [[5], [0], None, [1, 2, 3]],
    "peft_type": ["LORA", "VERA", "ADALORA"],
    "r": [1, 2, 3, 4],
    "projection_prng_key": [1, 2**32],
    "bias": ["all", "lora_only"],
    "exclude_modules": [["fc"], "x"],
    "layers_to_transform": [0, [1]],
}


def dumped(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{dumped(one)}" for key, one in value.items()) + "}"
    return "[" + ",".join(map(dumped, value)) + "]" if isinstance(value, list) else json.dumps(value)


def joined(pairs: list[tuple[str, Any]]) -> bytes:
    """An object of JSON, whose keys may occur twice."""
    return ("{" + ", ".join(f"{json.dumps(key)}: {dumped(value)}" for key, value in pairs) + "}").encode()


def changed_number(rng: random.Random, value: Any) -> Any:
    if rng.random() < 0.5 and type(value) is int:
        return rng.choice([value + 1, value - 1, value + 4, value - 4, 2 * value, -value, value + 2**32, float(value)])
    return rng.choice(VALUES if rng.random() < 0.3 else NUMBERS)


def change_header(rng: random.Random, file: File) -> File:
    """Changes one entry of the header."""
    header = list(file.header) or [("x", {})]
    at = rng.randrange(len(header))
    name, fields = header[at]
    other, others = rng.choice(header)
    kind = rng.choice(["name", "swap", "twice", "alias", "drop", "field", "number", "number", "dtype", "value", "more"])
    if kind == "name":
        names = [*STRINGS, "../" + name, name.replace("base_model.", ""), name.replace(".weight", ".bias")]
        names += [
            name + "\0",
            name.upper(),
            name.replace("model.fc", "model.q"),
            name.replace("lora_A", "lora_B"),
            other,
        ]
        names += [name.replace(".lora", ".base_layer.lora"), "__metadata__", PREFIX + "." + name, name * 60]
        header[at] = (rng.choice(names), fields)
    elif kind == "swap":
        header[at] = (other, fields)
        header[header.index((other, others))] = (name, others)
    elif kind in ("twice", "alias"):
        header.append((name if kind == "twice" else name + rng.choice(STRINGS), rng.choice([fields, others])))
    elif kind == "drop":
        del header[at]
    elif kind == "value" or not isinstance(fields, dict) or name == "__metadata__":
        header[at] = (name, rng.choice([*VALUES, {"format": 1}, {"format": "pt", "x": "y" * 1000}]))
    elif kind == "field":
        key = rng.choice([*fields, "x"])
        left = {one: value for one, value in fields.items() if one != key}
        header[at] = (name, left if rng.random() < 0.5 else left | {key: rng.choice(VALUES)})
    elif kind == "dtype":
        kinds = ["F64", "F32", "F16", "BF16", "I32", "F8_E4M3", "f32", "BOOL", "U64", "C64", "", rng.choice(VALUES)]
        header[at] = (name, fields | {"dtype": rng.choice(kinds)})
    elif kind == "number":
        key = rng.choice([key for key in fields if isinstance(fields[key], list)] or [None])
        if key is not None and fields[key]:
            numbers = list(fields[key])
            place = rng.randrange(len(numbers))
            numbers[place] = changed_number(rng, numbers[place])
            header[at] = (name, fields | {key: numbers})
    else:
        shape = fields.get("shape")
        shape = shape if isinstance(shape, list) else []
        shapes = [shape[::-1], [*shape, 1], [1, *shape], [], [0, *shape], [2**32] * 2, [2**63, *shape], [1] * 70]
        shapes += [[1] * 200 + shape, [math.prod(shape)] if all(type(one) is int for one in shape) else [], shape[:1]]
        header[at] = (name, fields | {"shape": rng.choice(shapes)})
    return file._replace(header=header)


def change_config(rng: random.Random, file: File) -> File:
    """Changes one entry of the configuration."""
    config = list(file.config) or [("r", 2)]
    at = rng.randrange(len(config))
    key = config[at][0] if rng.random() < 0.4 else rng.choice(KEYS)
    kind = rng.choice(["set", "set", "set", "drop", "twice", "rename"])
    if kind == "set":
        config = [(one, value) for one, value in config if one != key]
        values = PLAUSIBLE.get(key, VALUES) if rng.random() < 0.5 else VALUES
        config.insert(rng.randrange(len(config) + 1), (key, rng.choice(values)))
    elif kind == "drop":
        del config[at]
    elif kind == "twice":
        config.append(config[at] if rng.random() < 0.5 else (config[at][0], rng.choice(VALUES)))
    else:
        config[at] = (rng.choice([*STRINGS, *KEYS]), config[at][1])
    return file._replace(config=config)


def change_tensors(rng: random.Random, file: File) -> File:
    """Makes a valid file with other tensors."""
    tensors = {}
    for name, fields in file.header[1:]:
        dtype = next(one for one, text in DTYPES.items() if text == fields["dtype"])
        first, last = fields["data_offsets"]
        tensors[name] = np.frombuffer(file.data[first:last], dtype).reshape(fields["shape"])
    chosen = rng.sample(sorted(tensors), min(len(tensors), rng.choice([1, 1, 2, len(tensors)])))
    kind = rng.choice(["value", "dtype", "shape", "rank", "drop", "add", "rename", "order", "scale"])
    for name in chosen:
        array = tensors[name]
        if kind == "value":
            flat = array.astype(np.float64).reshape(-1)
            flat[rng.randrange(flat.size)] = rng.choice([np.nan, np.inf, -np.inf, 1e300, 1e-300, 0.0, 3e38])
            with np.errstate(over="ignore"):
                tensors[name] = flat.reshape(array.shape).astype(rng.choice([array.dtype, np.float64]))
        elif kind == "dtype":
            tensors[name] = array.astype(rng.choice(list(DTYPES)))
        elif kind == "shape":
            tensors[name] = rng.choice([array.T, array[:1], array[..., None], array.reshape(-1)])
        elif kind == "rank":
            tensors[name] = array[..., :1] if "lora_B" in name or "embedding_B" in name else array[:1]
        elif kind == "drop":
            del tensors[name]
        elif kind == "add":
            tensors[PREFIX + rng.choice(["x", "model.fc.weight", "model.fc.bias", "score.x", "model.layers.2.up"])] = (
                array
            )
        elif kind == "rename":
            tensors[name.replace("model.fc", "model.fd")] = tensors.pop(name)
        elif kind == "scale":
            tensors[name] = (array * rng.choice([0, 2, -1])).astype(array.dtype)
    if kind == "order":
        tensors = dict(sorted(tensors.items(), key=lambda item: rng.random()))
    return stored(dict(file.config), tensors)


def change_bytes(rng: random.Random, content: bytes) -> bytes:
    """Changes the bytes of a file."""
    at = rng.randrange(len(content) + 1)
    kind = rng.choice(["flip", "flip", "cut", "end", "insert", "repeat", "zero", "space", "bom", "number", "utf-16"])
    random_bytes = rng.randbytes(rng.choice([1, 2, 8, 100]))
    return {
        "flip": content[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in content[at : at + 1]) + content[at + 1 :],
        "cut": content[:at],
        "end": content + random_bytes,
        "insert": content[:at] + random_bytes + content[at:],
        "repeat": content[:at] + content[max(0, at - 50) : at] + content[at:],
        "zero": content[:at] + bytes(len(content) - at),
        "space": content[:8] + rng.choice([b" ", b"\n", b"  "]) + content[8:],
        "bom": b"\xef\xbb\xbf" + content,
        "number": rng.choice([0, 1, 2**24, 2**32, 2**63, 2**64 - 1]).to_bytes(8, "little") + content[8:],
        "utf-16": content.decode("latin-1").encode("utf-16"),
    }[kind]


SPECIAL = ["fifo", "directory", "link", "link", "dangling", "loop", "device", "missing", "pickle", "empty"]


class Case(NamedTuple):
    """The two files of a damaged adapter."""

    name: str
    base: str
    config: bytes
    tensors: bytes
    special: tuple[str, str] | None  # a file, and what is in its place


def case(rng: random.Random, bases: dict[str, File]) -> Case:
    """Makes one damaged adapter."""
    base = rng.choice(list(bases))
    file, done = bases[base], []
    if rng.random() < 0.3:
        file, done = change_tensors(rng, file), ["tensors"]
    for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
        change = rng.choice([change_header, change_config])
        file = change(rng, file)
        done.append(change.__name__.removeprefix("change_"))
    text = joined(file.header)
    text += b" " * rng.choice([-len(text) % 8, 0, 1])
    contents = {CONFIG: joined(file.config), TENSORS: len(text).to_bytes(8, "little") + text + file.data}
    special = None
    if not done or rng.random() < 0.1:
        name = rng.choice([TENSORS, TENSORS, CONFIG])
        if rng.random() < 0.2:
            special = (name, rng.choice(SPECIAL))
        else:
            contents[name] = change_bytes(rng, contents[name])
        done.append(special[1] if special else "bytes")
    return Case(" + ".join(done), base, contents[CONFIG], contents[TENSORS], special)


def write(damaged: Case, directory: Path) -> None:
    """Writes the files of a case, in place of those that are there."""
    for old in directory.iterdir():
        old.rmdir() if old.is_dir() and not old.is_symlink() else old.unlink()
    for name, content in ((CONFIG, damaged.config), (TENSORS, damaged.tensors)):
        path, kind = directory / name, ""
        if damaged.special is not None and damaged.special[0] == name:
            kind = damaged.special[1]
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        elif kind in ("link", "pickle"):
            (directory / "adapter_model.bin").write_bytes(content)
            if kind == "link":
                path.symlink_to("adapter_model.bin")
        elif kind in ("dangling", "loop", "device"):
            path.symlink_to({"dangling": "nothing", "loop": name, "device": "/dev/zero"}[kind])
        elif kind != "missing":
            path.write_bytes(b"" if kind == "empty" else content)


# The other reader


def expected(directory: Path) -> dict[str, dict[str, Any]]:
    """What an adapter's files mean for each leaf, by the library safetensors and PEFT's formulas.

    Raises anything if the files are not an adapter, or have a tensor without a meaning.
    """
    config = json.loads((directory / CONFIG).read_bytes().decode())
    left = {}
    for name, entry in safetensors.deserialize((directory / TENSORS).read_bytes()):
        dtype = next(dtype for dtype, text in DTYPES.items() if text == entry["dtype"])
        left[name] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"]).astype(np.float64)
    assert all(np.isfinite(array).all() for array in left.values())
    found: dict[str, dict[str, Any]] = {}
    if config["peft_type"] == "VERA":
        a, b = left.pop("base_model.vera_A"), left.pop("base_model.vera_B")
    for module, (path, place, d_in, d_out) in MODULES.items():

        def take(name: str, module: str = module) -> Any:
            return left.pop(f"{PREFIX}{module}.{name}", None)

        update = None
        table = module == "model.embed_tokens"
        scale = of_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        rank = of_pattern(config.get("rank_pattern"), module, config.get("r", 8))
        scale /= math.sqrt(rank) if config.get("use_rslora") else rank
        if config["peft_type"] == "VERA":
            if (lambda_d := take("vera_lambda_d")) is not None:
                lambda_b = take("vera_lambda_b")
                update = (lambda_b[:, None] * b[: d_out[0]] @ (lambda_d[:, None] * a[:, : d_in[0]])).T
        elif (first := take("lora_embedding_A" if table else "lora_A.weight")) is not None:
            second = take("lora_embedding_B" if table else "lora_B.weight")
            assert first.shape == (rank, *d_in) and second.shape[:2] == (*d_out, rank)
            update = scale * np.tensordot(second.reshape(*d_out, rank), first, 1).T
        entry = found.setdefault(path, {})
        if update is not None:
            entry.setdefault("update", np.zeros(SHAPES[path]))[place] = update
            if config["peft_type"] == "LORA":
                entry["variant"] = "DoRA" if config.get("use_dora") else config.get("alora_invocation_tokens")
        if (magnitude := take("lora_magnitude_vector")) is not None:
            assert config["use_dora"]
            shape = [size for at, size in enumerate(SHAPES[path]) if at != len(SHAPES[path]) - 2]
            entry.setdefault("magnitude", np.zeros(shape))[place] = magnitude
        if (rows := take("token_adapter.trainable_tokens_delta")) is not None:
            ids = config["trainable_token_indices"]
            if isinstance(ids, dict):
                ids = next(value for name, value in ids.items() if module.endswith(name))
            entry["rows"] = dict(zip(ids, rows, strict=True))
        if (bias := take("lora_B.bias")) is not None and module == "model.fc":
            found.setdefault("fc/bias", {})["bias"] = scale * bias
    for name, leaf in SAVED.items():
        if (value := left.pop(PREFIX + name, None)) is not None:
            found.setdefault(leaf, {})["value"] = value.T.reshape(SHAPES[leaf])
    assert not any(array.any() or not name.endswith("lora_B.bias") for name, array in left.items()), list(left)
    return {path: entry for path, entry in found.items() if entry}


def of_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if pattern.endswith("!"):  # one of `EVIL`, or "fc|" and one: `re` would not come back
            if pattern.startswith("fc|") and (module == "fc" or module.endswith(".fc")):
                return value
        elif re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def meaning(adapter: dict[str, lj.Adapter]) -> dict[str, dict[str, Any]]:
    """What an adapter means for each leaf, in the form of `expected`."""
    found: dict[str, dict[str, Any]] = {}
    for path, part in adapter.items():
        arrays = {name: np.asarray(array, np.float64) for name, array in part.arrays.items()}
        entry = found[path] = {}
        if isinstance(part.variant, lj.Full):
            entry["value"] = arrays["value"]
        elif isinstance(part.variant, lj.LoRABias):
            entry["bias"] = part.variant.scale * arrays["bias"]
        elif isinstance(part.variant, lj.Rows):
            base = np.asarray(PARAMS[path], np.float64)
            entry["rows"] = {at: base[at] + row for at, row in zip(part.variant.ids, arrays["rows"], strict=True)}
        else:
            entry["update"] = part.variant.scale * arrays["a"] @ arrays["b"]
            entry["variant"] = "DoRA" if isinstance(part.variant, lj.DoRA) else None
            if isinstance(part.variant, lj.ALoRA):
                entry["variant"] = list(part.variant.invocation)
        if "magnitude" in arrays:
            entry["magnitude"] = arrays["magnitude"]
    return found


# Models, and files of diffusers

INDEX = "model.safetensors.index.json"


def model(directory: Path) -> dict[str, File]:
    """Writes a whole model in two shards, and returns its shards and its index, as the configuration of a file."""
    peft.export_merged(directory, PARAMS, MAPPING, max_shard_size=1500)
    index = json.loads((directory / INDEX).read_text())
    files = {path.name: parsed(path.read_bytes()) for path in sorted(directory.glob("*.safetensors"))}
    return files | {INDEX: File([], b"", list(index.items()))}


def parsed(content: bytes) -> File:
    length = int.from_bytes(content[:8], "little")
    return File(list(json.loads(content[8 : 8 + length]).items()), content[8 + length :], [])


def encoded(file: File) -> bytes:
    text = joined(file.header)
    return len(text).to_bytes(8, "little") + text + file.data


def change_index(rng: random.Random, file: File) -> File:
    """Changes one entry of an index, or of its map."""
    pairs = dict(file.config)
    files = list(pairs["weight_map"].items())
    at = rng.randrange(len(files))
    others = [rng.choice(files)[1], "../" + files[at][1], rng.choice(VALUES)]
    kind = rng.choice(["name", "file", "file", "drop", "twice", "all", "value"])
    if kind == "name":
        files[at] = (rng.choice([*STRINGS, files[at][0].upper()]), files[at][1])
    elif kind == "file":
        files[at] = (files[at][0], rng.choice(others))
    elif kind == "drop":
        del files[at]
    elif kind == "twice":
        return File([], b"", [*pairs.items(), ("weight_map", dict(files[:1]))])
    elif kind == "all":
        return File([], b"", [("weight_map", rng.choice(VALUES))])
    else:
        return File([], b"", [*pairs.items(), (rng.choice(STRINGS), rng.choice(VALUES))])
    return File([], b"", list((pairs | {"weight_map": dict(files)}).items()))


def damaged_model(rng: random.Random, files: dict[str, File]) -> dict[str, bytes]:
    """Returns the content of each file of a model, one of them damaged."""
    name = rng.choice(list(files))
    contents = {one: joined(file.config) if one == INDEX else encoded(file) for one, file in files.items()}
    file = files[name]
    if name != INDEX and rng.random() < 0.3:
        file = change_tensors(rng, file)
    for _ in range(rng.choice([0, 1, 1, 2])):
        file = (change_index if name == INDEX else change_header)(rng, file)
        if name == INDEX:
            break
    contents[name] = joined(file.config) if name == INDEX else encoded(file)
    if rng.random() < 0.2:
        contents[name] = change_bytes(rng, contents[name])
    return contents


def of_model(directory: Path) -> dict[str, np.ndarray]:
    """The leaves of a model, by the library safetensors."""
    files = json.loads((directory / INDEX).read_bytes())["weight_map"]
    tensors = {}
    for file in sorted(set(files.values())):
        for name, entry in safetensors.deserialize((directory / file).read_bytes()):
            if files.get(name) == file:
                dtype = next(dtype for dtype, text in DTYPES.items() if text == entry["dtype"])
                tensors[name] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
    found = {path: np.zeros(shape, np.float32) for path, shape in SHAPES.items()}
    with np.errstate(over="ignore"):
        for module, (path, place, *_) in MODULES.items():
            weight = tensors[f"{module}.weight"]
            found[path][place] = weight if module == "model.embed_tokens" else weight.T
        for name in ("score.weight", "score.bias", "model.fc.bias"):
            found[SAVED[name]][...] = tensors[name].T
    return found


METADATA = "lora_adapter_metadata"


def damaged_diffusers(rng: random.Random, file: File) -> bytes:
    """Returns a file of diffusers with damaged tensors or metadata."""
    config = list(json.loads(dict(file.header)["__metadata__"][METADATA]).items())
    if rng.random() < 0.3:
        file = change_tensors(rng, file)
    if rng.random() < 0.5:
        config = change_config(rng, file._replace(config=config)).config
        names = [name if "." in name else f"unet.{name}" for name, _ in config]
        config = [(name, value) for name, (_, value) in zip(names, config, strict=True)]
    text = joined(config)
    if rng.random() < 0.1:
        text = change_bytes(rng, text)
    metadata = ("__metadata__", {METADATA: text.decode("latin-1")})
    file = file._replace(header=[metadata, *file.header[1:]])
    if rng.random() < 0.4:
        file = change_header(rng, file)
    content = encoded(file)
    return change_bytes(rng, content) if rng.random() < 0.1 else content


def of_diffusers(path: Path) -> dict[str, np.ndarray]:
    """The update of each module in a file of diffusers, by the library safetensors and the formulas of diffusers."""
    content = path.read_bytes()
    metadata = parsed(content).header[0][1]
    stated = json.loads(metadata.get(METADATA, "{}"))
    config = {name.removeprefix("unet."): value for name, value in stated.items() if name.startswith("unet.")}
    tensors = {}
    for name, entry in safetensors.deserialize(content):
        dtype = next(dtype for dtype, text in DTYPES.items() if text == entry["dtype"])
        tensors[name] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"]).astype(np.float64)
    return updates(config, {name.removeprefix("unet."): tensor for name, tensor in tensors.items()})


def of_peft(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The update of each module in files of PEFT."""
    return updates(config, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()})


def updates(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {}
    for name, a in tensors.items():
        module = name.removesuffix(".lora_A.weight")
        if module != name:
            b = tensors[f"{module}.lora_B.weight"].astype(np.float64)
            rank = of_pattern(config.get("rank_pattern"), module, config.get("r", 8))
            scale = of_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
            scale = scale / (math.sqrt(rank) if config.get("use_rslora") else rank) if config else 1
            found[module] = scale * b @ a
    return found
