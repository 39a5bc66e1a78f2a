"""What a training step takes, of each device, and the table of it: the data that `plan` returns."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from .collectives import Collective
from .table import as_html, as_text, size


@dataclasses.dataclass(frozen=True)
class Step:
    """One compiled training step. Bytes are those of one device.

    Attributes:
      parameters: bytes of the model's parameters.
      adapter: bytes of the adapter; none in full fine-tuning, which trains the parameters themselves.
      optimizer: bytes of the optimizer's state.
      inputs: bytes of the other arguments of the model.
      temporary: bytes beside arguments and results, by the compiler's account: activations that are kept for the
        backward pass, gradients, and what is in use between two operations.
      peak: bytes of arguments, results and temporaries together. The results lie where adapter and optimizer state
        lay, which are donated.
      operations: floating-point operations of the whole step on all devices, counted on the jaxpr, the bodies of loops
        times their length; None if shapes do not tell.
      compiled_operations: the compiler's own count for one device, which takes the body of a loop once.
      collectives: what one device sends, as `testing.collectives` lists it; None if the compiled program does not tell.
      devices: how many there are.
      seconds: that tracing, lowering and compiling took.
      compiled: the program itself, which nobody has run; None in a step that was pickled.
    """

    parameters: int
    adapter: int
    optimizer: int
    inputs: int
    temporary: int
    peak: int
    flops: int | None
    compiled_flops: int
    collectives: tuple[Collective, ...] | None = dataclasses.field(repr=False)
    devices: int
    seconds: float = dataclasses.field(compare=False)
    compiled: Any = dataclasses.field(repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"compiled": None}  # a program belongs to its process

    def __copy__(self) -> Step:
        return self

    def __deepcopy__(self, memo: Any) -> Step:
        return self

    @property
    def flops_per_device(self) -> float | None:
        """The operations, shared out evenly: what devices do twice is not in it."""
        return None if self.flops is None else self.flops / self.devices

    @property
    def wire(self) -> Mapping[str, int] | None:
        """Bytes that one device sends in a step, by kind of collective; as `testing.wire_bytes` counts them."""
        if self.collectives is None:
            return None
        sent: collections.Counter[str] = collections.Counter()
        for each in self.collectives:
            sent[each.kind] += each.wire
        return sent

    @property
    def largest_gather(self) -> int | None:
        """Bytes that a device has after the largest single all-gather: of a stack of layers, to be that of one."""
        if self.collectives is None:
            return None
        return max((each.result for each in self.collectives if each.kind == "all-gather"), default=0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found; prints as a table, and shows as one in a notebook.

    Attributes:
      mesh: the axes of the mesh and their sizes.
      kind: of the devices, such as `"cpu"` or `"TPU v5 lite"`.
      lora: the step that trains the adapter.
      full: the step that trains all parameters; None if it was not asked for.
    """

    mesh: Mapping[str, int]
    kind: str
    lora: Step
    full: Step | None

    @property
    def devices(self) -> int:
        """How many there are."""
        return math.prod(self.mesh.values())

    def __str__(self) -> str:
        head, rows = self._columns()
        return "\n".join([as_text(head, rows, numbers=head[1:]), "", *self._notes()])

    def _repr_html_(self) -> str:
        return as_html(*self._columns(), self._notes())

    def _columns(self) -> tuple[list[str], list[list[str]]]:
        """The head of the table, and its rows."""
        steps = [self.lora] if self.full is None else [self.lora, self.full]
        rows = [[name, *(_shown(value(step), show) for step in steps)] for name, value, show in _ROWS]
        kinds = sorted({kind for step in steps for kind in step.wire or ()})
        rows += [[f"sent: {kind}", *(_shown((step.wire or {}).get(kind, 0), size) for step in steps)] for kind in kinds]
        if self.full is not None:
            pairs = [(value(self.lora), value(self.full)) for _, value, _ in _ROWS]
            pairs += [((self.lora.wire or {}).get(kind, 0), (self.full.wire or {}).get(kind, 0)) for kind in kinds]
            rows = [[*row, _ratio(*pair)] for row, pair in zip(rows, pairs, strict=True)]
        return ["per device", "LoRA", "full fine-tuning", "ratio"][: len(rows[0])], rows

    def _notes(self) -> list[str]:
        axes = " × ".join(f"{name} {count}" for name, count in self.mesh.items())
        fits = f"memory:  LoRA fits in {math.ceil(self.lora.peak / 1e9)} GB per device"
        if self.full is not None:
            fits += f", full fine-tuning in {math.ceil(self.full.peak / 1e9)} GB"
        return [f"devices: {self.devices} ({axes}; {self.kind})", fits]


Value = Callable[[Step], float | None]

_ROWS: list[tuple[str, Value, Callable[[Any], str]]] = [
    ("parameters", lambda step: step.parameters, size),
    ("adapter", lambda step: step.adapter, size),
    ("optimizer", lambda step: step.optimizer, size),
    ("inputs", lambda step: step.inputs, size),
    ("temporary", lambda step: step.temporary, size),
    ("peak", lambda step: step.peak, size),
    ("FLOPs", lambda step: step.flops_per_device, lambda count: f"{count:.3g}"),
    ("sent", lambda step: None if step.wire is None else sum(step.wire.values()), size),
]


def _shown(value: float | None, show: Callable[[Any], str]) -> str:
    return "not known" if value is None else show(value)


def _ratio(ours: float | None, reference: float | None) -> str:
    return f"{ours / reference:.3f}" if ours is not None and reference else "-"
