"""A row of a mapping: which parameter of a torch module a leaf is, and how its axes are arranged there."""

from __future__ import annotations

import dataclasses
from typing import Literal

from .._errors import SpecError


@dataclasses.dataclass(frozen=True, repr=False)
class Part:
    """A torch module, and what differs between its outputs and those of the leaf.

    >>> Part("model.layers.{i}.self_attn.q_proj", interleaved=64)
    peft.Part('model.layers.{i}.self_attn.q_proj', interleaved=64)

    Attributes:
      module: name of the torch module, with placeholders: `{name}` is a segment of the leaf's path, `{**}` is any
        number of them. A placeholder that the path does not have is the index along the batch axis of a stack.
      interleaved: the size of a head, if the leaf has the pairs of rotary positions interleaved, at outputs 2i and
        2i + 1 of a head; torch has them at i and i + size/2, as Hugging Face's models. None if both are the same.
      factor: the leaf is `factor` times the torch parameter, as if the scale of the queries is part of the kernel.
      size: the number of outputs, if a leaf has several parts of different sizes.
      of: the first output and the number of outputs of the module, if the module fuses this leaf with others, such as
        (768, 2304) for the keys of a `c_attn`.
    """

    module: str
    interleaved: int | None = None
    factor: float = 1.0
    size: int | None = None
    of: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.interleaved is not None and (self.interleaved < 2 or self.interleaved % 2):
            raise SpecError(f"Expected the even size of a head for `interleaved`; got {self.interleaved}.")
        if not self.factor > 0:
            raise SpecError(f"Expected a positive `factor` for {self.module!r}; got {self.factor}.")

    def __repr__(self) -> str:
        return f"peft.Part({self.module!r}{_changed(self, 'module')})"


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Row:
    """How one leaf is stored in torch modules. `linear`, `embedding`, `conv`, `vector` and `experts` make rows.

    Printed, it is the call that makes it, so that a mapping can be copied into a program.

    Attributes:
      kind: `"linear"`, `"embedding"`, `"conv"`, `"vector"`, `"parameter"` or `"swapped parameter"`.
      parts: the torch modules; more than one if the leaf fuses them along its outputs.
      parameter: the name of the torch parameter.
      axes: the roles of the leaf's axes; None for those of `Dense`, `Embed` and `Conv`.
      inputs: the order in which torch has the input axes; None for that of the leaf.
      outputs: the order in which torch has the output axes; None for that of the leaf.
      conv1d: whether the module is a `Conv1D` of `transformers`, whose weight is `(in, out)`.
      head: the torch module of an output head that is tied to an embedding.
      keep_shape: whether the torch parameter of a vector has the leaf's axes, rather than one.
      declared: the parameters of a module, in the order in which it declares them; see `experts`.
      experts_first: whether the axis of experts is the first batch axis and not the last.
      stored: for a parameter without a module, the order of its last axes in torch: `"oi"` or `"io"`; None if unknown.
    """

    kind: str
    parts: tuple[Part, ...]
    parameter: str = "weight"
    axes: str | None = None
    inputs: tuple[int, ...] | None = None
    outputs: tuple[int, ...] | None = None
    conv1d: bool = False
    head: str | None = None
    keep_shape: bool = False
    declared: tuple[str, ...] = ()
    experts_first: bool = False
    stored: Literal["oi", "io"] | None = None

    def __post_init__(self) -> None:
        for name in ("inputs", "outputs"):
            order = getattr(self, name)
            if order is not None and sorted(order) != list(range(len(order))):
                raise SpecError(f"Expected an order of axes such as (1, 0, 2) for `{name}`; got {order}.")

    def __repr__(self) -> str:
        name = "experts" if self.is_parameter else self.kind
        plain = self.parts == (Part(self.parts[0].module),)
        of = repr(self.parts[0].module if plain else self.parts[0] if len(self.parts) == 1 else list(self.parts))
        parameter = self.parameter != {"vector": "bias"}.get(self.kind, "weight") or self.is_parameter
        stated = f", parameter={self.parameter!r}" if parameter else ""
        swapped = ", swapped=True" if self.kind == "swapped parameter" else ""
        return f"peft.{name}({of}{stated}{_changed(self, 'kind', 'parts', 'parameter')}{swapped})"

    @property
    def is_parameter(self) -> bool:
        """Whether the leaf is a parameter without a module of its own."""
        return self.kind.endswith("parameter")


def _changed(value: Part | Row, *besides: str) -> str:
    """Formats the fields that differ from their defaults, as keyword arguments."""
    fields = {field.name: field.default for field in dataclasses.fields(value) if field.name not in besides}
    changed = {name: getattr(value, name) for name, default in fields.items() if getattr(value, name) != default}
    return "".join(f", {name}={own!r}" for name, own in changed.items())
