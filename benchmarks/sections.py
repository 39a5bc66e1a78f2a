"""The sections of docs/benchmarks.md: what is measured, by which program, and how it is drawn."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

import drawing
from records import UNITS, Table


class Bars(NamedTuple):
    """Ratios to the reference, as bars.

    Attributes:
      title: what they show.
      panels: the columns, each a panel with a group for each table and a bar for each row. If the references are in the
        first column, the tables, each a panel with a group for each row and a bar for each column.
      bars: the rows or columns that are shown; all if empty.
      own: those of this library.
    """

    title: str
    panels: dict[str, str]
    bars: tuple[str, ...] = ()
    own: tuple[str, ...] = ("lora()",)

    def draw(self, tables: list[Table]) -> drawing.Drawing:
        panels: dict[str, dict[str, dict[str, float]]] = {panel: {} for panel in self.panels}
        for panel, name in self.panels.items():
            for table in tables:
                if table.across and table.title == name:
                    panels[panel] = {
                        row: self.ratios(table, [(row, bar) for bar in table.columns]) for row in table.rows
                    }
                elif not table.across and name in table.columns:
                    panels[panel][table.title] = self.ratios(table, [(bar, name) for bar in table.rows])
        measured = {panel: groups for panel, groups in panels.items() if any(groups.values())}
        return drawing.bars(self.title, measured, self.own)

    def ratios(self, table: Table, cells: list[tuple[str, str]]) -> dict[str, float]:
        names = [cell[table.across] for cell in cells]
        found = {name: table.relative(*cell) for name, cell in zip(names, cells, strict=True)}
        return {name: one.value for name, one in found.items() if one and (not self.bars or name in self.bars)}


class Lines(NamedTuple):
    """Figures by a number, as lines.

    Attributes:
      title: what they show.
      table: the title of the table.
      of: what the rows or columns whose names begin with the numbers count.
      unit: that of the figures.
      only: how the names of the lines begin.
    """

    title: str
    table: str
    of: str
    unit: str
    only: str = ""

    def draw(self, tables: list[Table]) -> drawing.Drawing:
        table = next(table for table in tables if table.title == self.table)
        cells = {(row, column): value for row, values in table.rows.items() for column, value in values.items()}
        lines: dict[str, list[float]] = {}
        numbers = []
        for names, value in cells.items():
            at, line = names if table.across else reversed(names)
            if at.endswith(f" {self.of}") and line.startswith(self.only):
                numbers.append(int(at.split()[0]))
                value = statistics.median(value) if isinstance(value, list) else value
                lines.setdefault(line.removeprefix(self.only), []).append(value / UNITS[self.unit])
        return drawing.lines(self.title, sorted(set(numbers)), lines, (self.of, self.unit))


class Benchmark(NamedTuple):
    """A section of the page.

    Attributes:
      name: that of its files in docs/benchmarks/.
      title: the heading.
      measures: what it measures, in one sentence.
      arguments: the script and its arguments; PYTHON is the interpreter that has what is needed.
      chart: its picture.
      needs: a package that not every environment has.
      by_default: whether `make benchmarks` measures it.
    """

    name: str
    title: str
    measures: str
    arguments: str
    chart: Bars | Lines | None = None
    needs: str = ""
    by_default: bool = True


LONG: dict[str, Any] = {"by_default": False}
TPU: dict[str, Any] = {"needs": "libtpu", "by_default": False}
COMPILED = "By the compiler for a TPU v5e; nothing is run, and FLOPs count a loop body once"
BENCHMARKS = (
    Benchmark(
        "step",
        "A training step",
        "A step of AdamW for a decoder of 2 layers (d = 256, rank 8, 512 tokens), with LoRA on all linear layers: LoRA "
        "written by hand into the model, before and after the bias, `lora()`, `W0 + s·A·B` materialized in each "
        "step, and full fine-tuning.",
        "step.py",
        Bars(
            "A training step, relative to LoRA by hand",
            {"FLOPs": "FLOPs", "temporary": "temporary", "time": "step"},
        ),
    ),
    Benchmark(
        "forms",
        "Ways to evaluate a contraction",
        "The same step with each form of evaluation, for decoders of two widths and ranks and a convolutional net; "
        "`lora()` chooses a form for each contraction, and *fewest FLOPs* is the best of all choices.",
        "forms.py",
        Bars(
            "Training steps, relative to LoRA by hand",
            {"FLOPs": "FLOPs", "temporary": "Temporary bytes", "time": "Time of a step"},
            ("lora()", "W0 + s·A·B each step", "full fine-tuning"),
        ),
    ),
    Benchmark(
        "variants",
        "Variants",
        "A step of each variant on all linear layers of a decoder of 2 layers, relative to LoRA; compiled and not run.",
        "variants.py",
        Bars(
            "Temporary bytes of a training step with each variant, relative to LoRA",
            {name: f"temporary, {name}" for name in ("unrolled", "scan + remat", "bfloat16")},
        ),
    ),
    Benchmark(
        "tried",
        "Optimizations tried beyond LoRA by hand",
        "Queries, keys and values of 4 layers with one product for their three factors, and with the rank-r "
        "activations recomputed in the backward pass; and a decoder in which only the last layer is adapted.",
        "tried.py",
    ),
    Benchmark(
        "layers",
        "Tracing and compilation",
        "Seconds to trace, lower and compile a training step of a decoder of width 64 with unrolled layers.",
        "layers.py",
        Lines("Seconds to trace, lower and compile a step, by layers", "Trace + lower + compile", "layers", "s"),
        **LONG,
    ),
    Benchmark(
        "import_time",
        "Import",
        "The time of `import lora_jax` in addition to that of JAX and Flax, each in new processes.",
        "import_time.py",
    ),
    Benchmark(
        "many",
        "Many adapters: training",
        "A training step of all adapters of a stack in one program, for the MiniLM of `examples/` with 4 or 16 "
        "sequences of 18 tokens for each adapter; *one by one* is a program of one adapter.",
        "many.py training",
    ),
    Benchmark(
        "lookups",
        "Many adapters: reaching the factors of each example",
        "One layer in which each example has its own adapter: factors *gathered*, examples *sorted* by adapter for "
        "`ragged_dot`, or *all* factors multiplied and those of others set to zero.",
        "many.py lookups",
    ),
    Benchmark(
        "serving",
        "Many adapters: serving",
        "A step of decoding of SmolLM2 (135 M parameters, rank 8 on all linear layers) for a batch of 8 rows that have "
        "different adapters, with several numbers of adapters loaded, and the same with PEFT on PyTorch.",
        "many.py serving --steps 5 --torch PYTHON",
        Bars(
            "A step of decoding, relative to the base",
            {"time": "step"},
            own=("mixed, 1 adapter", "mixed, 8 adapters", "mixed, 64 adapters"),
        ),
        needs="torch",
        **LONG,
    ),
    Benchmark(
        "quant",
        "Quantized bases",
        "Bits and errors of the formats for normal values; a training step of a decoder of 6 layers (d = 512, rank 8, "
        "512 tokens) on quantized bases, also with Qwix's QLoRA; and how its temporary bytes grow with the layers, 12 "
        "of which have 72 kernels: *kernels at once* is how many dequantized ones exist at a time, at most.",
        "quant.py --dtypes float32",
        Bars(
            "A training step on quantized bases, relative to a dense base",
            {"arguments": "arguments", "temporary": "temporary", "time": "step"},
            own=("NF4", "NF4, double", "Int8", "Float8"),
        ),
        needs="qwix",
        **LONG,
    ),
    Benchmark(
        "merge_files",
        "Merging into files",
        "Peak memory and time to merge rank 16 in all linear layers into the files of a Llama: `peft.merge_files`, and "
        "PEFT's `merge_and_unload` and `save_pretrained`; *rounded once* is the share of the elements of a kernel that "
        "are the sum in float32, rounded once.",
        "merge_files.py",
        needs="torch",
    ),
    Benchmark(
        "tpu",
        "On a TPU",
        f"{COMPILED}: the steps of `forms.py`, and two in bfloat16.",
        "on_tpu.py",
        Bars(
            "Training steps on a TPU, relative to LoRA by hand",
            {"accessed": "Bytes accessed", "temporary": "Temporary bytes"},
            ("lora()", "W0 + s·A·B each step", "full fine-tuning"),
        ),
        **TPU,
    ),
    Benchmark(
        "tpu_many",
        "On a TPU: many adapters",
        f"{COMPILED}: the training step, the lookups in bfloat16 and the step of decoding in bfloat16.",
        "on_tpu.py --many",
        **TPU,
    ),
    Benchmark(
        "tpu_quant",
        "On a TPU: quantized bases",
        f"{COMPILED}: the steps of `quant.py` in bfloat16, and how their temporary bytes grow with the layers.",
        "on_tpu.py --quantized",
        Lines(
            "Temporary bytes of a step on a TPU, unrolled, by layers",
            "Temporary bytes by layers, bfloat16",
            "layers",
            "MB",
            "unrolled: ",
        ),
        **TPU,
    ),
)
