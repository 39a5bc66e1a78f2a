"""The role of each axis of a kernel: `b` batch, `i` input, `o` output.

`"io"` is a Dense kernel, `"ioo"` a query (d, heads, head_dim), `"iio"` an attention output, `"iiio"` a 2-D
convolution (H, W, I, O), `"bio"` a scanned stack of Dense. The factors keep the kernel's axes unflattened and in the
kernel's order: `a` is `(batch…, in…, rank)` and `b` is `(batch…, rank, out…)`. Only this file knows that layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

RANK = -1  # stands for the rank axis among the numbers of a kernel's axes

Roles = Sequence[str]


def axes_with(roles: Roles, role: str) -> tuple[int, ...]:
    """The kernel axes that have a role, in order."""
    return tuple(axis for axis, its in enumerate(roles) if its == role)


def axes_of_a(roles: Roles) -> tuple[int, ...]:
    """Which kernel axis each axis of `a` is: `(batch…, in…, RANK)`.

    >>> axes_of_a("biio")
    (0, 1, 2, -1)
    """
    return (*axes_with(roles, "b"), *axes_with(roles, "i"), RANK)


def axes_of_b(roles: Roles) -> tuple[int, ...]:
    """Which kernel axis each axis of `b` is: `(batch…, RANK, out…)`.

    >>> axes_of_b("biio")
    (0, -1, 3)
    """
    return (*axes_with(roles, "b"), RANK, *axes_with(roles, "o"))


def sizes(axes: Sequence[int], shape: Sequence[int], rank: int) -> tuple[int, ...]:
    """The sizes of numbered axes of a kernel of `shape`, `rank` for the rank axis."""
    return tuple(rank if axis == RANK else shape[axis] for axis in axes)


def width(roles: Roles, shape: Sequence[int], role: str) -> int:
    """How many elements the axes of one role span: for `i` that is the fan-in, batch axes left out.

    >>> width("bio", (12, 768, 3072), "i")
    768
    """
    return math.prod(shape[axis] for axis in axes_with(roles, role))


def join(roles: Roles) -> str:
    """The role of axes merged into one: theirs, if they agree; else the roles put together, which is no role.

    >>> join("oo"), join("io"), join("")
    ('o', 'io', '')
    """
    return "".join(sorted(set("".join(roles))))
