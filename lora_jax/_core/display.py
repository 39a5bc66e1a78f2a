"""How adapters and quantized leaves are shown: names of axes, norms, sparklines; as trees by Treescope, and as HTML.

Norms are computed only where that is quick, on the devices that hold the array: a sharded array is not gathered.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .axes import RANK
from .memory import is_in_host_memory
from .table import Table, size
from .values import is_concrete

_NAMES = {"b": "batch", "i": "in", "o": "out"}
_LARGEST = 2**24  # elements of an array whose norms are computed; more take longer than the rest of the display
_BARS = "▁▂▃▄▅▆▇█"


class Described(NamedTuple):
    """The texts that describe an array; empty where there is nothing to say.

    Attributes:
      axes: each axis with its size, such as `"in 768 × rank 8"`.
      norm: the Euclidean norm.
      along: a sparkline of the norms along one axis: the batch axis, such as layers, otherwise that of the ranks.
    """

    axes: str
    norm: str
    along: str

    @property
    def line(self) -> str:
        """All in one line."""
        return " · ".join(filter(None, [self.axes, self.norm and f"norm {self.norm}", self.along]))


def described(variant: Any, axes: str, arrays: Mapping[str, Any]) -> dict[str, Described]:
    """Describes the arrays of an adapter.

    >>> from lora_jax import LoRA
    >>> described(LoRA(rank=2, alpha=4), "io", {"a": np.ones((4, 2), np.float32)})["a"].line
    'in 4 × rank 2 · norm 2.83 · by rank 2 ▁▁ 2'
    """
    layout = variant.layout(axes)
    return {name: _described(array, axes, layout.get(name, range(len(axes)))) for name, array in arrays.items()}


def _described(array: Any, axes: str, layout: Sequence[int]) -> Described:
    shape = getattr(array, "shape", None)
    if not isinstance(shape, tuple):  # such as that of a sharding
        return Described("", "", "")
    names = ["rank" if axis == RANK else _NAMES[axes[axis]] for axis in layout][max(len(layout) - len(shape), 0) :]
    names = [*[""] * (len(shape) - len(names)), *names]  # the axes of a stack come before those of the kernel
    sizes = " × ".join(f"{name} {size}".strip() for name, size in zip(names, shape, strict=True))
    along = next((at for at, name in enumerate(names) if name in ("", "batch", "rank") and layout), None)
    squares = _squares(array, along)
    if squares is None:
        return Described(sizes, "", "")
    if along is None or not squares.size:
        return Described(sizes, f"{np.sqrt(squares.sum()):.3g}", "")
    line = f"by {names[along] or 'first axis'} {sparkline(np.sqrt(squares))}"
    return Described(sizes, f"{np.sqrt(squares.sum()):.3g}", line)


def sparkline(values: np.ndarray[Any, Any], width: int = 24) -> str:
    """Draws numbers as bars between the smallest and the largest, which it writes on both sides.

    A number that is not finite is an ×. More than `width` numbers are drawn as the means of neighbors.

    >>> sparkline(np.array([1, 3, np.nan, 5.5, 8]))
    '1 ▁▃×▅█ 8'
    """
    if len(values) > width:
        values = np.array([part.mean() for part in np.array_split(values, width)])
    finite = np.isfinite(values)
    if not finite.any():
        return "×" * len(values)
    least, most = values[finite].min(), values[finite].max()
    heights = (np.where(finite, values, least) - least) / ((most - least) or 1) * (len(_BARS) - 1)
    bars = "".join(_BARS[round(height)] if shown else "×" for height, shown in zip(heights, finite, strict=True))
    return f"{least:.3g} {bars} {most:.3g}"


def table(variant: Any, axes: str, arrays: Mapping[str, Any]) -> Table:
    """Returns a table of the arrays of an adapter."""
    rows = [
        [name, text.axes or repr(arrays[name]), str(getattr(arrays[name], "dtype", "")), text.norm, text.along]
        for name, text in described(variant, axes, arrays).items()
    ]
    return Table(["array", "shape", "dtype", "norm", ""], rows, {"norm"}, [f"{variant}, axes {axes!r}"])


def cells(adapter: Mapping[str, Any]) -> dict[str, str]:
    """Describes a whole adapter, also one of shapes, in a row of a table of adapters."""
    variants = dict.fromkeys(str(part.variant) for part in adapter.values())
    arrays = [array for array in jax.tree.leaves(dict(adapter)) if hasattr(array, "dtype")]
    return {
        "leaves": str(len(adapter)),
        "variants": ", ".join(variants),
        "memory": size(sum(array.size * array.dtype.itemsize for array in arrays)),
    }


def tree_node(
    owner: Any,
    summary: str,
    children: Mapping[str, Any],
    path: str | None,
    subtree_renderer: Any,
    comments: Mapping[str, str] | None = None,
) -> Any:
    """Returns what a `__treescope_repr__` of `owner` returns: its type, `summary`, and a line for each child.

    The children are attributes of the owner. Some have a comment.
    """
    from treescope import rendering_parts as parts

    lines = []
    for name, child in children.items():
        rendered = subtree_renderer(child, path=None if path is None else f"{path}.{name}")
        comment = (comments or {}).get(name)
        shown = [parts.comment_color(parts.text(f"  # {comment}"))] if comment else []
        lines.append(parts.siblings_with_annotations(f"{name}=", rendered, extra_annotations=shown))
    return parts.build_foldable_tree_node_from_children(
        prefix=parts.siblings(parts.maybe_qualified_type_name(type(owner)), f"({summary}, "),
        children=lines,
        suffix=")",
        comma_separated=True,
        path=path,
    )


def is_readable(array: Any) -> bool:
    """Whether an array has values that this process can read, without another one taking part."""
    if not isinstance(array, Array):
        return isinstance(array, np.ndarray)
    return is_concrete(array) and not array.is_deleted() and array.is_fully_addressable


def _squares(array: Any, along: int | None) -> np.ndarray[Any, Any] | None:
    """Sums the squares over all axes but one; None if that is slow, or if there are no values here."""
    if not is_readable(array) or array.size > _LARGEST or not jnp.issubdtype(array.dtype, jnp.floating):
        return None
    if isinstance(array, Array):
        devices: Any = array.sharding.device_set
        is_in_host = is_in_host_memory(array)
        if is_in_host and len(devices) > 1:  # each device would copy its shard
            return None
        if len(devices) > 1 or not (is_in_host or next(iter(devices)).platform == "cpu"):
            with jax.ensure_compile_time_eval(), jax.debug_nans(False):  # also under `jit`
                sums = _squares_on_device(array, along)
            return np.asarray(jax.device_get(sums), np.float64) if is_concrete(sums) else None
    values = np.asarray(array)
    if values.dtype.kind != "f":  # bfloat16 and narrower
        values = values.astype(np.float32)
    every, kept = list(range(values.ndim)), [] if along is None else [along]
    with np.errstate(all="ignore"):
        return np.asarray(np.einsum(values, every, values, every, kept, dtype=np.float64))


@functools.partial(jax.jit, static_argnums=1)
def _squares_on_device(array: Array, along: int | None) -> Array:
    return jnp.sum(jnp.square(array.astype(jnp.float32)), tuple(axis for axis in range(array.ndim) if axis != along))
