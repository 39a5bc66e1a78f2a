"""Draws the pictures of `ideas.md` as SVG files, and measures what the picture of costs shows.

Usage:
    PYTHONPATH=benchmarks python docs/pictures.py
"""

from __future__ import annotations

import dataclasses
import math
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent
BLUE, ORANGE, GRAY, INK = "#3b6ea5", "#d1702f", "#8a8a8a", "#333333"
LIGHT = {BLUE: "#d8e4f0", ORANGE: "#f8e0d0", GRAY: "#ececec"}
OTHERS = ["#d1702f", "#3f8f5f", "#8a5fb0"]  # adapters, each of a color


class Drawing:
    """An SVG picture with a white background, so that it can be read on pages of any color."""

    def __init__(self, width: int, height: int, title: str) -> None:
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img"'
        self.lines = [
            f'{head} font-family="system-ui, sans-serif" font-size="14">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" rx="6" fill="white"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, color: str, *, solid: bool = False) -> None:
        """Draws a rectangle with its corner at (x, y)."""
        fill = color if solid else LIGHT.get(color, "white")
        self.lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}" stroke="{color}"/>'
        )

    def text(self, x: float, y: float, text: str, *, color: str = INK, at: str = "middle", bold: bool = False) -> None:
        """Writes a line of text; `at` says which part of it is at x."""
        weight = ' font-weight="600"' if bold else ""
        self.lines.append(f'<text x="{x:g}" y="{y:g}" fill="{color}" text-anchor="{at}"{weight}>{escape(text)}</text>')

    def arrow(self, *points: tuple[float, float], color: str = INK, dashed: bool = False) -> None:
        """Draws a line through the points, with a head at the last."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.lines.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"{dash}/>')
        (x0, y0), (x1, y1) = points[-2:]
        angle = math.atan2(y1 - y0, x1 - x0)
        sides = [(x1 - 9 * math.cos(angle + turn), y1 - 9 * math.sin(angle + turn)) for turn in (-0.4, 0.4)]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in [(x1, y1), *sides])
        self.lines.append(f'<polygon points="{corners}" fill="{color}"/>')

    def circle(self, x: float, y: float, text: str) -> None:
        """Draws a small circle with a sign in it."""
        self.lines.append(f'<circle cx="{x:g}" cy="{y:g}" r="13" fill="white" stroke="{INK}" stroke-width="1.5"/>')
        self.text(x, y + 5, text)

    def __str__(self) -> str:
        return "\n".join([*self.lines, "</svg>", ""])


def frozen() -> Drawing:
    """What is frozen, and what is trained, optimized and saved."""
    picture = Drawing(720, 300, "The model's parameters are frozen; only the adapter is trained, optimized and saved.")
    picture.box(30, 30, 170, 120, BLUE)
    picture.text(115, 80, "params", color=BLUE, bold=True)
    picture.text(115, 102, "frozen, any dtype")
    picture.box(30, 190, 170, 44, ORANGE)
    picture.text(115, 217, "adapter", color=ORANGE, bold=True)
    picture.text(115, 262, "a pytree of its own: {path: A, B}")
    picture.box(310, 80, 170, 90, GRAY)
    picture.text(395, 120, "lora(apply)", bold=True)
    picture.text(395, 142, "the model, unmodified")
    picture.arrow((200, 100), (308, 100), color=BLUE)
    picture.arrow((200, 205), (255, 205), (255, 150), (308, 150), color=ORANGE)
    picture.text(395, 30, "x")
    picture.arrow((395, 38), (395, 78))
    picture.arrow((480, 125), (556, 125))
    picture.box(558, 103, 130, 44, GRAY)
    picture.text(623, 130, "loss")
    picture.arrow((623, 147), (623, 222), (202, 222), color=ORANGE, dashed=True)
    picture.text(440, 213, "gradient, optimizer, checkpoint: the adapter only", color=ORANGE)
    return picture


def factors() -> Drawing:
    """Where the factors act: beside the kernel, and not in it."""
    title = "x is multiplied by the frozen kernel W0, and by A, the scale s and B; the two results are added."
    picture = Drawing(720, 330, title)
    picture.box(30, 130, 60, 44, GRAY)
    picture.text(60, 157, "x")
    picture.text(60, 194, "tokens × in", color=GRAY)
    picture.box(235, 30, 150, 110, BLUE)
    picture.text(310, 80, "W0", color=BLUE, bold=True)
    picture.text(310, 102, "in × out, frozen")
    picture.arrow((90, 142), (140, 142), (140, 85), (233, 85))
    picture.arrow((385, 85), (580, 85), (580, 129))
    picture.text(480, 77, "x·W0")
    picture.box(190, 180, 26, 110, ORANGE)
    picture.text(203, 240, "A", color=ORANGE, bold=True)
    picture.text(203, 310, "in × r")
    picture.arrow((90, 162), (140, 162), (140, 235), (188, 235))
    picture.arrow((216, 235), (315, 235))
    picture.text(264, 227, "x·A")
    picture.text(264, 254, "tokens × r", color=GRAY)
    picture.circle(330, 235, "s")
    picture.arrow((343, 235), (393, 235))
    picture.box(395, 222, 130, 26, ORANGE)
    picture.text(460, 240, "B", color=ORANGE, bold=True)
    picture.text(460, 268, "r × out")
    picture.arrow((525, 235), (580, 235), (580, 159))
    picture.text(612, 227, "((x·A)·s)·B")
    picture.circle(580, 144, "+")
    picture.arrow((593, 144), (640, 144))
    picture.box(642, 122, 50, 44, GRAY)
    picture.text(667, 149, "y")
    return picture


def many() -> Drawing:
    """One base and one adapter for each example."""
    title = "A batch of four examples: one product with the base, and the factors of each example's own adapter."
    picture = Drawing(720, 310, title)
    names, chosen = ["french", "german", "polish"], [2, 0, None, 1]
    picture.text(70, 28, "batch", bold=True)
    for row, which in enumerate(chosen):
        y = 44 + 40 * row
        picture.box(30, y, 80, 28, GRAY if which is None else OTHERS[which])
        picture.text(70, y + 19, "base" if which is None else names[which])
    picture.box(245, 44, 150, 148, BLUE)
    picture.text(320, 112, "W0", color=BLUE, bold=True)
    picture.text(320, 134, "one product for all")
    picture.arrow((110, 118), (243, 118))
    picture.arrow((395, 118), (595, 118))
    picture.circle(610, 118, "+")
    picture.arrow((623, 118), (670, 118))
    picture.text(690, 123, "y")
    picture.text(70, 250, "stack", bold=True)
    for index, name in enumerate(names):
        x = 150 + 145 * index
        picture.box(x, 225, 130, 40, OTHERS[index])
        picture.text(x + 65, 250, f"{name}: A, B", color=OTHERS[index], bold=True)
    picture.text(357, 292, "gathered by number: other numbers, and other adapters, compile nothing", color=GRAY)
    picture.arrow((570, 245), (610, 245), (610, 133))
    picture.text(500, 178, "each example its own", color=INK)
    return picture


class Cost(NamedTuple):
    """What one training step takes, by `lj.plan`.

    Attributes:
      name: the way to train.
      flops: FLOPs of the step.
      parameters: bytes of the model.
      trained: bytes of the adapter and of the optimizer state.
      temporary: bytes of activations, gradients and other buffers, as the compiler lays them out.
    """

    name: str
    flops: int
    parameters: int
    trained: int
    temporary: int


def costs() -> list[Cost]:
    """Compiles a step of full fine-tuning, of LoRA, and of LoRA with kernels that are materialized in each step."""
    import jax
    import numpy as np
    import optax
    from decoder import Decoder, cross_entropy, plain
    from sizes import BASE

    import lora_jax as lj

    size = dataclasses.replace(BASE, batch=8)
    model = Decoder(size)
    tokens = jax.ShapeDtypeStruct((size.batch, size.length), np.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))

    def planned(form: Any, *, full: bool) -> Any:
        spec = {lj.targets.all_linear: lj.LoRA(rank=8, alpha=16)}
        tx = optax.adamw(1e-3)
        return lj.plan(plain(model), params, spec, tx, mesh, tokens, loss=cross_entropy, form=form, full=full)

    factored, merged = planned("factored", full=True), planned("merged", full=False)
    steps = {"full fine-tuning": factored.full, "W0 + s·A·B in each step": merged.lora, "LoRA": factored.lora}
    return [
        Cost(name, step.flops, step.parameters, step.adapter + step.optimizer, step.temporary)
        for name, step in steps.items()
    ]


def draw_costs(rows: list[Cost], version: str) -> Drawing:
    """Bars of FLOPs and of memory."""
    picture = Drawing(720, 320, "FLOPs and memory of a training step: full fine-tuning, materialized kernels, LoRA.")
    picture.text(300, 28, "FLOPs", bold=True)
    picture.text(560, 28, "memory", bold=True)
    most_flops = max(row.flops for row in rows)
    most_bytes = max(row.parameters + row.trained + row.temporary for row in rows)
    for index, row in enumerate(rows):
        y = 50 + 62 * index
        picture.text(200, y + 24, row.name, at="end", bold=row.name == "LoRA")
        width = 180 * row.flops / most_flops
        picture.box(212, y, width, 36, GRAY, solid=True)
        picture.text(206 + width, y + 24, f"{row.flops / 1e12:.2f} T", color="white", at="end")
        x = 430.0
        for size, color in ((row.parameters, BLUE), (row.trained, ORANGE), (row.temporary, GRAY)):
            width = 210 * size / most_bytes
            picture.box(x, y, width, 36, color, solid=True)
            x += width
        picture.text(x + 8, y + 24, f"{(row.parameters + row.trained + row.temporary) / 1e9:.2f} GB", at="start")
    names = (("parameters", BLUE), ("adapter, optimizer", ORANGE), ("activations, gradients", GRAY))
    x = 212.0
    for name, color in names:
        picture.box(x, 246, 14, 14, color, solid=True)
        picture.text(x + 20, 258, name, at="start")
        x += 50 + 7.2 * len(name)
    note = f"12 layers of width 768, rank 8, 8 × 128 tokens, float32, AdamW; lj.plan, JAX {version} for CPU"
    picture.text(360, 296, note, color=GRAY)
    return picture


PICTURES = {"frozen": frozen, "factors": factors, "adapters": many}


if __name__ == "__main__":
    import jax

    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(str(draw()))
    found = costs()
    (FOLDER / "costs.svg").write_text(str(draw_costs(found, jax.__version__)))
    for row in found:
        print(row)
