"""Lists the collectives of a compiled program, with the bytes that they send.

The partitioner inserts collectives during compilation, so they are read from the text of the compiled module (HLO),
`compiled.as_text()`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "reduce-scatter")
_UNKNOWN = ("ragged-all-to-all", "recv", "send")  # their bytes do not follow from their shapes


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a compiled program, as one device sees it.

    Attributes:
      kind: such as `"all-gather"`.
      bytes: of the device's operands.
      group: the number of devices in a group.
      times: how often it runs in one call of the program.
    """

    kind: str
    bytes: int
    group: int
    times: int

    @property
    def result(self) -> int:
        """Bytes of the result on one device."""
        if self.kind == "all-gather":
            return self.bytes * self.group
        return self.bytes // self.group if self.kind == "reduce-scatter" else self.bytes

    @property
    def wire(self) -> int:
        """Bytes that one device sends in a ring algorithm, over all iterations."""
        others = self.group - 1
        match self.kind:
            case "all-gather":  # every device forwards all shards but one
                sent = others * self.bytes
            case "all-reduce":  # a reduce-scatter and an all-gather of its result
                sent = math.ceil(2 * others * self.bytes / self.group)
            case "all-to-all" | "reduce-scatter":
                sent = math.ceil(others * self.bytes / self.group)
            case _:
                sent = self.bytes if others else 0
        return self.times * sent


def collectives(text: str) -> list[Collective]:
    """Lists the collectives that one call of a compiled program runs.

    The body of a loop counts once per iteration; of a conditional, the branch that sends the most counts. An
    asynchronous pair counts once.

    Args:
      text: the text of the compiled module.

    Raises:
      NotImplementedError: for a loop with collectives whose trip count the compiler does not know, and for a collective
        whose bytes do not follow from its shapes.
    """
    program, entry = _computations(text)
    header = text.partition("\n")[0]
    devices = math.prod(map(int, re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)))
    return list(_walk(program, entry, devices))


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes


_Computation = Mapping[str, _Instruction]

# In a shape, only comments of tuples follow a space, so the first word between a space and a parenthesis is the opcode.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")


def _computations(text: str) -> tuple[dict[str, _Computation], str]:
    """Returns the computations of a module by name, and the name of the entry computation."""
    program: dict[str, _Computation] = {}
    body: dict[str, _Instruction] = {}
    entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            program[head[2]] = body = {}
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            body[found[1]] = _Instruction(*found.groups())
    return program, entry


def _walk(program: Mapping[str, _Computation], name: str, devices: int, times: int = 1) -> Iterator[Collective]:
    for instruction in program[name].values():
        kind = instruction.opcode.removesuffix("-start")
        if kind in _UNKNOWN and "is_host_transfer=true" not in instruction.rest:
            raise NotImplementedError(
                f"Expected collectives whose bytes follow from their shapes; got `{kind}`.\n"
                "  Count the function without it."
            )
        if kind in KINDS:
            operand_bytes = sum(_bytes(program[name][operand].shape) for operand in _operands(instruction))
            yield Collective(kind, operand_bytes, _group_size(instruction.rest, devices), times)
        elif instruction.opcode == "while":
            inner = [found for called in _called(instruction) for found in _walk(program, called, devices)]
            if inner:
                trips = times * _trip_count(instruction)
                yield from (dataclasses.replace(found, times=found.times * trips) for found in inner)
        elif instruction.opcode == "conditional":
            branches = [list(_walk(program, called, devices, times)) for called in _called(instruction)]
            yield from max(branches, key=lambda branch: sum(found.wire for found in branch))
        elif instruction.opcode not in ("async-update", "async-done"):  # `async-start` names the same computation
            for called in _called(instruction):
                yield from _walk(program, called, devices, times)


def _operands(instruction: _Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.rest.partition(")")[0])


def _called(instruction: _Instruction) -> list[str]:
    """Returns the names of the computations that an instruction calls, including loop bodies and branches."""
    attribute = r"(?:calls|to_apply|body|condition|\w+_computations?)=(%[\w.\-]+|\{[^}]*\})"
    return [name for found in re.findall(attribute, instruction.rest) for name in re.findall(r"%([\w.\-]+)", found)]


def _trip_count(loop: _Instruction) -> int:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
    if known is None:
        raise NotImplementedError(
            f"Expected loops whose trip count the compiler knows; got `{loop.name}`, with collectives inside.\n"
            "  Count one iteration of it separately."
        )
    return int(known[1])


def _group_size(rest: str, devices: int) -> int:
    """Returns the size of the device groups, which HLO writes as lists, an iota or mesh axes.

    >>> [_group_size(f"replica_groups={groups}, ...", 8) for groups in ("{{0,1},{2,3}}", "[2,4]<=[8]", "{}")]
    [2, 4, 8]
    >>> axes = "{'y'}", "{'x','y'}", "{'y':(1)2}"
    >>> [_group_size(f"replica_groups=mesh['x'=2,'y'=4] {names}, ...", 8) for names in axes]
    [4, 8, 2]
    """
    if pairs := re.search(r"source_target_pairs=\{([^=]*)\}", rest):
        return 2 if any(source != target for source, target in re.findall(r"\{(\d+),(\d+)\}", pairs[1])) else 1
    if named := re.search(r"replica_groups=mesh\[(.*?)\].*? \{(.*?)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])  # `'y':(1)2` is a part of size 2 of the axis
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=", rest):
        return int(iota[1].split(",")[-1])
    if listed := re.search(r"replica_groups=\{(?:\{([\d,]+)\}|\})", rest):
        return len(listed[1].split(",")) if listed[1] else devices
    raise NotImplementedError(f"Expected groups of devices as lists, an iota or axes of a mesh; got\n  {rest}")


def _bytes(shape: str) -> int:
    """Returns the bytes of an array, or of all arrays of a tuple.

    >>> _bytes("f32[8,4]{1,0}"), _bytes("(bf16[3]{0}, pred[], token[])"), _bytes("s4[5]{0:E(4)}")
    (128, 7, 3)
    """
    return sum(
        math.ceil(math.prod(map(int, re.findall(r"\d+", sizes))) * _bits(dtype) / 8)
        for dtype, sizes in re.findall(r"\b([a-z]\w*)\[([^\]]*)\]", shape)
    )


def _bits(dtype: str) -> int:
    """Returns the bits per element, read from the name: 8 for `f8e4m3fn`."""
    if dtype in ("token", "opaque"):
        return 0
    return 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
