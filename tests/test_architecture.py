"""The package layout: what imports what, what an import loads, and what every public name and file must have."""

import ast
import graphlib
import inspect
import pathlib
import re
import subprocess
import sys
import types
from collections.abc import Iterator

import pytest

import lora_jax

PACKAGE = pathlib.Path(lora_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# The layers of imports: a folder or file imports only itself and those before it.
ORDER = [
    "_version",
    "_errors",
    "_compat",
    "_core",
    "targets",
    "quant",
    "_variants",
    "_transform",
    "sharding",
    "_merge",
    "_report",
    "optim",
    "adaptive",
    "analysis",
    "starts",
    "checkpoint",
    "many",
    "peft",
    "qwix",
    "nnx",
    "testing",
    "cli",
]
PUBLIC = [name for name in ORDER if not name.startswith("_")]


def name_of(file: pathlib.Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").as_posix()


def module_of(file: pathlib.Path) -> str:
    """The name inside the package, such as `_core.paths`; for an `__init__.py`, the name of the folder."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def imported(file: pathlib.Path) -> Iterator[str]:
    """The full names of the modules that a file imports, such as `lora_jax._core.paths`, also under TYPE_CHECKING."""
    package = ["lora_jax", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix("lora_jax.")
                yield f"{module}.{alias.name}" if inner in MODULES else module


def own_imports(file: pathlib.Path) -> set[str]:
    names = {module.removeprefix("lora_jax.") for module in imported(file) if module.startswith("lora_jax.")}
    return names - {module_of(file)}


def test_every_entry_of_the_package_is_in_the_order() -> None:
    entries = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert entries == {"__init__", *ORDER}


def test_imports_follow_the_order() -> None:
    for module in filter(None, MODULES):
        own = module.split(".")[0]
        imports = {other.split(".")[0] for other in own_imports(MODULES[module])}
        assert imports <= set(ORDER[: ORDER.index(own) + 1]), module


def test_no_import_is_circular() -> None:
    graph = {module: own_imports(file) for module, file in MODULES.items() if module}
    graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError that names the modules


@pytest.mark.parametrize("folder", ["_variants", "_transform/rules"])
def test_variants_and_rules_do_not_know_each_other(folder: str) -> None:
    for file in (PACKAGE / folder).glob("[!_]*.py"):
        assert not {module for module in own_imports(file) if module.startswith(folder.replace("/", "."))}, file


def test_only_public_jax_is_imported_and_jax_extend_in_one_file() -> None:
    for file in FILES:
        text = file.read_text()
        assert "jax._src" not in text, file
        assert "jax.extend" not in text or name_of(file) == "_compat", file
        assert not [module for module in imported(file) if module.startswith(("jax.interpreters", "jaxlib"))], file


# Modules that an import loads

HEAVY = [
    "orbax",
    "tensorstore",
    "optax",
    "safetensors",
    "flax.nnx",
    "chex",
    "matplotlib",
    "cyclopts",
    "rich",
    "treescope",
]
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
    """The modules that a program loads in a new process, without those of JAX and Flax."""
    program += "print(*sorted(set(sys.modules) - before))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.split())


def test_importing_loads_little_beyond_the_package() -> None:
    names = loaded(IMPORT)
    assert not [name for name in names if name.startswith(tuple(HEAVY))]
    packages = {name.split(".")[0] for name in names}
    assert packages - {"jax", "jaxlib", "flax"} - sys.stdlib_module_names == {"lora_jax"}


def test_training_and_merging_load_no_heavy_modules() -> None:
    assert not [name for name in loaded(IMPORT + USE) if name.startswith(tuple(HEAVY))]


OPENED = [
    "adaptive",
    "analysis",
    "checkpoint",
    "cli",
    "many",
    "nnx",
    "optim",
    "peft",
    "plan",
    "qwix",
    "restore",
    "save",
    "sharding",
    "starts",
    "testing",
]


@pytest.mark.parametrize("name", OPENED)
def test_a_submodule_loads_on_first_use(name: str) -> None:
    found = getattr(lora_jax, name)
    assert found.__name__.split(".")[-1] == name
    assert name in dir(lora_jax)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lora_jax' has no attribute 'LORA'"):
        _ = lora_jax.LORA


# Public API

TOP = {name: getattr(lora_jax, name) for name in dir(lora_jax) if not name.startswith("_")}


def test_the_public_names_match_the_design() -> None:
    public = {name for name, value in TOP.items() if not isinstance(value, types.ModuleType)}
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
        "adapt",
        "spec",
        "kernels",
        "active_tokens",
        "explain",
        "merge",
        "merge_report",
        "unmerge",
        "unmerge_approximately",
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
        "LoRAXS",
        "DeLoRA",
        "IA3",
        "MiSS",
        "QALoRA",
        "Layers",
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
    modules = {module: getattr(lora_jax, module) for module in PUBLIC}
    found = {name: value for name, value in TOP.items() if inspect.isfunction(value)}
    for prefix, module in modules.items():
        found |= {f"{prefix}.{name}": getattr(module, name) for name in module.__all__}
    return {name: value for name, value in found.items() if inspect.isfunction(value)}


@pytest.mark.parametrize("name", list(functions()))
def test_a_public_function_documents_arguments_results_and_an_example(name: str) -> None:
    doc, signature = inspect.getdoc(functions()[name]) or "", inspect.signature(functions()[name])
    assert doc.split("\n\n")[0].endswith(".")
    assert [title for title in ("\nArgs:\n", "\nReturns:\n", "\n>>> ") if title not in doc] == (
        [] if signature.return_annotation != "None" else ["\nReturns:\n"]
    )
    described = re.findall(r"^  \**(\w+):", doc, re.MULTILINE)
    assert [parameter for parameter in signature.parameters if parameter not in described] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_module_has_a_list_of_names(name: str) -> None:
    module = getattr(lora_jax, name)
    assert all(hasattr(module, public) for public in module.__all__)
    assert module.__doc__


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


# Files and names


def test_no_file_is_long() -> None:
    assert not [file for file in FILES if len(file.read_text().splitlines()) > 300]


def test_a_file_has_a_module_docstring() -> None:
    assert not [file for file in FILES if not ast.get_docstring(ast.parse(file.read_text()))]


VAGUE = {"util", "utils", "helper", "helpers", "misc", "manager"}


def test_no_file_or_definition_has_a_meaningless_name() -> None:
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for file in FILES:
        names = [node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, defined)]
        words = {word for name in (file.stem, *names) for word in name.lower().split("_")}
        assert not words & VAGUE, file
        assert not [name for name in names if name.lower().endswith(tuple(VAGUE))], file


def test_the_citation_states_the_version() -> None:
    text = (PACKAGE.parent / "CITATION.cff").read_text()
    assert re.search(r"(?m)^version: (.*)$", text)[1] == lora_jax.__version__
