"""Reads kernels that bitsandbytes (https://github.com/bitsandbytes-foundation/bitsandbytes) has stored in NF4."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._core.axes import width
from .._core.numbers import integers
from .._core.paths import nearest
from .._errors import CheckpointError, SpecError, listed
from ._double import BLOCK, MAP, DoubleScales
from ._nf4 import CODEBOOK, NF4, NF4Leaf

_STATE = "quant_state.bitsandbytes__"
_DAMAGED = "  The checkpoint may be damaged."
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def from_bitsandbytes(
    tensors: Mapping[str, Any],
    name: str,
    *,
    shape: Sequence[int] | None = None,
    axes: str = "io",
    dtype: Any = None,
) -> NF4Leaf:
    """Reads one kernel of a transformers checkpoint that bitsandbytes has quantized to NF4.

    The packed bytes are reshaped and transposed, and nothing is dequantized: blocks run along the inputs of PyTorch's
    (out, in). The leaf dequantizes to the transpose of what `bitsandbytes.functional.dequantize_4bit` returns.

    For a model with scanned layers, stack the leaves: `jax.tree.map(lambda *arrays: jnp.stack(arrays), *leaves)`.

    >>> import json, jax.numpy as jnp, lora_jax as lj, numpy as np
    >>> values = lj.quant.ScaledLeaf(jnp.arange(16), jnp.ones(1), None, jnp.float32, codebook=True).dequantize()
    >>> state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [3, 128]}
    >>> tensors = {
    ...     "mlp.weight": np.full((192, 1), 0xF7, np.uint8),  # pairs of the values 1 and 0
    ...     "mlp.weight.absmax": np.full(6, 0.5, np.float32),
    ...     "mlp.weight.quant_map": values,
    ...     "mlp.weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    ... }
    >>> kernel = lj.quant.from_bitsandbytes(tensors, "mlp")
    >>> kernel.shape, kernel.dequantize()[:4, 0].tolist()
    ((128, 3), [0.5, 0.0, 0.5, 0.0])

    Args:
      tensors: the tensors of the checkpoint by name: NumPy or JAX arrays, or PyTorch tensors on the CPU.
      name: the layer, such as `model.layers.0.self_attn.q_proj`: the tensors are `name.weight`, `name.weight.absmax`
        and so on.
      shape: the shape of the kernel; by default that of a matrix. Inputs and outputs can each be several axes, such as
        `(in, heads, head_dim)` for `axes="ioo"`.
      axes: the role of each axis of the kernel, `i` input or `o` output.
      dtype: the dtype of the represented kernel; by default that of the kernel which was quantized. The layers of
        bitsandbytes dequantize to their `compute_dtype`, `bnb_4bit_compute_dtype` in transformers.

    Returns:
      The kernel as a leaf of a parameter tree, in the layout of `quantize`.

    Raises:
      CheckpointError: if a tensor is missing, or has another dtype or size than the others require; if the quantization
        state is not valid; or if the format is not NF4 as stored by `NF4`: FP4, another table of values, scales
        quantized in blocks other than 256, or blocks that do not divide the inputs.
      SpecError: if `shape`, `axes` or `dtype` do not fit the kernel.
    """
    stored = _read(tensors, f"{name}.weight")
    shape = _shape(stored, name, shape, axes)
    try:
        start, end = NF4(block=stored.block).block_axes(shape, axes)
    except SpecError as error:
        raise SpecError(
            f"Cannot arrange {name!r} as {shape} with axes {axes!r}: {error}.\n"
            "  Blocks run along neighboring input axes, as they do in PyTorch's (out, in)."
        ) from None
    sizes = (*shape[:start], math.prod(shape[start:end]), *shape[end:])
    roles = axes[:start] + "i" + axes[end:]
    order = tuple(sorted(range(len(sizes)), key=lambda axis: (roles[axis] == "i", axis)))  # PyTorch's: outputs first

    def arranged(flat: np.ndarray, per: int) -> Any:
        by_order = flat.reshape([sizes[axis] // (per if axis == start else 1) for axis in order])
        return jnp.asarray(by_order.transpose(np.argsort(order)))

    scales = arranged(stored.scales, stored.block)
    if stored.largest is not None:
        scales = DoubleScales(scales, jnp.asarray(stored.largest), jnp.float32(stored.offset), order)
    return NF4Leaf(
        codes=arranged(stored.codes, 2),
        scales=scales,
        axis=start - len(sizes),
        inputs=shape[start:end] if end > start + 1 else (),
        dtype=stored.dtype if dtype is None else _floating(dtype),
    )


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A kernel (out, in) as stored, in vectors.

    Attributes:
      codes: two in a byte.
      scales: float32, or codes of 8 bits if they are quantized.
      largest: the largest magnitude in each block of scales, or None.
      offset: the mean of the scales.
    """

    outputs: int
    inputs: int
    block: int
    dtype: Any
    codes: np.ndarray
    scales: np.ndarray
    largest: np.ndarray | None
    offset: float


def _read(tensors: Mapping[str, Any], weight: str) -> _Stored:
    """Reads the tensors of a kernel, and checks that they belong together."""
    state = _state(tensors, weight)
    block, shape = state["blocksize"], state["shape"]
    if not (_is_size(block) and block % 2 == 0):
        raise _invalid(weight, f"an even `blocksize`; got {reprlib.repr(block)}")
    if not (isinstance(shape, list) and len(shape) == 2 and all(map(_is_size, shape))):
        raise _invalid(weight, f"a `shape` of two sizes, outputs and inputs; got {reprlib.repr(shape)}")
    if not isinstance(state["dtype"], str) or state["dtype"] not in _DTYPES:
        raise _invalid(weight, f"a `dtype` out of {', '.join(_DTYPES)}; got {reprlib.repr(state['dtype'])}")
    outputs, inputs = shape
    if inputs % block:
        raise CheckpointError(
            f"Expected blocks that divide the inputs of {weight!r}; there are {inputs} inputs, in blocks of {block}.\n"
            "  Such blocks contain weights of several outputs. Dequantize the kernel in PyTorch, and quantize it again "
            "here."
        )
    blocks = outputs * inputs // block
    _check_values(tensors, f"{weight}.quant_map", CODEBOOK)
    is_nested = "nested_blocksize" in state
    largest, offset = None, 0.0
    if is_nested:
        if state["nested_blocksize"] != BLOCK:
            found = reprlib.repr(state["nested_blocksize"])
            raise _invalid(weight, f"scales in blocks of {BLOCK}; got `nested_blocksize` {found}")
        if not _is_float32(state["nested_offset"]):
            raise _invalid(weight, f"a finite `nested_offset`; got {reprlib.repr(state['nested_offset'])}")
        offset = float(state["nested_offset"])
        _check_values(tensors, f"{weight}.nested_quant_map", MAP)
        largest = _vector(tensors, f"{weight}.nested_absmax", np.float32, -(-blocks // BLOCK))
    return _Stored(
        outputs,
        inputs,
        block,
        jnp.dtype(_DTYPES[state["dtype"]]),
        _vector(tensors, weight, np.uint8, outputs * inputs // 2),
        _vector(tensors, f"{weight}.absmax", np.uint8 if is_nested else np.float32, blocks),
        largest,
        offset,
    )


def _state(tensors: Mapping[str, Any], weight: str) -> dict[str, Any]:
    """Returns the quantization state: JSON, as a tensor of bytes. All tensors and fields that it requires exist."""
    present = [key for key in tensors if key == weight or key.startswith(f"{weight}.")]
    if f"{weight}.{_STATE}fp4" in tensors:
        raise CheckpointError(
            f"Expected {weight!r} in NF4; it is in FP4, which is not supported.\n"
            '  Quantize the model again, with bnb_4bit_quant_type="nf4".'
        )
    needed = [weight, *(f"{weight}.{part}" for part in ("absmax", "quant_map", f"{_STATE}nf4"))]
    _check_present(tensors, needed, present, weight)
    key = needed[-1]
    data = _vector(tensors, key, np.uint8, None).tobytes()
    try:
        state = json.loads(data.decode())
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or an integer of too many digits
        raise CheckpointError(f"Expected JSON in {key!r}; {error}.\n{_DAMAGED}") from None
    if not isinstance(state, dict) or state.get("quant_type") != "nf4":
        raise _invalid(weight, f"an object with `quant_type` 'nf4'; got {reprlib.repr(state)}")
    fields = ["blocksize", "shape", "dtype"]
    if any(key.startswith("nested_") for key in state) or f"{weight}.nested_absmax" in tensors:
        fields += ["nested_blocksize", "nested_offset"]
        _check_present(tensors, [f"{weight}.nested_absmax", f"{weight}.nested_quant_map"], present, weight)
    if missing := [field for field in fields if field not in state]:
        raise _invalid(weight, f"the fields {', '.join(map(repr, missing))}; got {reprlib.repr(list(state))}")
    return state


def _invalid(weight: str, expected: str) -> CheckpointError:
    return CheckpointError(f"Expected in the quantization state of {weight!r} {expected}.\n{_DAMAGED}")


def _check_present(tensors: Mapping[str, Any], needed: list[str], present: list[str], weight: str) -> None:
    missing = [key for key in needed if key not in tensors]
    if not missing:
        return
    there = present or nearest(weight, [str(key) for key in tensors])
    raise CheckpointError(
        f"Expected the tensors of a kernel that bitsandbytes has quantized to 4 bits; missing are:\n{listed(missing)}\n"
        f"  {'There are:' if present else 'The nearest names:'}\n{listed(there)}\n"
        "  `name` is the layer, without `.weight`. A layer that is not quantized has only a weight."
    )


def _vector(tensors: Mapping[str, Any], key: str, dtype: Any, size: int | None) -> np.ndarray:
    """Returns a tensor, flattened. Its dtype and size must be those given, and its floats finite."""
    try:
        array = np.asarray(tensors[key])
    except (TypeError, ValueError, RuntimeError) as error:  # PyTorch's bfloat16, or a tensor on another device
        raise CheckpointError(f"Expected {key!r} to be convertible to NumPy: {error}") from None
    if array.dtype != dtype or (size is not None and array.size != size):
        expected = f"{np.dtype(dtype).name} tensor" + ("" if size is None else f" of {size} elements")
        advice = _DAMAGED
        if key.endswith(".weight") and array.dtype != dtype:
            advice = "  Packed weights of another dtype (`bnb_4bit_quant_storage`) must be viewed as uint8."
        raise CheckpointError(
            f"Expected {key!r} to be a {expected}; got {array.dtype} of shape {array.shape}.\n{advice}"
        )
    if array.dtype == np.float32 and not np.all(np.isfinite(array)):
        raise CheckpointError(f"Expected finite scales in {key!r}.\n{_DAMAGED}")
    return array.reshape(-1)


def _check_values(tensors: Mapping[str, Any], key: str, values: np.ndarray) -> None:
    """Checks a table of values. PyTorch may round it differently on other processors."""
    found = _vector(tensors, key, np.float32, values.size)
    if not np.allclose(found, values, rtol=1e-6, atol=0):
        raise CheckpointError(
            f"Expected in {key!r} the {values.size} values of bitsandbytes; "
            f"they differ by up to {np.max(np.abs(found - values)):.2g}.\n{_DAMAGED}"
        )


def _shape(stored: _Stored, name: str, shape: Sequence[int] | None, axes: str) -> tuple[int, ...]:
    """Returns the shape of the kernel."""
    if not isinstance(axes, str) or set(axes) != {"i", "o"}:
        raise SpecError(f"Expected `axes` of `i` and `o`, both of them, such as 'io' or 'ioo'; got {axes!r}.")
    found = {"i": stored.inputs, "o": stored.outputs}
    if shape is None and len(axes) == 2:
        return tuple(found[role] for role in axes)
    sizes = () if shape is None else integers("shape", shape)
    if len(sizes) != len(axes) or any(width(axes, sizes, role) != found[role] for role in "io"):
        raise SpecError(
            f"Expected a `shape` for axes {axes!r} with {stored.inputs} inputs and {stored.outputs} outputs, as "
            f"{name!r} has; got {shape}."
        )
    return sizes


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**48


def _is_float32(value: Any) -> bool:
    """Whether a value of JSON is a number that is finite in float32."""
    largest = float(np.finfo(np.float32).max)
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= largest


def _floating(dtype: Any) -> Any:
    try:
        if jnp.issubdtype(dtype, jnp.floating):
            return jnp.dtype(dtype)
    except TypeError:
        pass
    raise SpecError(f"Expected a floating-point `dtype`; got {dtype!r}.")
