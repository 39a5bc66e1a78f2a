"""The data that `plan` returns: the cost of a training step on each device, printed as a table."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from .._core.table import Table, Tabular, size
from .collectives import Collective


@dataclasses.dataclass(frozen=True)
class Step:
    """One compiled training step. Bytes are per device.

    Attributes:
      parameters: bytes of the model's parameters.
      adapter: bytes of the adapter; 0 in full fine-tuning, which trains the parameters themselves.
      optimizer: bytes of the optimizer state.
      inputs: bytes of the other arguments of the model.
      temporary: bytes in addition to arguments and results, as reported by the compiler: activations that are stored
        for the backward pass, gradients, and intermediate values.
      host: bytes of the parameters and the optimizer state that are in host memory. They are also in `parameters` and
        `optimizer`, and not in `peak`, which they save on the device. What of them is on the device at a time is in
        `temporary`.
      peak: bytes of arguments, results and temporaries on the device. The results reuse the memory of the adapter and
        the optimizer state, which are donated.
      flops: FLOPs of the step on all devices, as `testing.flops` counts them; None if shapes do not determine them.
      compiled_flops: the compiler's count for one device, which includes the body of a loop once.
      collectives: from `testing.collectives`; None if the compiled program does not determine them.
      devices: the number of devices.
      seconds: the time of tracing, lowering and compiling.
      compiled: the compiled program; None in a step that was pickled.
    """

    parameters: int
    adapter: int
    optimizer: int
    inputs: int
    temporary: int
    host: int
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
        """FLOPs divided by the number of devices; does not include work that several devices repeat."""
        return None if self.flops is None else self.flops / self.devices

    @property
    def wire(self) -> Mapping[str, int] | None:
        """Bytes that one device sends in a step, by kind of collective, as in `testing.wire_bytes`."""
        if self.collectives is None:
            return None
        sent: collections.Counter[str] = collections.Counter()
        for collective in self.collectives:
            sent[collective.kind] += collective.wire
        return sent

    @property
    def largest_gather(self) -> int | None:
        """Bytes of the result of the largest all-gather; in a stack of layers, it should gather one layer at a time."""
        if self.collectives is None:
            return None
        return max((found.result for found in self.collectives if found.kind == "all-gather"), default=0)


@dataclasses.dataclass(frozen=True)
class Plan(Tabular):
    """The result of `plan`; prints as a table, also in notebooks.

    Attributes:
      mesh: the axes of the mesh and their sizes.
      kind: of the devices, such as `"cpu"` or `"TPU v5 lite"`.
      lora: the step that trains the adapter.
      full: the step that trains all parameters; None with `full=False`.
    """

    mesh: Mapping[str, int]
    kind: str
    lora: Step
    full: Step | None

    @property
    def devices(self) -> int:
        """The number of devices."""
        return math.prod(self.mesh.values())

    def _table(self) -> Table:
        steps = [self.lora] if self.full is None else [self.lora, self.full]
        shown = [row for row in _ROWS if row[0] != HOST or any(step.host for step in steps)]
        rows = [[name, *(_shown(value(step), show) for step in steps)] for name, value, show in shown]
        kinds = sorted({kind for step in steps for kind in step.wire or ()})
        rows += [[f"sent: {kind}", *(_shown((step.wire or {}).get(kind, 0), size) for step in steps)] for kind in kinds]
        if self.full is not None:
            pairs = [(value(self.lora), value(self.full)) for _, value, _ in shown]
            pairs += [((self.lora.wire or {}).get(kind, 0), (self.full.wire or {}).get(kind, 0)) for kind in kinds]
            rows = [[*row, _ratio(*pair)] for row, pair in zip(rows, pairs, strict=True)]
        head = ["per device", "LoRA", "full fine-tuning", "ratio"][: len(rows[0])]
        return Table(head, rows, head[1:], self._notes())

    def _notes(self) -> list[str]:
        axes = " × ".join(f"{name} {count}" for name, count in self.mesh.items())
        fits = f"memory:  LoRA fits in {math.ceil(self.lora.peak / 1e9)} GB per device"
        if self.full is not None:
            fits += f", full fine-tuning in {math.ceil(self.full.peak / 1e9)} GB"
        return [f"devices: {self.devices} ({axes}; {self.kind})", fits]


Value = Callable[[Step], float | None]

HOST = "on the host"  # the name of a row that is shown only if there is something

_ROWS: list[tuple[str, Value, Callable[[Any], str]]] = [
    ("parameters", lambda step: step.parameters, size),
    ("adapter", lambda step: step.adapter, size),
    ("optimizer", lambda step: step.optimizer, size),
    ("inputs", lambda step: step.inputs, size),
    ("temporary", lambda step: step.temporary, size),
    ("peak", lambda step: step.peak, size),
    (HOST, lambda step: step.host, size),
    ("FLOPs", lambda step: step.flops_per_device, lambda count: f"{count:.3g}"),
    ("sent", lambda step: None if step.wire is None else sum(step.wire.values()), size),
]


def _shown(value: float | None, show: Callable[[Any], str]) -> str:
    return "not known" if value is None else show(value)


def _ratio(lora: float | None, full: float | None) -> str:
    return f"{lora / full:.3f}" if lora is not None and full else "-"
