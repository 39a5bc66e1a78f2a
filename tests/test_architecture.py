"""The house: who may import whom, what an import loads, and what every public name and file must have."""

import ast
import inspect
import itertools
import pathlib
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

import lora_jax

PACKAGE = pathlib.Path(lora_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up: a module imports only what stands before it.
LAYERS = [
    "_version",
    "_errors",
    "_compat",
    "_paths",
    "_axes",
    "_placement",
    "_keys",
    "_contract",
    "_values",
    "_use",
    "_sizes",
    "_table",
    "_operations",
    "_collectives",
    "_budget",
    "_dropout",
    "_adapter",
    "_norms",
    "_variants",
    "_matrices",
    "_parts",
    "_precondition",
    "_spec",
    "_init",
    "_active",
    "_attach",
    "_shardings",
    "_extract",
    "_measures",
    "_plots",
    "_transform",
    "_kernels",
    "_explain",
    "_fold",
    "_starts",
    "_merge",
    "_adaptive",
    "_fingerprint",
    "_manifest",
    "_checksums",
    "_item",
    "_state",
    "_ahead",
]
# Each imports any layer, and no door.
DOORS = ["adaptive", "analysis", "checkpoint", "optim", "sharding", "starts", "testing"]

# Inside a package likewise; those in one row are siblings and do not know each other.
INSIDE = {
    "_adaptive": [["_leaves", "_schedule"], ["_compact", "_importance", "_orthogonality"], ["_training"]],
    "_variants": [
        ["_numbers"],
        ["_base"],
        ["_adalora", "_alora", "_dora", "_full", "_lora", "_lora_bias", "_rows", "_rslora", "_vera"],
    ],
    "_starts": [["_leaf"], ["_activations", "_as_plain", "_lora_ga", "_olora", "_pissa", "_random"], ["_eva"]],
    "_transform": [
        ["_boundary", "_kept", "_origins", "_plan", "_refusal", "_registry", "_tokens"],
        ["_forms", "_factored"],
        ["_conv_steps", "_statistics"],
        ["_settings"],
        ["_interpreter"],
        ["_pair", "_placement"],
        [
            "_concatenate",
            "_control",
            "_conv",
            "_linear",
            "_lookup",
            "_loops",
            "_ragged",
            "_scalar",
            "_shape",
            "_shard_map",
            "_sharding",
            "_slices",
        ],
        ["_program"],
        ["_lora"],
    ],
}


def name_of(file: pathlib.Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").as_posix()


def each_file(*, but: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    files = [file for file in FILES if name_of(file) not in but]
    return pytest.mark.parametrize("file", files, ids=name_of)


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from nodes(child)


def imported(file: pathlib.Path) -> Iterator[str]:
    """The modules that a file imports, in full: `lora_jax._paths`."""
    package = ["lora_jax", *file.relative_to(PACKAGE).parts[:-1]]
    for node in nodes(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            if module in ("lora_jax", *(f"lora_jax.{inside}" for inside in INSIDE)):  # its names may be modules
                yield from (f"{module}.{alias.name}" for alias in node.names)
            else:
                yield module


def own_imports(file: pathlib.Path) -> list[list[str]]:
    return [module.split(".")[1:] for module in imported(file) if module.split(".")[0] == "lora_jax"]


def test_every_module_has_its_place_in_the_list() -> None:
    stems = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert stems == {"__init__", *LAYERS, *DOORS}
    for package, rows in INSIDE.items():
        assert {path.stem for path in (PACKAGE / package).glob("*.py")} == {"__init__", *itertools.chain(*rows)}


@each_file(but=("__init__",))
def test_imports_point_down_the_list(file: pathlib.Path) -> None:
    layer = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    below = LAYERS if layer in DOORS else LAYERS[: LAYERS.index(layer)]
    others = {module[0] for module in own_imports(file) if module[0] != layer}
    assert others <= set(below)


@pytest.mark.parametrize("package", INSIDE)
def test_variants_and_rules_do_not_know_each_other(package: str) -> None:
    rows = INSIDE[package]
    for number, row in enumerate(rows):
        below = set(itertools.chain(*rows[:number]))
        for name in row:
            inside = {module[1] for module in own_imports(PACKAGE / package / f"{name}.py") if module[0] == package}
            assert inside <= below, name


def test_the_face_imports_no_door() -> None:
    assert not {module[0] for module in own_imports(PACKAGE / "__init__.py")} & set(DOORS)


@each_file()
def test_jax_s_inner_parts_are_left_alone(file: pathlib.Path) -> None:
    text = file.read_text()
    assert "jax._src" not in text
    assert "jax.extend" not in text or name_of(file) == "_compat"
    assert not [module for module in imported(file) if module.startswith(("jax.interpreters", "jaxlib"))]


# What an import loads

HEAVY = ["orbax", "tensorstore", "optax", "safetensors", "flax.nnx", "chex", "matplotlib"]
IMPORT = """
import sys
import jax, flax
before = set(sys.modules)
import lora_jax as lj
"""
USE = """
import jax.numpy as jnp
params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
adapter = lj.init(jax.random.key(0), params, {"**/kernel": lj.LoRA(rank=1, alpha=1), "**/bias": lj.Full()})
apply = lambda p, x: x @ p["dense"]["kernel"] + p["dense"]["bias"]
x = jnp.ones((2, 4))
lj.lora(apply)(params, adapter, x)
str(lj.explain(apply, params, adapter, x)), lj.kernels(apply, params, x)
lj.unmerge(lj.merge(params, adapter), adapter, base=params)
"""


def loaded(program: str) -> set[str]:
    """The modules that a fresh process has loaded after a program, beyond those of JAX and Flax."""
    program += "print(*sorted(set(sys.modules) - before))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.split())


def test_importing_loads_the_package_and_little_else() -> None:
    names = loaded(IMPORT)
    assert not [name for name in names if name.startswith(tuple(HEAVY))]
    packages = {name.split(".")[0] for name in names}
    assert packages - {"jax", "jaxlib", "flax"} - sys.stdlib_module_names == {"lora_jax"}


def test_training_and_merging_load_nothing_heavy_either() -> None:
    assert not [name for name in loaded(IMPORT + USE) if name.startswith(tuple(HEAVY))]


OPENED = ["adaptive", "analysis", "checkpoint", "optim", "plan", "restore", "save", "sharding", "starts", "testing"]


@pytest.mark.parametrize("name", OPENED)
def test_a_door_opens_when_it_is_asked_for(name: str) -> None:
    found = getattr(lora_jax, name)
    assert found.__name__.split(".")[-1] == name
    assert name in dir(lora_jax)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lora_jax' has no attribute 'LORA'"):
        _ = lora_jax.LORA


# What is public

FACE = {name: getattr(lora_jax, name) for name in dir(lora_jax) if not name.startswith("_")}


def test_the_face_is_what_the_design_names() -> None:
    public = {name for name, value in FACE.items() if not isinstance(value, types.ModuleType)}
    errors = {
        "LoRAError",
        "SpecError",
        "AdapterError",
        "UnsupportedError",
        "TracingError",
        "MergeError",
        "CheckpointError",
    }
    functions = {
        "lora",
        "init",
        "kernels",
        "active_tokens",
        "explain",
        "merge",
        "unmerge",
        "plan",
        "extract",
        "compress",
        "save",
        "restore",
    }
    left_by_python = {"annotations", "Any", "TYPE_CHECKING"}
    assert public - left_by_python == {
        "Adapter",
        "ALoRA",
        "LoRA",
        "LoRABias",
        "DoRA",
        "RSLoRA",
        "Rows",
        "Full",
        "VeRA",
        "AdaLoRA",
        *errors,
        *functions,
    }


def functions() -> dict[str, types.FunctionType]:
    doors = {door: getattr(lora_jax, door) for door in DOORS}
    found = {name: value for name, value in FACE.items() if inspect.isfunction(value)}
    for door, module in doors.items():
        found |= {f"{door}.{name}": getattr(module, name) for name in module.__all__}
    return {name: value for name, value in found.items() if inspect.isfunction(value)}


def each_function() -> list[Any]:
    """Their names; those of `testing` do not say what they return yet."""
    return list(functions())


@pytest.mark.parametrize("name", each_function())
def test_a_public_function_says_what_it_takes_and_gives_and_shows_it(name: str) -> None:
    doc, signature = inspect.getdoc(functions()[name]) or "", inspect.signature(functions()[name])
    assert doc.split("\n\n")[0].endswith(".")
    assert [title for title in ("\nArgs:\n", "\nReturns:\n", "\n>>> ") if title not in doc] == (
        [] if signature.return_annotation != "None" else ["\nReturns:\n"]
    )
    described = re.findall(r"^  \**(\w+):", doc, re.MULTILINE)
    assert [parameter for parameter in signature.parameters if parameter not in described] == []


@pytest.mark.parametrize("door", DOORS)
def test_a_door_names_what_it_shows(door: str) -> None:
    module = getattr(lora_jax, door)
    assert sorted(module.__all__) == list(module.__all__)
    assert module.__doc__


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


# Files and names


@each_file()
def test_no_file_is_long(file: pathlib.Path) -> None:
    assert len(file.read_text().splitlines()) <= 300


@each_file()
def test_a_file_opens_with_what_it_holds(file: pathlib.Path) -> None:
    assert ast.get_docstring(ast.parse(file.read_text()))


VAGUE = {"util", "utils", "helper", "helpers", "misc", "manager"}


@each_file()
def test_no_name_says_nothing(file: pathlib.Path) -> None:
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = [node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, defined)]
    words = {word for name in (file.stem, *names) for word in name.lower().split("_")}
    assert not words & VAGUE
    assert not [name for name in names if name.lower().endswith(tuple(VAGUE))]
