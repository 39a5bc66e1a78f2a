"""The manifest of a checkpoint: variants, axes and shapes of an adapter, and the fingerprint of its base, as JSON."""

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

from .. import _variants
from .._core.adapter import Adapter, Adapters, check_adapter
from .._core.paths import flatten, nearest
from .._core.routing import Router
from .._core.variant import LowRank, Variant
from .._errors import CheckpointError, counted, listed
from .._variants import without_layers
from .._variants.mixture import Mixture
from .._variants.routers import ROUTERS
from .._version import __version__
from ._arrays import check_dtype, check_values, describe_array, restore_target
from ._fingerprint import content_differences, fingerprint, saved_weights, structural_differences, weights_of

Manifest = Mapping[str, Any]

FORMAT = "lora_jax.adapter"
VERSION = 1  # of the formats of adapter and state; all versions up to this one can be read

_VARIANTS: dict[str, type[Variant]] = {
    name: variant for name, variant in sorted(vars(_variants).items()) if isinstance(variant, type)
} | {"Mixture": Mixture}

# Fields of variants by their former names, which stored manifests still have.
_RENAMED = {"rank_stabilised": "rank_stabilized"}


def check_savable(adapter: Adapters, base: Any) -> None:
    """Raises `CheckpointError` if `adapter` does not belong to `base` or cannot be saved; reads no values."""
    check_adapter(adapter, "Save other trees separately, with StateSave.", CheckpointError)
    if not adapter:
        raise CheckpointError("Expected an adapter to save, with at least one leaf; got an empty one.")
    for path, part in adapter.items():
        _check_part(path, part)
    leaves = list(flatten(base)[0])
    missing = [path for path in adapter if path not in leaves]
    if missing:
        lines = [f"{path!r}; the closest paths are {', '.join(map(repr, nearest(path, leaves)))}" for path in missing]
        raise CheckpointError(
            f"Expected `base` to be the tree that the adapter was initialized for; {len(missing)} of the adapter's "
            f"{len(adapter)} paths are not in `base`.\n{listed(lines)}\n"
            "  Pass the same tree as to `init` (`variables` is not `variables['params']`)."
        )


def describe(adapter: Adapters, base: Any) -> dict[str, Any]:
    """Returns the manifest of an adapter and its base."""
    return header(FORMAT) | {
        "adapter": {path: _describe_part(part) for path, part in adapter.items()},
        "base": fingerprint(base, adapter),
    }


def header(format_name: str) -> dict[str, Any]:
    """Returns the first entries of every manifest: the format and the versions that wrote it."""
    return {"format": format_name, "version": VERSION, "lora_jax": __version__}


def dumps(manifest: Manifest) -> str:
    """Returns the manifest as JSON, with one line per array."""
    return _indented(manifest, "") + "\n"


def loads(text: bytes, where: object, format_name: str = FORMAT) -> dict[str, Any]:
    """Parses a manifest.

    Raises:
      CheckpointError: if it is not valid JSON, has another format, or has a newer version.
    """
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise _damaged(where, f"its manifest is not valid JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != format_name:
        raise CheckpointError(
            f"Expected a manifest of format {format_name!r}; got another format, in {where}.\n"
            "  Pass the path that `lora_jax.save` wrote to."
        )
    version = manifest.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise CheckpointError(
            f"Expected a checkpoint of format version {VERSION} or older; got version {version}, written by lora_jax "
            f"{manifest.get('lora_jax')}, in {where}.\n  Upgrade lora_jax (this is {__version__})."
        )
    return manifest


def abstract(manifest: Manifest, where: object) -> dict[str, Adapter]:
    """Returns the adapter with a `ShapeDtypeStruct` in place of each array.

    Raises:
      CheckpointError: if a variant is unknown, or its scale is not the one that was saved.
    """
    with _reading(where):
        return {path: _rebuild(path, part, where) for path, part in manifest["adapter"].items()}


def restore_targets(adapter: dict[str, Adapter], shardings: Any, where: object) -> Any:
    """Returns `restore_target` of each array.

    Raises:
      CheckpointError: if `shardings` is not a prefix of the adapter, or one does not divide its array.
    """
    try:
        leaves = jax.tree.broadcast(shardings, adapter, is_leaf=lambda x: x is None or isinstance(x, Sharding))
        return jax.tree.map(restore_target, adapter, leaves)
    except ValueError as error:
        raise CheckpointError(
            f"Expected `shardings` to be a Sharding, or a tree of them that is a prefix of the adapter in {where} and "
            f"divides its arrays.\n  {error}\n  Leave `shardings` out to restore onto the default device."
        ) from error


def check_base(manifest: Manifest, base: Any, *, allow_base_mismatch: bool, where: object) -> None:
    """Raises `CheckpointError` with the first differences if `base` is not the base that the adapter was saved with."""
    with _reading(where):
        adapted = manifest["adapter"]
        saved, given = saved_weights(manifest["base"], adapted), weights_of(base, adapted)
        structure = structural_differences(saved, given)
        found = structure or ([] if allow_base_mismatch else content_differences(saved, given))
    if not found:
        return
    advice = (
        "Pass the tree that the adapter was initialized for (`variables` is not `variables['params']`). "
        "`allow_base_mismatch` allows other values and dtypes, not other paths or shapes."
        if structure
        else "Load the base that the adapter was trained on, or pass allow_base_mismatch=True to use this one."
    )
    raise CheckpointError(
        f"Expected `base` to be the base that the adapter in {where} was saved with; got another one, with "
        f"{len(given)} leaves (saved: {len(saved)}) and {counted(len(found), 'difference')}.\n"
        f"{listed(found)}\n  {advice}"
    )


def _check_part(path: str, part: Adapter) -> None:
    if not all(_VARIANTS.get(type(x).__name__) is type(x) for x in (part.variant, without_layers(part.variant))):
        raise CheckpointError(
            f"Expected one of the variants {', '.join(_VARIANTS)}, which are restored by name; got {part.variant!r} "
            f"at {path!r}.\n  Save an adapter of a stack as `many.unstack` returns it, and adapters of other "
            "variants with Orbax's StandardSave: they are pytrees."
        )
    for name, array in part.arrays.items():
        check_values(array, f"{name!r} at {path!r}")


def _describe_part(part: Adapter) -> dict[str, Any]:
    fields = {
        name: _named(value) if isinstance(value, Router | Variant) else value for name, value in _fields(part.variant)
    }
    if not fields.get("clip_rank", True):  # only set in specs; version 1 of the format has no such field
        del fields["clip_rank"]
    arrays = {name: describe_array(array) for name, array in part.arrays.items()}
    scale = {"scale": part.variant.scale} if isinstance(part.variant, LowRank) else {}
    return {"variant": {"name": type(part.variant).__name__, **fields}, **scale, "axes": part.axes, "arrays": arrays}


def _fields(value: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value) if field.init]


def _named(value: Router | Variant) -> dict[str, Any]:
    return {"name": type(value).__name__, **dict(_fields(value))}


def _rebuild(path: str, part: Mapping[str, Any], where: object) -> Adapter:
    fields = {_RENAMED.get(field, field): value for field, value in part["variant"].items()}
    name = fields.pop("name")
    if name not in _VARIANTS:
        raise CheckpointError(
            f"Expected one of the variants {', '.join(_VARIANTS)}; got {name!r} at {path!r}, in {where}.\n"
            f"  Upgrade lora_jax (this is {__version__})."
        )
    for field, classes in (("router", ROUTERS), ("variant", _VARIANTS)):
        if field in fields:
            inner = dict(fields[field])
            fields[field] = classes[inner.pop("name")](**inner)
    variant = _VARIANTS[name](**fields)
    if isinstance(variant, LowRank) and not math.isclose(variant.scale, part["scale"], rel_tol=1e-6):
        raise CheckpointError(
            f"Expected {variant} to have the saved scale {part['scale']}; got {variant.scale} at {path!r}, in "
            f"{where}.\n  Rank, alpha or scale was edited in the manifest: make them consistent."
        )
    arrays = {name: _abstract_array(path, array, where) for name, array in part["arrays"].items()}
    return Adapter(variant, part["axes"], **arrays)


def _abstract_array(path: str, array: Mapping[str, Any], where: object) -> jax.ShapeDtypeStruct:
    dtype = jnp.dtype(array["dtype"])
    check_dtype(dtype, repr(path), where)
    return jax.ShapeDtypeStruct(array["shape"], dtype)


@contextlib.contextmanager
def _reading(where: object) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(where, f"its manifest has unexpected contents ({error!r})") from error


def _damaged(where: object, reason: str) -> CheckpointError:
    return CheckpointError(
        f"Expected a complete checkpoint; {reason}, in {where}.\n"
        "  A file changed after the save: copy the complete directory again, or restore another checkpoint."
    )


def _indented(value: Any, indent: str) -> str:
    """Returns JSON with one line for each innermost dict."""
    if not isinstance(value, Mapping) or not any(isinstance(item, Mapping) for item in value.values()):
        return json.dumps(value)
    inner = indent + "  "
    lines = (f"{inner}{json.dumps(key)}: {_indented(item, inner)}" for key, item in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
