"""Draws the pictures of `ideas.md` as SVG files, and measures what the picture of costs shows.

Usage:
    PYTHONPATH=benchmarks python docs/pictures.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from drawing import BLUE, GRAY, GREEN, ORANGE, PURPLE, Drawing

FOLDER = Path(__file__).parent
OTHERS = [ORANGE, GREEN, PURPLE]  # of the adapters


def frozen() -> Drawing:
    """What is frozen, and what is trained, optimized and saved."""
    picture = Drawing(720, 320, "The model's parameters are frozen; only the adapter is trained, optimized and saved.")
    picture.box(20, 40, 180, 120, BLUE)
    picture.text(110, 92, "params", color=BLUE, bold=True)
    picture.text(110, 118, "frozen, any dtype")
    picture.box(20, 210, 180, 70, ORANGE)
    picture.text(110, 240, "adapter", color=ORANGE, bold=True)
    picture.text(110, 266, "{path: A, B}")
    picture.box(290, 80, 230, 90, GRAY)
    picture.text(405, 120, "lora(apply)", bold=True)
    picture.text(405, 146, "the model, unmodified")
    picture.arrow((200, 105), (288, 105), color=BLUE)
    picture.arrow((200, 230), (245, 230), (245, 145), (288, 145), color=ORANGE)
    picture.text(405, 30, "x")
    picture.arrow((405, 40), (405, 78))
    picture.arrow((520, 125), (598, 125))
    picture.box(600, 101, 90, 48, GRAY)
    picture.text(645, 131, "loss")
    picture.arrow((645, 149), (645, 262), (202, 262), color=ORANGE, dashed=True)
    picture.text(430, 250, "gradient, optimizer, checkpoint:", color=ORANGE)
    picture.text(430, 288, "the adapter only", color=ORANGE)
    return picture


def factors() -> Drawing:
    """Where the factors act: beside the kernel, and not in it."""
    title = "x is multiplied by the frozen kernel W0, and by A, the scale s and B; the two results are added."
    picture = Drawing(720, 350, title)
    picture.box(25, 140, 70, 48, GRAY)
    picture.text(60, 170, "x")
    picture.text(62, 212, "tokens × in", color=GRAY)
    picture.box(215, 25, 170, 120, BLUE)
    picture.text(300, 80, "W0", color=BLUE, bold=True)
    picture.text(300, 106, "in × out, frozen")
    picture.arrow((95, 152), (140, 152), (140, 85), (213, 85))
    picture.arrow((385, 85), (560, 85), (560, 143))
    picture.text(470, 76, "x·W0")
    picture.box(180, 190, 28, 120, ORANGE)
    picture.text(194, 256, "A", color=ORANGE, bold=True)
    picture.text(194, 334, "in × r")
    picture.arrow((95, 176), (140, 176), (140, 250), (178, 250))
    picture.arrow((208, 250), (317, 250))
    picture.text(262, 240, "x·A")
    picture.text(262, 275, "tokens × r", color=GRAY)
    picture.circle(332, 250, "s")
    picture.arrow((347, 250), (388, 250))
    picture.box(390, 235, 120, 30, ORANGE)
    picture.text(450, 256, "B", color=ORANGE, bold=True)
    picture.text(450, 288, "r × out")
    picture.arrow((510, 250), (560, 250), (560, 175))
    picture.text(572, 244, "((x·A)·s)·B", at="start")
    picture.circle(560, 160, "+")
    picture.arrow((575, 160), (630, 160))
    picture.box(632, 136, 60, 48, GRAY)
    picture.text(662, 166, "y")
    return picture


def many() -> Drawing:
    """One base and one adapter for each example."""
    title = "A batch of four examples: one product with the base, and the factors of each example's own adapter."
    picture = Drawing(720, 350, title)
    names, chosen = ["french", "german", "polish"], [2, 0, None, 1]
    picture.text(72, 30, "batch", bold=True)
    for row, which in enumerate(chosen):
        y = 44 + 44 * row
        color = GRAY if which is None else OTHERS[which]
        picture.box(25, y, 94, 34, color)
        picture.text(72, y + 23, "base" if which is None else names[which], color=color, bold=True)
    picture.box(230, 44, 190, 166, BLUE)
    picture.text(325, 118, "W0", color=BLUE, bold=True)
    picture.text(325, 144, "one product for all")
    picture.arrow((119, 127), (228, 127))
    picture.arrow((420, 127), (610, 127))
    picture.circle(625, 127, "+")
    picture.arrow((640, 127), (684, 127))
    picture.text(698, 133, "y")
    picture.text(72, 286, "stack", bold=True)
    for index, name in enumerate(names):
        x = 130 + 150 * index
        picture.box(x, 258, 135, 46, OTHERS[index])
        picture.text(x + 67, 287, f"{name}: A, B", color=OTHERS[index], bold=True)
    picture.text(352, 334, "gathered by number: other numbers compile nothing", color=GRAY)
    picture.arrow((565, 281), (625, 281), (625, 142))
    picture.text(614, 242, "x·A·B of each example", at="end")
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
    picture = Drawing(720, 350, "FLOPs and memory of a training step: full fine-tuning, materialized kernels, LoRA.")
    picture.text(315, 30, "FLOPs", bold=True)
    picture.text(540, 30, "memory", bold=True)
    most_flops = max(row.flops for row in rows)
    most_bytes = max(row.parameters + row.trained + row.temporary for row in rows)
    for index, row in enumerate(rows):
        y = 50 + 62 * index
        picture.text(225, y + 25, row.name, at="end", bold=row.name == "LoRA")
        width = 165 * row.flops / most_flops
        picture.box(237, y, width, 40, GRAY, solid=True)
        picture.text(229 + width, y + 26, f"{row.flops / 1e12:.2f} T", color="white", at="end")
        x = 428.0
        for size, color in ((row.parameters, BLUE), (row.trained, ORANGE), (row.temporary, GRAY)):
            width = 205 * size / most_bytes
            picture.box(x, y, width, 40, color, solid=True)
            x += width
        picture.text(x + 8, y + 26, f"{(row.parameters + row.trained + row.temporary) / 1e9:.2f} GB", at="start")
    names = (("parameters", BLUE), ("adapter, optimizer", ORANGE), ("activations, gradients", GRAY))
    x = 95.0
    for name, color in names:
        picture.box(x, 250, 16, 16, color, solid=True)
        picture.text(x + 23, 264, name, at="start")
        x += 55 + 8.4 * len(name)
    picture.text(360, 304, "12 layers of width 768, rank 8, 8 × 128 tokens, float32, AdamW", color=GRAY)
    picture.text(360, 330, f"lj.plan, JAX {version} for CPU", color=GRAY)
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
