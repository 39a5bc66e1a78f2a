"""Reads the arrays of Qwix (https://github.com/google/qwix), without importing it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._errors import CheckpointError, listed
from ._scaled import ScaledLeaf

# Logical types that are not dtypes. Except for NF4, the stored codes are numbers.
_NAMED = {"nf4", "int2", "int3", "int5", "int6", "int7", "mxfp8", "mxfp4", "nvfp4"}
_MISSING = object()


def from_qwix(params: Any) -> Any:
    """Replaces the `QArray`s of a tree with leaves that any model and `lora` can use.

    The arrays are those of the `QArray`s, not copies. Each leaf dequantizes to what `qwix.dequantize` returns, bit for
    bit and in the dtype of the scales. The model is the one without Qwix's provider: activations are not quantized.

    A `QArray` is recognized by its attributes. In the state of an NNX model it is a mapping of `qvalue`, `scale` and
    `zero_point` that does not say its logical type; there, uint4 without zero points is NF4.

    >>> import dataclasses, jax.numpy as jnp, lora_jax as lj
    >>> @dataclasses.dataclass
    ... class QArray:  # qwix.QArray
    ...     qvalue: object
    ...     scale: object
    ...     zero_point: object = None
    ...     qtype: object = "int4"
    >>> codes = jnp.arange(8, dtype=jnp.int4).reshape(4, 2)
    >>> params = lj.quant.from_qwix({"kernel": QArray(codes, scale=jnp.full((2, 2), 0.5))})
    >>> params["kernel"].shape, params["kernel"].dequantize()[3].tolist()
    ((4, 2), [3.0, 3.5])

    Args:
      params: a tree with `QArray`s, also boxed or as shapes: from `qwix.quantize_params`, from `init` of a model with
        Qwix's `PtqProvider`, or the `nnx.state` of one.

    Returns:
      A tree like `params`, with a `ScaledLeaf` of the same shape in place of each `QArray` and its container. A box
      around the codes is around the leaf.

    Raises:
      CheckpointError: if there is no `QArray`, or if one has an unknown logical type, or arrays that do not fit each
        other; one error lists all.
    """
    nodes, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_quantized)
    leaves: list[Any] = []
    problems, found = [], 0
    for keys, node in nodes:
        if not _is_quantized(node):
            leaves.append(node)
            continue
        found += 1
        try:
            leaves.append(_leaf(_fields(node)))
        except CheckpointError as error:
            problems.append(f"{jax.tree_util.keystr(keys, simple=True, separator='/')!r}: {error}")
    if not found:
        raise CheckpointError(
            f"Expected a tree with arrays of Qwix; none of its {len(nodes)} leaves has `qvalue` and `scale`.\n"
            "  Pass what `qwix.quantize_params` returned, or the parameters of a model with Qwix's `PtqProvider`.\n"
            "  To quantize arrays, use lora_jax.quant.quantize."
        )
    if problems:
        raise CheckpointError(
            f"Expected arrays as Qwix stores them; {len(problems)} of {found} are not.\n{listed(problems)}"
        )
    return jax.tree.unflatten(treedef, leaves)


def _is_quantized(node: Any) -> bool:
    node = _contained(node)
    if isinstance(node, Mapping):
        return {"qvalue", "scale"} <= set(node) <= {"qvalue", "scale", "zero_point"}
    return all(_has(node, name) for name in ("qvalue", "scale", "zero_point", "qtype"))


def _contained(node: Any) -> Any:
    """Returns the array in Qwix's `WithAux`, or in the mapping that it is in the state of an NNX model."""
    if isinstance(node, Mapping):
        return node["array"] if set(node) == {"array"} else node
    return node.array if _has(node, "array") and _has(node, "how") else node


def _has(node: Any, name: str) -> bool:
    """Whether an object has an attribute of its own: an NNX Variable also passes on those of its value."""
    return inspect.getattr_static(node, name, _MISSING) is not _MISSING


def _fields(node: Any) -> Mapping[str, Any]:
    node = _contained(node)
    if not isinstance(node, Mapping):
        return {name: getattr(node, name) for name in ("qvalue", "scale", "zero_point", "qtype")}
    return {"zero_point": None, **node, "qtype": None}


def _leaf(fields: Mapping[str, Any]) -> Any:
    """Returns the leaf, in the box of the codes."""
    codes, scales = _unboxed("qvalue", fields["qvalue"]), _unboxed("scale", fields["scale"])
    zero_point = None if fields["zero_point"] is None else _unboxed("zero_point", fields["zero_point"])
    qtype = fields["qtype"]
    if qtype is None:
        qtype = "nf4" if codes.dtype == jnp.uint4 and zero_point is None else codes.dtype
    if not _is_known(qtype):
        known = ", ".join(sorted(_NAMED))
        raise CheckpointError(f"qtype {qtype!r} is unknown; known are {known}, and dtypes of at most 8 bits")
    is_codebook = isinstance(qtype, str) and qtype == "nf4"
    if not _is_small(codes.dtype) or (is_codebook and not jnp.issubdtype(codes.dtype, jnp.integer)):
        raise CheckpointError(f"qvalue of dtype {codes.dtype} does not fit qtype {qtype!r}")
    if not jnp.issubdtype(scales.dtype, jnp.floating):
        raise CheckpointError(f"scale has dtype {scales.dtype}, and is not floating-point")
    for name, tiles in (("scale", scales), ("zero_point", zero_point)):
        if tiles is not None and not _divides(tiles.shape, codes.shape):
            raise CheckpointError(f"{name} of shape {tuple(tiles.shape)} does not divide {tuple(codes.shape)}")
    # Qwix computes with bfloat16 where a dtype has 8 bits.
    dtype = jnp.dtype(jnp.bfloat16 if _is_small(scales.dtype) else scales.dtype)
    leaf = ScaledLeaf(codes, scales, zero_point, dtype, is_codebook)
    return jax.tree.unflatten(jax.tree.structure(fields["qvalue"]), [leaf])


def _unboxed(name: str, box: Any) -> Any:
    arrays = jax.tree.leaves(box)
    if len(arrays) != 1 or not all(hasattr(arrays[0], attribute) for attribute in ("shape", "dtype")):
        raise CheckpointError(f"{name} is not an array, but {type(box).__name__}")
    return arrays[0]


def _is_known(qtype: Any) -> bool:
    if isinstance(qtype, str) and qtype in _NAMED:
        return True
    try:
        return _is_small(jnp.dtype(qtype))
    except TypeError:
        return False


def _is_small(dtype: Any) -> bool:
    numeric = jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)
    return numeric and jnp.dtype(dtype).itemsize == 1


def _divides(tiles: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(tiles) == len(shape) and all(
        size == count or (count > 0 and size % count == 0) for size, count in zip(shape, tiles, strict=True)
    )
