"""The manifest of a checkpoint: all that an adapter says about itself besides its numbers, as readable JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from .._core.adapter import Adapter, Adapters, check_adapter
from .._core.paths import flatten, nearest
from .._core.variant import LowRank, Variant
from .._errors import CheckpointError, listed
from .._variants import AdaLoRA, ALoRA, DoRA, Full, LoRA, LoRABias, Rows, RSLoRA, VeRA
from .._version import __version__
from ._arrays import check_values, check_width, described, place
from ._fingerprint import content_differences, fingerprint, saved_weights, structural_differences, weights_of

Manifest = Mapping[str, Any]

FORMAT = "lora_jax.adapter"
VERSION = 1  # of this format and of a state's; a reader of version n reads all versions up to n

_VARIANTS: dict[str, type[Variant]] = {
    variant.__name__: variant for variant in (AdaLoRA, ALoRA, DoRA, Full, LoRA, LoRABias, Rows, RSLoRA, VeRA)
}


def check_savable(adapter: Adapters, base: Any) -> None:
    """Raises `CheckpointError` if it is no adapter of `base`, or holds what cannot be saved; looks at no values."""
    check_adapter(adapter, "Save it on its own, and other trees with StateSave.", CheckpointError)
    if not adapter:
        raise CheckpointError("Expected an adapter to save, with at least one leaf; got an empty one.")
    for path, part in adapter.items():
        _check_part(path, part)
    leaves = list(flatten(base)[0])
    strangers = [path for path in adapter if path not in leaves]
    if strangers:
        near = [f"{path!r}; the nearest are {', '.join(map(repr, nearest(path, leaves)))}" for path in strangers]
        raise CheckpointError(
            f"Expected `base` to be the tree that the adapter was made from; {len(strangers)} of the adapter's "
            f"{len(adapter)} paths are not in `base`.\n{listed(near)}\n"
            "  Give the same tree as to `init` (`variables` is not `variables['params']`)."
        )


def describe(adapter: Adapters, base: Any) -> dict[str, Any]:
    """Makes the manifest of an adapter and of the base that it belongs to."""
    return header(FORMAT) | {
        "adapter": {path: _describe_part(part) for path, part in adapter.items()},
        "base": fingerprint(base, adapter),
    }


def header(form: str) -> dict[str, Any]:
    """What every manifest begins with: its format, and what wrote it."""
    return {"format": form, "version": VERSION, "lora_jax": __version__}


def dumps(manifest: Manifest) -> str:
    """The manifest as JSON: one line for each array."""
    return _indented(manifest, "") + "\n"


def loads(text: bytes, where: object, form: str = FORMAT) -> dict[str, Any]:
    """Reads a manifest of the format `form`.

    Raises:
      CheckpointError: if it is none, is damaged, or is of a version that is not known yet.
    """
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise _damaged(where, f"its manifest is no JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != form:
        raise CheckpointError(
            f"Expected a manifest of the format {form!r}; got another, in {where}.\n"
            "  Give the path that `lora_jax.save` was given."
        )
    version = manifest.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise CheckpointError(
            f"Expected a checkpoint of format version {VERSION} or older; got version {version}, written by lora_jax "
            f"{manifest.get('lora_jax')}, in {where}.\n  Upgrade lora_jax (this is {__version__})."
        )
    return manifest


def skeleton(manifest: Manifest, where: object) -> dict[str, Adapter]:
    """The adapter with a `ShapeDtypeStruct` in place of each array.

    Raises:
      CheckpointError: for a variant that is not known, or meant something else when it was saved.
    """
    with _reading(where):
        return {path: _rebuild(path, part, where) for path, part in manifest["adapter"].items()}


def placed(adapter: dict[str, Adapter], shardings: Any, where: object) -> Any:
    """What each array shall be read as: a shape with the sharding it was given, or, given none, a NumPy array.

    Raises:
      CheckpointError: if the shardings are no prefix of the adapter, or one does not divide its array.
    """
    try:
        leaves = jax.tree.broadcast(shardings, adapter, is_leaf=lambda x: x is None or isinstance(x, Sharding))
        return jax.tree.map(place, adapter, leaves)
    except ValueError as error:
        raise CheckpointError(
            f"Expected `shardings` to be a Sharding, or a tree of them that is a prefix of the adapter in {where} and "
            f"divides its arrays.\n  {error}\n  Leave `shardings` out to restore onto the default device."
        ) from error


def check_base(manifest: Manifest, base: Any, *, allow_base_mismatch: bool, where: object) -> None:
    """Raises `CheckpointError` with the first differences if `base` is not the one that the adapter was saved with."""
    with _reading(where):
        adapted = manifest["adapter"]
        saved, given = saved_weights(manifest["base"], adapted), weights_of(base, adapted)
        structure = structural_differences(saved, given)
        found = structure or ([] if allow_base_mismatch else content_differences(saved, given))
    if not found:
        return
    advice = (
        "Give the tree that the adapter was made from (`variables` is not `variables['params']`). "
        "`allow_base_mismatch` allows other values and dtypes, never other paths or shapes."
        if structure
        else "Load the weights that it was trained on. If others are meant: allow_base_mismatch=True."
    )
    raise CheckpointError(
        f"Expected `base` to be the one that the adapter in {where} was saved with; got another, of {len(given)} "
        f"leaves (it was {len(saved)}), differences: {len(found)}.\n{listed(found)}\n  {advice}"
    )


def _check_part(path: str, part: Adapter) -> None:
    if _VARIANTS.get(type(part.variant).__name__) is not type(part.variant):
        raise CheckpointError(
            f"Expected a variant that can be restored by name, one of {', '.join(_VARIANTS)}; got {part.variant!r} "
            f"at {path!r}.\n  Save adapters of your own variants with Orbax's StandardSave: they are pytrees."
        )
    for name, array in part.arrays.items():
        check_values(array, f"{name!r} at {path!r}")


def _describe_part(part: Adapter) -> dict[str, Any]:
    fields = {field.name: getattr(part.variant, field.name) for field in dataclasses.fields(part.variant) if field.init}
    if not fields.get("clip_rank", True):  # only a spec leaves it open, and so version 1 of the format does not have it
        del fields["clip_rank"]
    arrays = {name: described(array) for name, array in part.arrays.items()}
    scale = {"scale": part.variant.scale} if isinstance(part.variant, LowRank) else {}
    return {"variant": {"name": type(part.variant).__name__, **fields}, **scale, "axes": part.axes, "arrays": arrays}


def _rebuild(path: str, part: Mapping[str, Any], where: object) -> Adapter:
    fields = dict(part["variant"])
    name = fields.pop("name")
    if name not in _VARIANTS:
        raise CheckpointError(
            f"Expected a variant among {', '.join(_VARIANTS)}; got {name!r} at {path!r}, in {where}.\n"
            f"  Upgrade lora_jax (this is {__version__})."
        )
    variant = _VARIANTS[name](**fields)
    if isinstance(variant, LowRank) and not math.isclose(variant.scale, part["scale"], rel_tol=1e-6):
        raise CheckpointError(
            f"Expected {variant} to have the scale {part['scale']} that it was saved with; got {variant.scale} "
            f"at {path!r}, in {where}.\n  One of rank, alpha and scale was edited in the manifest: make them agree."
        )
    return Adapter(variant, part["axes"], **{name: _struct(path, its, where) for name, its in part["arrays"].items()})


def _struct(path: str, array: Mapping[str, Any], where: object) -> jax.ShapeDtypeStruct:
    dtype = jnp.dtype(array["dtype"])
    check_width(dtype, repr(path), where)
    return jax.ShapeDtypeStruct(array["shape"], dtype)


@contextlib.contextmanager
def _reading(where: object) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(where, f"its manifest does not say what it should ({error!r})") from error


def _damaged(where: object, what: str) -> CheckpointError:
    return CheckpointError(
        f"Expected a whole checkpoint; {what}, in {where}.\n"
        "  A file was lost or changed after the save: copy the directory again, whole, or restore another checkpoint."
    )


def _indented(value: Any, indent: str) -> str:
    """JSON with a line for each innermost dict."""
    if not isinstance(value, Mapping) or not any(isinstance(item, Mapping) for item in value.values()):
        return json.dumps(value)
    inner = indent + "  "
    lines = (f"{inner}{json.dumps(key)}: {_indented(item, inner)}" for key, item in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
