"""Tables, plot and page section with the figures of `scale.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from records import aligned

Row = dict[str, Any]  # the figures of one plan, from JSON

SWEEPS = {"layers": [10, 20, 40, 80], "rank": [4, 16, 64, 256], "sequences": [1, 2, 4, 8]}
TITLES = {"layers": "layers", "rank": "rank", "sequences": "sequences per row of the mesh"}


def gigabytes(count: float | None) -> str:
    return "–" if count is None else f"{count / 1e9:.2f}" if count < 99.5e9 else f"{count / 1e9:.0f}"


def tera(count: float) -> str:
    return f"{count / 1e12:.1f}"


def bytes_sent(step: Row) -> float | None:
    return None if step["wire"] is None else sum(step["wire"].values())


def pair(row: Row, value: Callable[[Row], float | None], show: Callable[[Any], str]) -> str:
    """Returns the values for LoRA and for full fine-tuning."""
    return f"{show(value(row['lora']))} / {show(value(row['full']))}"


def setup(row: Row) -> list[str]:
    return [row["model"], f"{row['devices']} ({row['mesh']['data']} × {row['mesh']['model']})", row["kind"]]


def memory(rows: list[Row]) -> list[list[str]]:
    """Returns the table of the memory of one device, in gigabytes."""
    lines = [["model", "devices", "compiler", "parameters", "adapter", "optimizer", "temporary", "peak", "ratio"]]
    for row in rows:
        lines.append(
            [
                *setup(row),
                gigabytes(row["lora"]["parameters"]),
                gigabytes(row["lora"]["adapter"]),
                *(
                    pair(row, lambda step, name=name: step[name], gigabytes)
                    for name in ("optimizer", "temporary", "peak")
                ),
                f"{row['lora']['peak'] / row['full']['peak']:.2f}",
            ]
        )
    return lines


def work(rows: list[Row]) -> list[list[str]]:
    """Returns the table of FLOPs, bytes sent and compilation, of programs whose bytes sent are known."""
    heads = ["TFLOPs", "ratio", "sent, GB", "all-reduce, GB", "ratio", "largest gather, GB"]
    lines = [["model", "devices", *heads, "compile, s", "resident, GB"]]
    for row in rows:
        if row["lora"]["wire"] is None:
            continue
        lora, full = row["lora"], row["full"]
        lines.append(
            [
                *setup(row)[:2],
                pair(row, lambda step: step["flops"] / step["devices"], tera),
                f"{lora['flops'] / full['flops']:.2f}",
                pair(row, bytes_sent, gigabytes),
                pair(row, lambda step: step["wire"].get("all-reduce", 0), gigabytes),
                f"{bytes_sent(lora) / bytes_sent(full):.2f}",  # type: ignore[operator]
                gigabytes(lora["largest_gather"]),
                pair(row, lambda step: step["seconds"], lambda s: f"{s:.1f}"),
                gigabytes(row["resident"]),
            ]
        )
    return lines


def growth(what: str, rows: list[Row]) -> list[list[str]]:
    """Returns the table of the figures for several values of one size."""
    lines: list[tuple[str, Callable[[Row], str]]] = [
        (TITLES[what], lambda row: str(row[what])),
        ("adapter, GB", lambda row: f"{row['lora']['adapter'] / 1e9:.3f}"),
        ("temporary, GB", lambda row: pair(row, lambda step: step["temporary"], gigabytes)),
        ("peak, GB", lambda row: pair(row, lambda step: step["peak"], gigabytes)),
        ("TFLOPs", lambda row: pair(row, lambda step: step["flops"] / step["devices"], tera)),
        ("sent, GB", lambda row: pair(row, bytes_sent, gigabytes)),
        ("compile, s", lambda row: pair(row, lambda step: step["seconds"], lambda s: f"{s:.1f}")),
    ]
    return [[title, *map(show, rows)] for title, show in lines]


def tables(results: Row) -> str:
    """Returns all tables."""
    parts = [aligned(memory(results["rows"]))] if results["rows"] else []
    if len(lines := work(results["rows"])) > 1:
        parts.append(aligned(lines))
    parts += [aligned(growth(what, rows)) for what, rows in results["growth"].items()]
    return "\n\n".join(parts)


def document(results: Row, picture: str) -> str:
    """Returns the generated section of the page."""
    kinds = " and ".join(sorted({row["kind"] for row in results["rows"]}))
    parts = [
        f"From the compilers of jax {results['versions']['jax']} for {kinds}; 'TPU v5' is JAX's name for a v5p.",
        "## Memory\n\nGB per device, LoRA / full fine-tuning; the ratio is that of the peaks.",
        aligned(memory(results["rows"])),
        "## FLOPs, bytes sent, compilation\n\nFor one simulated device and one step, LoRA / full fine-tuning. "
        "FLOPs are those of the whole step divided by the number\nof devices. *Resident* is the peak memory of the "
        "planning process.",
        aligned(work(results["rows"])),
        "## Growth\n\nThe 70B shape on 64 simulated devices (8 × 8), one size changed at a time.",
        *(aligned(growth(what, rows)) for what, rows in results["growth"].items()),
        f"![Peak bytes of a device, by devices, layers, rank and sequences]({picture})",
    ]
    return "\n\n".join(parts)


def plot(results: Row, path: Path) -> None:
    """Plots the peak against each size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    simulated = [row for row in results["rows"] if row["kind"] == "cpu" and row["model"] == "70B"]
    panels = {"devices": simulated, **results["growth"]}
    figure, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 3.2), layout="constrained")
    for axis, (what, rows) in zip(axes, panels.items(), strict=True):
        for name, key in (("LoRA", "lora"), ("full fine-tuning", "full")):
            axis.plot([row[what] for row in rows], [row[key]["peak"] / 1e9 for row in rows], marker="o", label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks([row[what] for row in rows], [str(row[what]) for row in rows])
        axis.set_xlabel(TITLES.get(what, what))
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("peak per device, GB")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)
