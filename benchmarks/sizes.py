"""Model sizes for the benchmarks. Does not import JAX, so that every environment can import it."""

from __future__ import annotations

import dataclasses

ALPHA = 16.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """The sizes of a model and its batch."""

    layers: int
    width: int
    heads: int
    hidden: int
    vocabulary: int
    batch: int
    length: int
    rank: int


TINY = Size(layers=2, width=24, heads=3, hidden=40, vocabulary=64, batch=2, length=16, rank=4)
SMALL = Size(layers=2, width=256, heads=4, hidden=1024, vocabulary=2048, batch=4, length=128, rank=8)
BASE = Size(layers=12, width=768, heads=12, hidden=3072, vocabulary=8192, batch=1, length=128, rank=8)
