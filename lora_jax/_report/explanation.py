"""What `explain` returns: a row for each adapted leaf, and their sums; prints as a table."""

from __future__ import annotations

import dataclasses

from .._core.sizes import count_text, is_known
from .table import as_html, as_text, size


@dataclasses.dataclass(frozen=True)
class Row:
    """One adapted leaf.

    Attributes:
      path: of the leaf.
      shape: of the leaf.
      axes: the role of each of its axes; empty where they play no part.
      variant: such as `LoRA`.
      rank: None where there is none.
      scale: what `A·B` is multiplied with; None where there is none.
      used: how the model consumes it, such as `"factored dot_general ×2"`, or `"never used"`.
      parameters: how many numbers are trained for it.
      operations: floating-point operations that it adds to one forward call.
      placed: how its arrays are cut, such as `"a 64@fsdp×8, b 8×32@model"`; empty without shardings.
      kind: such as `"attention"`, as `Kernel.kind`; None for none of those.
      traced: the roles that the traced model gives the axes, where they are not those of the adapter; else empty.
    """

    path: str
    shape: tuple[int, ...]
    axes: str
    variant: str
    rank: int | None
    scale: float | None
    used: str
    parameters: int
    flops: int
    placed: str = ""
    kind: str | None = None
    traced: str = ""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as a table, and shows as one in a notebook.

    Attributes:
      rows: one for each adapted leaf.
      base_parameters: how many numbers `params` holds.
      base_operations: floating-point operations of one forward call without the adapter; None if the model has some
        that shapes do not tell, such as a Fourier transform.
      adapter_bytes: of all the adapter's arrays.
      optimizer_bytes: of the optimizer's state for them.
      optimizer: whose state that is.
      undivided: what is on every device although its base is cut there, in words.
      refused: which kernels `lora` would refuse, and what would allow them, in words.
    """

    rows: tuple[Row, ...]
    base_parameters: int
    base_flops: int | None
    adapter_bytes: int
    optimizer_bytes: int
    optimizer: str
    undivided: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(row.parameters for row in self.rows)

    @property
    def flops(self) -> int:
        """Floating-point operations that the adapter adds to one forward call."""
        return sum(row.flops for row in self.rows)

    def __str__(self) -> str:
        head, *rows = self._table()
        return "\n".join([as_text(head, rows, numbers=_NUMBERS), "", *self._totals()])

    def _repr_html_(self) -> str:
        head, *rows = self._table()
        return as_html(head, rows, self._totals())

    def _table(self) -> list[list[str]]:
        """The cells by row, the header first; without shardings there is no last column."""
        cells = [_HEADER, *map(self._cells, self.rows)]
        return cells if any(row.placed for row in self.rows) else [row[:-1] for row in cells]

    def _cells(self, row: Row) -> list[str]:
        return [
            row.path,
            "×".join(map(str, row.shape)),
            f"{row.axes}, traced {row.traced}" if row.traced else row.axes or "-",
            row.kind or "-",
            row.variant,
            "-" if row.rank is None else str(row.rank),
            "-" if row.scale is None else f"{row.scale:g}",
            row.used,
            f"{row.parameters:,}",
            f"{row.parameters / self.base_parameters:.3%}",
            count_text(row.flops),
            row.placed,
        ]

    def _totals(self) -> list[str]:
        if self.base_flops is None:
            share = "the base's cannot be told from shapes"
        elif not is_known(self.base_flops) or not is_known(self.flops):
            share = f"the base's are {count_text(self.base_flops)}"
        else:
            share = f"{self.flops / max(self.base_flops, 1):.2%} of the base's {self.base_flops:,}"
        return [
            f"trainable: {self.parameters:,} parameters, {self.parameters / self.base_parameters:.3%} of the base's "
            f"{self.base_parameters:,}",
            f"memory:    adapter {size(self.adapter_bytes)}, optimizer {size(self.optimizer_bytes)} ({self.optimizer})",
            f"forward:   {count_text(self.flops)} FLOPs added, {share}",
            *(f"placed:    {line}" for line in self.undivided),
            *(f"refused:   {line}" for line in self.refused),
        ]


_HEADER = [*"path shape axes kind variant rank scale used trainable".split(), "of base", "FLOPs", "placed"]
_NUMBERS = {"rank", "scale", "trainable", "of base", "FLOPs"}
