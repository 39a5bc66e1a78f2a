"""The role of each axis of a kernel: `b` batch, `i` input, `o` output.

`"io"` is a Dense kernel, `"ioo"` a query (d, heads, head_dim), `"iio"` an attention output, `"iiio"` a 2-D
convolution (H, W, I, O), `"bio"` a scanned stack of Dense. The factors keep the kernel's axes unflattened and in the
kernel's order: `a` is `(batch…, in…, rank)` and `b` is `(batch…, rank, out…)`. Only this file knows that layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

RANK = -1  # the rank axis, where axes are given by their index in the kernel

Roles = Sequence[str]


def axes_with(roles: Roles, role: str) -> tuple[int, ...]:
    """Returns the kernel axes with the given role, in order."""
    return tuple(axis for axis, axis_role in enumerate(roles) if axis_role == role)


def axes_of_a(roles: Roles) -> tuple[int, ...]:
    """Returns the kernel axis of each axis of `a`: `(batch…, in…, RANK)`.

    >>> axes_of_a("biio")
    (0, 1, 2, -1)
    """
    return (*axes_with(roles, "b"), *axes_with(roles, "i"), RANK)


def axes_of_b(roles: Roles) -> tuple[int, ...]:
    """Returns the kernel axis of each axis of `b`: `(batch…, RANK, out…)`.

    >>> axes_of_b("biio")
    (0, -1, 3)
    """
    return (*axes_with(roles, "b"), RANK, *axes_with(roles, "o"))


def axes_of_given(roles: Roles) -> tuple[int, ...]:
    """Returns the kernel axis of each axis of the weights of experts, before those of tokens: `(batch…, RANK)`."""
    return (*axes_with(roles, "b"), RANK)


def sizes(axes: Sequence[int], shape: Sequence[int], rank: int) -> tuple[int, ...]:
    """Returns the sizes of the given axes of a kernel of shape `shape`, with `rank` for `RANK`."""
    return tuple(rank if axis == RANK else shape[axis] for axis in axes)


def width(roles: Roles, shape: Sequence[int], role: str) -> int:
    """Returns the product of the sizes of the axes with the given role; for `i`, the fan-in.

    >>> width("bio", (12, 768, 3072), "i")
    768
    """
    return math.prod(shape[axis] for axis in axes_with(roles, role))


def join(roles: Roles) -> str:
    """Returns the role of an axis that several axes are merged into. If their roles differ, it is not a valid role.

    >>> join("oo"), join("io"), join("")
    ('o', 'io', '')
    """
    return "".join(sorted(set("".join(roles))))
