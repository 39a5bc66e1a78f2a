"""Converts adapters between the files of PEFT, kohya's scripts and diffusers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from .._errors import AdapterError, CheckpointError, SpecError, counted, listed
from ._config import problems_to_convert
from ._diffusers import DIFFUSERS_FILE, check_component, component_of, from_diffusers, prefixed, to_diffusers
from ._factors import Factors, from_peft, mixed, to_peft
from ._files import TENSORS, Files, read_config, read_tensors, write
from ._kohya import from_kohya, is_kohya, to_kohya
from ._layout import Values
from ._names import PREFIX
from ._safetensors import Contents

FORMATS = ("peft", "kohya", "diffusers")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str,
    modules: Iterable[str] | None = None,
    component: str | None = None,
) -> Path:
    """Converts an adapter between the files of PEFT, kohya's scripts and diffusers.

    The factors are those of the source, and the products keep their scale: each module of PEFT's and kohya's files has
    its own α, and in a file for diffusers the scale is multiplied into `b`. Factors of linear modules and convolutions
    and DoRA's magnitudes are converted. Everything is converted, or nothing is written.

    >>> import tempfile, jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"proj_in": {"kernel": jnp.ones((4, 3))}}
    >>> adapter = lj.init(jax.random.key(0), params, {"**/kernel": lj.LoRA(rank=2, alpha=4)})
    >>> with tempfile.TemporaryDirectory() as path:
    ...     lj.peft.export(path, adapter, lj.peft.layer("proj_in", "proj_in"), base=params)
    ...     file = convert(path, f"{path}/lora.safetensors", to="kohya", component="unet")
    ...     convert(file, f"{path}/diffusers", to="diffusers", modules=["proj_in"]).name
    'pytorch_lora_weights.safetensors'

    Args:
      source: a directory of PEFT's or with a `pytorch_lora_weights.safetensors`, or a `.safetensors` file in a format
        that its names of tensors tell.
      target: created if missing, replaced otherwise. A directory for PEFT; for kohya a file; for diffusers either.
      to: `"peft"`, `"kohya"` or `"diffusers"`.
      modules: to read kohya's files, whose names have underscores for dots: the names of the model's torch modules,
        as `named_modules()` gives them, with their component in front if there are several.
      component: the part of a pipeline that the adapter is of, such as `"unet"`, for names of modules that do not begin
        with one: needed for those of PEFT's files, and `"unet"` and `"text_encoder"` by default for kohya's. To PEFT,
        the component to take; needed if there are several.

    Returns:
      The file of tensors that is written.

    Raises:
      AdapterError: if the format has no place for something in the source. One error lists all.
      CheckpointError: if the source is missing, damaged or in none of the formats, if tensors are not read, or if the
        target cannot be written.
      SpecError: if `to`, `modules` or `component` is not as expected.
    """
    source, target = Path(source), Path(target)
    if to not in FORMATS:
        raise SpecError(f"Expected one of {', '.join(map(repr, FORMATS))} for `to`; got {to!r}.")
    check_component(component)
    if (to == "peft") == (target.suffix == ".safetensors") and to != "diffusers":
        what = "a directory" if to == "peft" else "a file whose name ends in .safetensors"
        raise SpecError(f"Expected {what} for `target`, for to={to!r}; got {str(target)!r}.")
    file, contents = _read(source)
    own = _format(file, contents.tensors)
    if own == to:
        raise SpecError(f"Expected another format for `to` than that of the source, {own!r}; got to={to!r}.")
    if (own, to) == ("diffusers", "kohya") and component is not None:
        raise SpecError(f"Expected no `component`, which the names in {file} state; got {component!r}.")
    return _written(_factors(own, file, contents, modules, component), own, target, to, component)


def _read(source: Path) -> tuple[Path, Contents]:
    """Returns the file of tensors, and what it has."""
    if not source.exists():
        raise CheckpointError(f"Expected a directory or a file of tensors to convert; there is no {source}.")
    names = [name for name in (TENSORS, DIFFUSERS_FILE) if source.is_dir() and (source / name).exists()]
    if source.is_dir() and len(names) != 1:
        raise CheckpointError(
            f"Expected a directory with {TENSORS} or {DIFFUSERS_FILE}; got {' and '.join(names) or 'neither'} in "
            f"{source}.\n  Pass the file."
        )
    file = source / names[0] if names else source
    return file, read_tensors(file.parent, file.name)


def _format(file: Path, tensors: Mapping[str, Values]) -> str:
    """Returns the format of a file, from the names of its tensors."""
    if tensors and is_kohya(tensors):
        return "kohya"
    if tensors and all(name.startswith(PREFIX) for name in tensors):
        return "peft"
    if any(component_of(name) is not None for name in tensors):
        return "diffusers"
    names = listed([repr(name) for name in tensors])
    raise CheckpointError(
        f"Expected names of tensors as in a file of PEFT, kohya or diffusers, in {file}; got:\n{names}\n"
        f"  They begin with {PREFIX!r}, 'lora_unet_' or 'lora_te', or a component such as 'unet.'."
    )


def _factors(
    own: str, file: Path, contents: Contents, modules: Iterable[str] | None, component: str | None
) -> dict[str, Factors]:
    problems: list[str] = []
    tensors, metadata = contents
    if own == "kohya":
        if modules is None or isinstance(modules, str):
            raise SpecError(
                "Expected the names of the model's torch modules as `modules`: a file of kohya has underscores for the "
                f"dots of names, and so does not tell them; got {modules!r} for {file}.\n"
                "  Pass `[name for name, _ in unet.named_modules()]`, or the names in a file of the model."
            )
        found = from_kohya(tensors, modules, component, problems)
    elif own == "diffusers":
        found = from_diffusers(tensors, metadata, file, problems)
    else:
        config = read_config(file.parent)
        problems += problems_to_convert(config)
        problems += [f"{name} is set" for name in ("alora_invocation_tokens", "target_parameters") if config.get(name)]
        found = {} if problems else from_peft(tensors, config, problems)
    if problems:
        raise CheckpointError(
            f"Expected factors of linear modules and convolutions in {file}; got "
            f"{counted(len(problems), 'problem')}:\n{listed(problems)}\n"
            "  Only they are converted; nothing was written."
        )
    return found


def _written(factors: dict[str, Factors], own: str, target: Path, to: str, component: str | None) -> Path:
    """Writes factors in a format, and returns the file of tensors."""
    problems: list[str] = []
    if to == "peft":
        factors = _of_component(factors, component)
        problems += mixed(factors)
        directory, files = target, Files(*to_peft(factors))
    else:
        if own == "peft":
            factors = prefixed(factors, component)
        directory, name = (target.parent, target.name) if target.suffix == ".safetensors" else (target, DIFFUSERS_FILE)
        if to == "kohya":
            files = Files(to_kohya(factors, problems), None, name)
        else:
            tensors, metadata = to_diffusers(factors, problems)
            files = Files(tensors, None, name, metadata)
    if problems:
        raise AdapterError(
            f"Expected an adapter that the format {to!r} has a place for; got {counted(len(problems), 'problem')}:\n"
            f"{listed(problems)}\n"
            "  Nothing was written. `component` states what the adapter is of, if its names do not."
        )
    write(directory, files)
    return directory / files.name


def _of_component(factors: dict[str, Factors], component: str | None) -> dict[str, Factors]:
    """Returns the factors of one component, without its name in front."""
    found = sorted({module.partition(".")[0] for module in factors})
    if component is None and len(found) == 1:
        component = found[0]
    if component not in found:
        raise SpecError(
            f"Expected one of {', '.join(map(repr, found))} for `component`, as PEFT's files are of one; got "
            f"{component!r}."
        )
    return {module.partition(".")[2]: own for module, own in factors.items() if module.startswith(f"{component}.")}
