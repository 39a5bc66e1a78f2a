"""The data that `explain` returns: a row for each adapted leaf and their totals, printed as a table."""

from __future__ import annotations

import dataclasses

from .._core.sizes import count_text, is_known
from .._core.table import Table, Tabular, size


@dataclasses.dataclass(frozen=True)
class Row:
    """One adapted leaf.

    Attributes:
      path: of the leaf.
      shape: of the leaf.
      axes: the role of each axis; empty if the variant needs no roles.
      variant: the name of the variant, such as `"LoRA"`, and for `Layers` the layers.
      rank: None for variants without factors.
      scale: s, the factor of the update; None for variants without one.
      used: how the model uses the leaf, such as `"factored dot_general ×2"`, or `"never used"`.
      parameters: the number of trainable parameters.
      flops: FLOPs added to one forward call.
      placed: the shardings of its arrays, such as `"a 64@fsdp×8, b 8×32@model"`; empty without `shardings=`.
      kind: as `Kernel.kind`, such as `"attention"`.
      traced: the roles of the axes in the traced model if they differ from the adapter's, otherwise empty.
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
class Explanation(Tabular):
    """The result of `explain`; prints as a table, also in notebooks.

    Attributes:
      rows: one for each adapted leaf.
      base_parameters: the number of parameters in `params`.
      base_flops: FLOPs of one forward call without the adapter; None if the model has a primitive whose FLOPs do not
        follow from its shapes, such as a Fourier transform.
      adapter_bytes: of all arrays of the adapter.
      optimizer_bytes: of the optimizer state.
      optimizer: which optimizer state that is.
      undivided: a line for each axis that is replicated because the devices do not divide its size.
      refused: which kernels `lora` would refuse, and what would allow them.
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
        """The number of trainable parameters."""
        return sum(row.parameters for row in self.rows)

    @property
    def flops(self) -> int:
        """FLOPs that the adapter adds to one forward call."""
        return sum(row.flops for row in self.rows)

    def _table(self) -> Table:
        head, *rows = [_HEADER, *map(self._cells, self.rows)]
        if not any(row.placed for row in self.rows):  # without shardings
            head, rows = head[:-1], [row[:-1] for row in rows]
        return Table(head, rows, _NUMBERS, self._totals())

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
            share = "the base's are unknown"
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
