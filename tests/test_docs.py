"""Every Python block of the README and of docs/ runs, in order, as a reader would run it."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
from helpers import sweep_except
from zoo.model import framework

from lora_jax._transform import registry as _registry
from lora_jax.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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
    text = page.read_text()
    names: dict[str, object] = {"__name__": "__page__"}
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(page), "exec"), names)


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
