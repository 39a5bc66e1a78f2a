"""Reads from a compiled program what its devices send each other, the bodies of loops times their turns.

What the partitioner makes of a program is known once it is compiled and not before: the source of this count is the
text of the compiled module (HLO), as `compiled.as_text()` gives it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "reduce-scatter")
_UNKNOWN = ("ragged-all-to-all", "recv", "send")  # what they send, their shapes do not tell


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a compiled program, as one device sees it.

    Attributes:
      kind: such as `"all-gather"`.
      bytes: what the device puts in.
      group: how many devices take part together.
      times: how often it runs in one call of the program.
    """

    kind: str
    bytes: int
    group: int
    times: int

    @property
    def result(self) -> int:
        """The bytes that a device has of it afterwards."""
        if self.kind == "all-gather":
            return self.bytes * self.group
        return self.bytes // self.group if self.kind == "reduce-scatter" else self.bytes

    @property
    def wire(self) -> int:
        """The bytes that a device sends, all turns together, where each sends to the next in a ring."""
        others = self.group - 1
        match self.kind:
            case "all-gather":  # each shard passes every device but one
                sent = others * self.bytes
            case "all-reduce":  # a reduce-scatter, and an all-gather of what it leaves
                sent = math.ceil(2 * others * self.bytes / self.group)
            case "all-to-all" | "reduce-scatter":
                sent = math.ceil(others * self.bytes / self.group)
            case _:
                sent = self.bytes if others else 0
        return self.times * sent


def collectives(text: str) -> list[Collective]:
    """Lists the collectives that one call of a compiled program runs.

    Of a conditional the branch counts that sends the most. An asynchronous pair counts once.

    Args:
      text: of the compiled module.

    Raises:
      NotImplementedError: for a loop with collectives whose turns the compiler does not know, and for a collective
        whose bytes its shapes do not tell.
    """
    program, entry = _computations(text)
    header = text.partition("\n")[0]
    devices = math.prod(map(int, re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)))
    return list(_run(program, entry, devices))


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes


_Computation = Mapping[str, _Instruction]

# In a shape, only a tuple's comments are between spaces; so what comes first between a space and a bracket is the name
# of the operation.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")


def _computations(text: str) -> tuple[dict[str, _Computation], str]:
    """The computations of a module by name, and the name of the one that is called first."""
    program: dict[str, _Computation] = {}
    body: dict[str, _Instruction] = {}
    entry = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            program[head[2]] = body = {}
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            body[found[1]] = _Instruction(*found.groups())
    return program, entry


def _run(program: Mapping[str, _Computation], name: str, devices: int, times: int = 1) -> Iterator[Collective]:
    for instruction in program[name].values():
        kind = instruction.opcode.removesuffix("-start")
        if kind in _UNKNOWN and "is_host_transfer=true" not in instruction.rest:
            raise NotImplementedError(
                f"Expected collectives whose bytes can be told from their shapes; got `{kind}`.\n"
                "  Count the function without it."
            )
        if kind in KINDS:
            given = sum(_bytes(program[name][operand].shape) for operand in _operands(instruction))
            yield Collective(kind, given, _group(instruction.rest, devices), times)
        elif instruction.opcode == "while":
            inside = [each for part in _called(instruction) for each in _run(program, part, devices)]
            if inside:
                turns = times * _turns(instruction)
                yield from (dataclasses.replace(each, times=each.times * turns) for each in inside)
        elif instruction.opcode == "conditional":
            branches = [list(_run(program, part, devices, times)) for part in _called(instruction)]
            yield from max(branches, key=lambda branch: sum(each.wire for each in branch))
        elif instruction.opcode not in ("async-update", "async-done"):  # those name again what their start has called
            for part in _called(instruction):
                yield from _run(program, part, devices, times)


def _operands(instruction: _Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.rest.partition(")")[0])


def _called(instruction: _Instruction) -> list[str]:
    """The computations that an instruction names: what it calls, the parts of a loop, the branches of a conditional."""
    named = r"(?:calls|to_apply|body|condition|\w+_computations?)=(%[\w.\-]+|\{[^}]*\})"
    return [name for found in re.findall(named, instruction.rest) for name in re.findall(r"%([\w.\-]+)", found)]


def _turns(loop: _Instruction) -> int:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
    if known is None:
        raise NotImplementedError(
            f"Expected loops whose turns the compiler knows; got `{loop.name}`, with collectives inside.\n"
            "  Count one turn of it by itself."
        )
    return int(known[1])


def _group(rest: str, devices: int) -> int:
    """How many devices take part together: the compiler lists the groups, counts them off, or names axes of a mesh.

    >>> [_group(f"replica_groups={groups}, ...", 8) for groups in ("{{0,1},{2,3}}", "[2,4]<=[8]", "{}")]
    [2, 4, 8]
    >>> [_group(f"replica_groups=mesh['x'=2,'y'=4] {axes}, ...", 8) for axes in ("{'y'}", "{'x','y'}", "{'y':(1)2}")]
    [4, 8, 2]
    """
    if pairs := re.search(r"source_target_pairs=\{([^=]*)\}", rest):
        return 2 if any(source != target for source, target in re.findall(r"\{(\d+),(\d+)\}", pairs[1])) else 1
    if named := re.search(r"replica_groups=mesh\[(.*?)\].*? \{(.*?)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])  # of an axis a part, by its size
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=", rest):
        return int(counted[1].split(",")[-1])
    if listed := re.search(r"replica_groups=\{(?:\{([\d,]+)\}|\})", rest):
        return len(listed[1].split(",")) if listed[1] else devices
    raise NotImplementedError(f"Expected groups of devices, listed, counted off or by axes of a mesh; got\n  {rest}")


def _bytes(shape: str) -> int:
    """The size of an array, or of those of a tuple.

    >>> _bytes("f32[8,4]{1,0}"), _bytes("(bf16[3]{0}, pred[], token[])"), _bytes("s4[5]{0:E(4)}")
    (128, 7, 3)
    """
    return sum(
        math.ceil(math.prod(map(int, re.findall(r"\d+", sizes))) * _bits(dtype) / 8)
        for dtype, sizes in re.findall(r"\b([a-z]\w*)\[([^\]]*)\]", shape)
    )


def _bits(dtype: str) -> int:
    """The width of a number, which its name tells: that of `f8e4m3fn` is 8."""
    if dtype in ("token", "opaque"):
        return 0
    return 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
