"""The LoRA files of kohya's scripts: one name for each module, with underscores for its dots, and its own α."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping

import numpy as np

from ._diffusers import component_of
from ._factors import Arrays, Factors, of_modules, put
from ._layout import Values

# The components that a prefix of names stands for. Without a component in the names of modules, it is the first.
_PREFIXES = {
    "lora_unet_": ("unet", "transformer"),
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3",),
}
_SUFFIXES = {".lora_down.weight": "a", ".lora_up.weight": "b", ".alpha": "alpha", ".dora_scale": "magnitude"}


def is_kohya(names: Iterable[str]) -> bool:
    """Whether the names of tensors are those of kohya's files."""
    return all(name.startswith(tuple(_PREFIXES)) for name in names)


def from_kohya(
    tensors: Mapping[str, Values], modules: Iterable[str], component: str | None, problems: list[str]
) -> dict[str, Factors]:
    """Returns the factors by module, with the component in front; notes what is not read.

    Args:
      tensors: of the file.
      modules: the names of the modules that the file may adapt, with the component in front or without.
      component: that of the modules whose names have none; None for the first that their prefix stands for.
      problems: what is not read is added.
    """
    known = collections.defaultdict[tuple[str, str], set[str]](set)
    for module in modules:
        first = component_of(module) or ""
        rest = module.removeprefix(f"{first}.")
        if rest:  # the root is one of `named_modules()`
            known[first, rest.replace(".", "_")].add(rest)
    arrays: Arrays = {}
    names: dict[str, str] = {}
    for name, tensor in sorted(tensors.items()):
        lora, _, end = name.partition(".")
        if f".{end}" not in _SUFFIXES:
            problems.append(f"{name!r} {tensor.shape} is not of the factors of a module")
            continue
        if lora not in names:
            names[lora] = _module(lora, known, component, problems)
        if names[lora]:
            put(arrays, names[lora], _SUFFIXES[f".{end}"], tensor, problems)

    def scale(module: str, rank: int) -> float:
        alpha = arrays[module].get("alpha")
        return float(alpha.reshape(())) / rank if alpha is not None and alpha.any() else 1.0

    for own in arrays.values():
        if "magnitude" in own and "b" in own:
            own["magnitude"] = _from_dora_scale(own["magnitude"], own["b"])
    return of_modules(arrays, scale, problems)


def to_kohya(factors: Mapping[str, Factors], problems: list[str]) -> dict[str, Values]:
    """Returns the tensors of factors, whose modules have their component in front; notes what has no place."""
    tensors: dict[str, Values] = {}
    several = any(component_of(module) == "text_encoder_2" for module in factors)
    prefixes = {name: prefix for prefix, names in _PREFIXES.items() if prefix != "lora_te1_" for name in names}
    prefixes |= {"text_encoder": "lora_te1_"} if several else {}
    owners: dict[str, str] = {}
    for module, own in factors.items():
        component = component_of(module) or ""
        if component not in prefixes:
            problems.append(f"{module!r} is of a component that kohya's names have no prefix for")
            continue
        if own.bias is not None or own.kind == "embedding":
            what = "a bias of B" if own.bias is not None else "factors of an embedding"
            problems.append(f"{module!r} has {what}, which kohya's files have no place for")
            continue
        name = prefixes[component] + module.removeprefix(f"{component}.").replace(".", "_")
        if name in owners:
            problems.append(f"{module!r} and {owners[name]!r} have the same name {name!r}")
        owners[name] = module
        own = own if own.scale else own.rescaled(1.0, module)  # an α of 0 is read as the rank
        arrays = {"a": own.a, "b": own.b, "alpha": np.array(own.alpha, np.float32)}
        if own.magnitude is not None:
            arrays["magnitude"] = own.magnitude.reshape(-1, *(1,) * (own.a.ndim - 1))
        tensors |= {name + end: arrays[ours] for end, ours in _SUFFIXES.items() if ours in arrays}
    return tensors


def _module(lora: str, known: Mapping[tuple[str, str], set[str]], component: str | None, problems: list[str]) -> str:
    """Returns the module that a name stands for; nothing, after noting a problem, if there is not one."""
    prefix = next((prefix for prefix in _PREFIXES if lora.startswith(prefix)), "")
    rest = lora.removeprefix(prefix)
    components = _PREFIXES.get(prefix, ())
    found = [(first, module) for first in (*components, "") for module in sorted(known[first, rest])]
    if len(found) == 1:
        first, module = found[0]
        own = component if component in components else components[0]
        return f"{first or own}.{module}"
    several = f"the names of {len(found)}: {', '.join(module for _, module in found)}"
    problems.append(f"{lora!r} is {several if found else 'of no module'} in `modules`")
    return ""


def _from_dora_scale(values: Values, b: Values) -> Values:
    """Returns a magnitude per output as PEFT has it; another shape, which is refused, as it is."""
    if b.ndim < 2 or values.shape not in (b.shape[:1], (b.shape[0], *(1,) * (b.ndim - 1))):
        return values
    return values.reshape(-1) if b.ndim == 2 else values.reshape(1, -1, *(1,) * (b.ndim - 2))
