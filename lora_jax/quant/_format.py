"""The interface of formats: how a kernel is stored in few bits."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

from jax import Array

from .._core.spec_value import SpecValue
from .._core.stored import StoredLeaf


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Format(SpecValue):
    """A format for one kernel: an immutable value without arrays.

    Attributes:
      axes: the role of each axis of the kernel (`i` input, `o` output, `b` batch). Takes precedence over the roles in
        the traced model. In a table that is looked up, such as an embedding (vocabulary, d), the rows are outputs:
        `"oi"`.
    """

    needs_axes: ClassVar[bool] = True
    noun: ClassVar[str] = "format"
    example: ClassVar[str] = "NF4()"
    verb: ClassVar[str] = "quantize"
    function: ClassVar[str] = "quantize"
    advice: ClassVar[str] = (
        "Give these leaves another block, such as NF4(block=16), or Int8(), which has no blocks; or None."
    )

    @abc.abstractmethod
    def quantize(self, w: Array, axes: str) -> StoredLeaf:
        """Quantizes a kernel without batch axes."""
