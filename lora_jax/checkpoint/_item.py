"""One item of an Orbax checkpoint: arrays as Orbax keeps any tree, a readable description, and checksums of it all."""

from __future__ import annotations

import abc
import textwrap
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals, Future

from .._errors import CheckpointError
from . import _checksums


class ItemHandler(ocp.AsyncCheckpointHandler, abc.ABC):  # type: ignore[misc]
    """Writes and reads one item; what is in it, its children say.

    Attributes:
      description: the name of the file that describes the arrays.
    """

    description: ClassVar[str]

    def __init__(self) -> None:
        self._arrays = ocp.StandardCheckpointHandler()

    @abc.abstractmethod
    def parts(self, args: Any) -> tuple[dict[str, Any], str]:
        """The arrays to write, and the text that describes them."""

    async def async_save(self, directory: epath.Path, args: Any) -> Sequence[Future]:
        """Copies the arrays to the host, and goes on writing in the background."""
        arrays, text = self.parts(args)

        async def write() -> None:
            self._describe(directory, text)

        writes = await self._arrays.async_save(directory, args=ocp.args.StandardSave(arrays))
        return [*(writes or ()), CommitFutureAwaitingContractedSignals(write(), name=f"lora_jax {self.description}")]

    def save(self, directory: epath.Path, args: Any) -> None:
        """Writes all at once."""
        arrays, text = self.parts(args)
        self._describe(directory, text)
        self._arrays.save(directory, args=ocp.args.StandardSave(arrays))

    def finalize(self, directory: epath.Path) -> None:
        """Called by Orbax, in the first process alone, when all processes have written."""
        self._arrays.finalize(directory)
        _checksums.write(directory)

    def close(self) -> None:
        """Called by Orbax at the end."""
        self._arrays.close()

    def verified(self, directory: epath.Path) -> bytes:
        """The description of an item of which every byte is as it was written.

        Raises:
          CheckpointError: if there is none, or one of its files has changed.
        """
        if not any((directory / name).exists() for name in (self.description, _checksums.NAME)):
            raise nothing_there(directory)
        _checksums.verify(directory)
        return bytes((directory / self.description).read_bytes())

    def read(self, directory: epath.Path, target: Any) -> Any:
        """Reads the arrays as `target`, which `place` has made, says."""
        try:
            restored = self._arrays.restore(directory, args=ocp.args.StandardRestore(target))
            return jax.tree.map(_as_promised, target, restored)
        except Exception as error:  # Orbax and TensorStore raise a dozen kinds for what is missing or damaged
            raise CheckpointError(
                f"Expected a whole checkpoint; its arrays cannot be read, in {directory}.\n"
                f"  {type(error).__name__}: {textwrap.shorten(str(error), 300)}\n"
                "  Copy the directory again, whole, or restore another checkpoint."
            ) from error

    def _describe(self, directory: epath.Path, text: str) -> None:
        if jax.process_index() == 0:
            (directory / self.description).write_text(text)


def _as_promised(target: Any, array: Any) -> Any:
    if (array.shape, array.dtype) != (target.shape, target.dtype):
        raise ValueError(f"{array.dtype}{list(array.shape)} where the manifest says {target.dtype}{list(target.shape)}")
    return array


def nothing_there(where: epath.Path) -> CheckpointError:
    """The error for a place without a checkpoint."""
    if not where.is_dir():
        what = "there is none"
    elif any("orbax-checkpoint-tmp" in entry.name for entry in where.iterdir()):
        what = "there is only one whose save was stopped before its end"
    else:
        what = "there is a directory without one"
    return CheckpointError(
        f"Expected a checkpoint that lora_jax wrote; {what}, at {where}.\n"
        "  Give the path that `save` was given, or the directory of a CheckpointManager with an item named `adapter`."
    )
