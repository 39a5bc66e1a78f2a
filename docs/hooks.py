"""Hooks of MkDocs: READMEs as pages, links that work on GitHub and in the site, doctests in docstrings, a full API.

Links are written as on GitHub, between files of the repository. A file outside docs/ that has a page is in `PAGES`.
"""

from __future__ import annotations

import ast
import posixpath
import re
import zlib
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]

PAGES = {
    "README.md": "index.md",
    "examples/README.md": "examples.md",
    "benchmarks/README.md": "benchmark_programs.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "license.txt",
}
SOURCES = {page: source for source, page in PAGES.items()}


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of files outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites links between files of the repository as links between pages."""
    target = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(target, f"docs/{target}"))

    def rewrite(link: re.Match[str]) -> str:
        file = posixpath.normpath(posixpath.join(folder, link[1]))
        to = PAGES.get(file, file.removeprefix("docs/") if file.startswith("docs/") else None)
        return link[0] if to is None else f"]({posixpath.relpath(to, posixpath.dirname(target) or '.')}{link[2] or ''})"

    return re.sub(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)", rewrite, markdown)


def on_post_build(config: Any, **_: Any) -> None:
    """Checks that the site documents every public name.

    Raises:
      PluginError: if a name is missing; names all of them.
    """
    inventory = (Path(config.site_dir) / "objects.inv").read_bytes().split(b"\n", 4)[4]
    documented = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}
    if missing := sorted(public_names() - documented):
        raise PluginError(f"Expected every public name in docs/api/; these are missing: {', '.join(missing)}.")


def public_names() -> set[str]:
    """Returns the names in `__all__` of the package and its public modules, without the modules."""
    names = set()
    for file in sorted((ROOT / "lora_jax").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        module = parts[:-1] if parts[-1] == "__init__" else parts
        if any(part.startswith("_") for part in module):
            continue
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names |= {".".join((*module, name)) for name in ast.literal_eval(node.value)}
    return {name for name in names if not is_module(name)}


def is_module(name: str) -> bool:
    """Returns whether a dotted name is that of a module or a package of the library."""
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


class Doctests(griffe.Extension):
    """Puts doctests into code blocks; Markdown would read `>>>` as a quotation."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes the docstring of one object."""
        if obj.docstring:
            block = r"^([ \t]*)>>> .*(?:\n\1\S.*|\n\1 .*)*"
            obj.docstring.value = re.sub(block, _fenced, obj.docstring.value, flags=re.MULTILINE)


def _fenced(block: re.Match[str]) -> str:
    return f"{block[1]}```pycon\n{block[0]}\n{block[1]}```"
