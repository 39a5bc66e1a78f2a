"""One item of an Orbax checkpoint: arrays in Orbax's format, a readable description, and checksums of all files."""

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
    """The base class of the handlers of an adapter and a state.

    Attributes:
      description: the name of the file that describes the arrays.
    """

    description: ClassVar[str]

    def __init__(self) -> None:
        self._arrays = ocp.StandardCheckpointHandler()

    @abc.abstractmethod
    def parts(self, args: Any) -> tuple[dict[str, Any], str]:
        """Returns the arrays to write, and the text that describes them."""

    async def async_save(self, directory: epath.Path, args: Any) -> Sequence[Future]:
        """Copies the arrays to the host, and writes them in the background."""
        arrays, text = self.parts(args)

        async def write() -> None:
            self._describe(directory, text)

        writes = await self._arrays.async_save(directory, args=ocp.args.StandardSave(arrays))
        return [*(writes or ()), CommitFutureAwaitingContractedSignals(write(), name=f"lora_jax {self.description}")]

    def save(self, directory: epath.Path, args: Any) -> None:
        """Writes the arrays and the description, and waits for them."""
        arrays, text = self.parts(args)
        self._describe(directory, text)
        self._arrays.save(directory, args=ocp.args.StandardSave(arrays))

    def finalize(self, directory: epath.Path) -> None:
        """Writes the checksums. Orbax calls this in the first process only, after all processes have written."""
        self._arrays.finalize(directory)
        _checksums.write(directory)

    def close(self) -> None:
        """Closes the handler of the arrays."""
        self._arrays.close()

    def verified(self, directory: epath.Path) -> bytes:
        """Verifies the checksums and returns the description.

        Raises:
          CheckpointError: if there is no item, or one of its files has changed.
        """
        if not any((directory / name).exists() for name in (self.description, _checksums.NAME)):
            raise no_checkpoint(directory)
        _checksums.verify(directory)
        return bytes((directory / self.description).read_bytes())

    def read(self, directory: epath.Path, target: Any) -> Any:
        """Reads the arrays to `target`, a tree of `restore_target`s."""
        try:
            restored = self._arrays.restore(directory, args=ocp.args.StandardRestore(target))
            return jax.tree.map(_check_array, target, restored)
        except Exception as error:  # Orbax and TensorStore raise many types for missing or damaged files
            raise CheckpointError(
                f"Expected a complete checkpoint; its arrays cannot be read, in {directory}.\n"
                f"  {type(error).__name__}: {textwrap.shorten(str(error), 300)}\n"
                "  Copy the complete directory again, or restore another checkpoint."
            ) from error

    def _describe(self, directory: epath.Path, text: str) -> None:
        if jax.process_index() == 0:
            (directory / self.description).write_text(text)


def _check_array(target: Any, array: Any) -> Any:
    if (array.shape, array.dtype) != (target.shape, target.dtype):
        raise ValueError(f"got {array.dtype}{list(array.shape)}; the manifest has {target.dtype}{list(target.shape)}")
    return array


def no_checkpoint(where: epath.Path) -> CheckpointError:
    """Returns the error for a path without a checkpoint."""
    if not where.is_dir():
        found = "does not exist"
    elif any("orbax-checkpoint-tmp" in entry.name for entry in where.iterdir()):
        found = "contains only an incomplete one, whose save was interrupted"
    else:
        found = "contains none"
    return CheckpointError(
        f"Expected a checkpoint that lora_jax wrote, at {where}; the directory {found}.\n"
        "  Pass the path that `save` wrote to, or the directory of a CheckpointManager with an item named `adapter`."
    )
