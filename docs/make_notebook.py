"""Runs examples/notebook.ipynb and stores it with its outputs, for GitHub's preview: without scripts and widgets."""

import html
from pathlib import Path
from typing import Any

import nbclient
import nbformat

PAGE = Path(__file__).parents[1] / "examples" / "notebook.ipynb"
WIDGET = "application/vnd.jupyter.widget-{}+json"


def run() -> Any:
    """Returns the notebook with the outputs of a run; raises if a cell does."""
    notebook = nbformat.read(PAGE, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(PAGE.parent)}}).execute()
    return notebook


def stored(notebook: Any) -> Any:
    """Changes a notebook that was run to what is stored: progress bars become text, and scripts are removed."""
    widgets = notebook.metadata.pop("widgets", {}).get(WIDGET.format("state"), {}).get("state", {})
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _is_stored(output)]
            for output in cell.outputs:
                view = output.get("data", {}).pop(WIDGET.format("view"), None)
                if view:
                    output.data["text/plain"] = _bar(widgets, view["model_id"])
    return notebook


def _is_stored(output: Any) -> bool:
    return output.get("name") != "stderr" and "<script" not in output.get("data", {}).get("text/html", "")


def _bar(widgets: Any, box: str) -> str:
    """Returns the text of a bar of tqdm, which is a box of a text, a bar and a text."""
    before, bar, after = (
        widgets[child.removeprefix("IPY_MODEL_")]["state"]["value"] for child in widgets[box]["state"]["children"]
    )
    text = f"{before}|{'█' * 20 if bar else ''}|{after}"
    return html.unescape(text).replace("\u2007", " ")  # spaces as wide as a digit


if __name__ == "__main__":
    nbformat.write(stored(run()), PAGE)
