"""Every Python block of the README and of docs/ runs, in order, as a reader would run it."""

import operator
import re
import runpy
import shlex
import types
from pathlib import Path

import pytest
from helpers import sweep_except
from zoo.model import framework

import lora_jax as lj
from lora_jax._transform import registry as _registry
from lora_jax.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
API = sorted((ROOT / "docs" / "api").glob("*.md"))
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md", "benchmarks/README.md")]

# What is skipped where it is not installed.
NEEDS = {
    "models.md": ["haiku", "equinox", "keras", "penzai", "zoo.hugging_face"],
    "models_other.md": ["tunix", "maxtext", "diffusers"],
}


@pytest.mark.parametrize("page", sweep_except(PAGES[:1], PAGES), ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NEEDS.get(page.name, ()):
        framework(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_registry, "RULES", dict(_registry.RULES))  # what the page registers is removed
    names = run(page)
    if page.name == "from_peft.md":
        run_tables(page, names)


def run(page: Path) -> dict[str, object]:
    """Runs the blocks of a page, and returns the names that they define."""
    text = page.read_text()
    names: dict[str, object] = {"__name__": "__page__"}
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(page), "exec"), names)
    return names


def run_tables(page: Path, names: dict[str, object]) -> None:
    """Evaluates the code in the second column of each table; a spec is also initialized."""
    rows = re.findall(r"^\| .* \| (.*) \|$", page.read_text(), re.MULTILINE)
    codes = [code for row in rows for code in re.findall(r"`([^`]+)`", row) if re.search(r"[({]", code)]
    assert len(codes) > 60
    for code in codes:
        value = eval(code, names)
        if isinstance(value, dict) and code.startswith("{"):
            assert eval(f"lj.init(key, params, {code}, kernels=kernels)", names), code


@pytest.mark.parametrize("page", [*PAGES, *API, *OTHERS], ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_between_files_work_on_github(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def test_every_public_name_has_a_page() -> None:
    """`make docs` checks the same on the built site. A page names a module, or each of its names."""
    pages = "\n".join(page.read_text() for page in API)
    documented = set(re.findall(r"^::: lora_jax\.(\S+)$", pages, re.MULTILINE))
    modules = {name for name in lj.__all__ if isinstance(getattr(lj, name), types.ModuleType)}
    names = {f"{name}.{inner}" for name in modules - documented for inner in getattr(lj, name).__all__}
    assert names | {*lj.__all__} - modules <= documented
    assert all(operator.attrgetter(name)(lj) is not None for name in documented)


def test_the_table_in_the_readme_matches_explain() -> None:
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```(python|text)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(blocks[0][1], names)
    assert blocks[2][0] == "text"
    table = eval("str(lj.explain(model.apply, params, adapter, tokens, tx=tx))", names)
    assert table == blocks[2][1].rstrip("\n")


def test_the_page_of_rules_matches_the_registry() -> None:
    names = runpy.run_path(str(ROOT / "docs" / "make_rules.py"))
    # JAX's list of primitives differs between versions.
    written, generated = (text.split("## Refused")[0] for text in (names["PAGE"].read_text(), names["page"]()))
    assert written == generated, "python docs/make_rules.py writes it again"


def test_the_pictures_are_those_that_the_script_draws() -> None:
    names = runpy.run_path(str(ROOT / "docs" / "pictures.py"))
    for name, draw in names["PICTURES"].items():
        assert (ROOT / "docs" / f"{name}.svg").read_text() == str(draw()), "make pictures draws it again"


@pytest.mark.sweep
def test_the_picture_of_costs_and_its_text_match_the_plan() -> None:
    names = runpy.run_path(str(ROOT / "docs" / "pictures.py"))
    picture, page = (ROOT / "docs" / "costs.svg").read_text(), (ROOT / "docs" / "ideas.md").read_text()
    full, merged, lora = names["costs"]()
    assert all(f">{row.flops / 1e12:.2f} T<" in picture for row in (full, merged, lora))
    adapter = lora.trained / 3  # as large as each of its two moments
    assert f"{2 * adapter / 1e6:.1f} MB, those of all parameters {full.trained / 1e6:.1f} MB" in " ".join(page.split())
    assert abs(lora.flops / full.flops - 2 / 3) < 0.02


@pytest.mark.sweep
def test_the_commands_of_a_page_print_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text, names = (ROOT / "docs" / "cli.md").read_text(), dict[str, object]()
    for language, block in re.findall(r"^```(python|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(block, names)
            continue
        for command, shown in re.findall(r"^\$ lora-jax (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
            capsys.readouterr()
            main(shlex.split(command))
            printed = re.sub(r" +$", "", "".join(capsys.readouterr()), flags=re.MULTILINE)
            assert printed == shown, command
