"""What quantized leaves have in common."""

from __future__ import annotations

import abc
from typing import Any, Self

import jax
from jax.sharding import NamedSharding, PartitionSpec

from .._core.stored import StoredLeaf
from ._format import Format


class QuantizedLeaf(StoredLeaf):
    """A kernel stored in few bits, as arrays whose axes are those of the kernel, in its order.

    Attributes:
      codes: the array of codes.
    """

    codes: Any

    @abc.abstractmethod
    def layout(self) -> Self:
        """Returns the leaf with, for each array, the kernel's axis of each of its axes; None for an axis of no one."""

    @property
    @abc.abstractmethod
    def format(self) -> Format | None:
        """The format that made the leaf, with `axes`; None if no format of `lora_jax.quant` does.

        Axes whose role is not known, because it does not matter, are outputs.
        """

    @property
    def storage(self) -> str:
        """The format, for errors and checkpoints."""
        return super().storage if self.format is None else repr(self.format)

    @property
    def nbytes(self) -> int:
        """The bytes of the stored arrays."""
        return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(self))

    @property
    def sharding(self) -> Any:
        """The sharding of the kernel: that of the codes."""
        sharding = self.codes.sharding
        if not isinstance(sharding, NamedSharding):
            return sharding
        names = dict(zip(self.layout().codes, sharding.spec, strict=False))
        return sharding.update(spec=PartitionSpec(*(names.get(axis) for axis in range(self.ndim))))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({jax.numpy.dtype(self.dtype).name}{list(self.shape)})"
