"""The interface of the values of a spec: what is chosen for one leaf, checked when it is made."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Self

from .._errors import SpecError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecValue(abc.ABC):
    """What a spec chooses for a leaf: an immutable value without arrays."""

    axes: str | None = None
    needs_axes: ClassVar[bool]  # whether it depends on the roles of the kernel's axes
    noun: ClassVar[str]  # for errors, as are the next four
    example: ClassVar[str]
    verb: ClassVar[str]
    function: ClassVar[str]
    advice: ClassVar[str]

    def __post_init__(self) -> None:
        """Checks the fields and converts them to plain Python; `check` does what needs the shape of the kernel."""
        if not isinstance(self.axes, str | None):
            raise SpecError(f"Expected a string such as 'io' for `axes`; got {self.axes!r}.")

    def _set(self, **values: Any) -> None:
        """Sets fields of the frozen dataclass in `__post_init__`."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        """Shows the fields that differ from their defaults, `axes` last."""
        fields = sorted(dataclasses.fields(self), key=lambda field: field.name == "axes")
        chosen = [field for field in fields if getattr(self, field.name) != field.default]
        return f"{type(self).__name__}({', '.join(f'{field.name}={getattr(self, field.name)!r}' for field in chosen)})"

    @abc.abstractmethod
    def check(self, shape: Sequence[int], axes: str) -> None:
        """Raises `SpecError` if it does not fit a kernel of this shape and axes; the caller adds the path."""

    def fitted(self, shape: Sequence[int], axes: str) -> Self:
        """Returns the value for a kernel of this shape and axes, without `axes`."""
        del shape, axes  # for variants whose rank depends on them
        return self if self.axes is None else dataclasses.replace(self, axes=None)
