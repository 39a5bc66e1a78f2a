"""The LoRA files of diffusers: one for a pipeline, whose components' names precede those of the modules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._errors import SpecError
from ._config import Prepared, prepared, problems_to_convert, scale_of
from ._factors import ARRAYS, Arrays, Factors, mixed, of_modules, other_ranks, put, scales_to_config
from ._layout import Values
from ._names import SUFFIXES
from ._untrusted import parse, shown

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"

# The parts of pipelines that diffusers 0.42 loads adapters into.
COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "transformer_ref",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "text_conditioner",
    "connectors",
)
_SUFFIXES = {ours: SUFFIXES[ours] for ours in ARRAYS}
_OTHERS = {".lora.down.weight": "a", ".lora.up.weight": "b", ".lora_magnitude_vector.weight": "magnitude"}
_READ = {end: ours for ours, end in _SUFFIXES.items()} | _OTHERS | {".alpha": "alpha"}


def component_of(module: str) -> str | None:
    """Returns the component that precedes the name of a module.

    >>> component_of("unet.mid_block.attentions.0.proj_in"), component_of("model.layers.0.fc")
    ('unet', None)
    """
    first = module.split(".")[0]
    return first if first in COMPONENTS else None


def check_component(component: str | None) -> None:
    """Raises `SpecError` unless it is a component or None."""
    if component is not None and component not in COMPONENTS:
        raise SpecError(f"Expected one of {', '.join(map(repr, COMPONENTS))} for `component`; got {component!r}.")


def prefixed(factors: Mapping[str, Factors], component: str | None) -> dict[str, Factors]:
    """Returns factors whose modules have the component in front."""
    return {module if component is None else f"{component}.{module}": own for module, own in factors.items()}


def from_diffusers(
    tensors: Mapping[str, Values], metadata: Mapping[str, str], file: Path, problems: list[str]
) -> dict[str, Factors]:
    """Returns the factors by module, with the component in front; notes what is not read.

    The scale is that of the metadata, or else of a module's α, or else 1, as in diffusers.

    Raises:
      CheckpointError: if the metadata are not a JSON object; `file` is for the error.
    """
    arrays: Arrays = {}
    for name, tensor in sorted(tensors.items()):
        end = next((end for end in _READ if name.endswith(end)), "")
        module = name.removesuffix(end)
        if not end or component_of(module) in (None, module):
            problems.append(f"{name!r} {tensor.shape} is not of the factors of a component's module")
        else:
            put(arrays, module, _READ[end], tensor, problems)
    configs = _configs(metadata, file, problems)
    split = {module: module.partition(".") for module in arrays}
    stated = {module: scale_of(configs[first], rest) for module, (first, _, rest) in split.items() if first in configs}

    def scale(module: str, rank: int) -> float:
        if module in stated:
            return stated[module].scale(bool(configs[split[module][0]].get("use_rslora")))
        alpha = arrays[module].get("alpha")
        return 1.0 if alpha is None else float(alpha.reshape(())) / rank

    found = of_modules(arrays, scale, problems)
    problems += other_ranks(found, stated)
    return found


def to_diffusers(factors: Mapping[str, Factors], problems: list[str]) -> tuple[dict[str, Values], dict[str, str]]:
    """Returns the tensors and the metadata of factors, whose modules have their component in front.

    All scales are 1, so that readers that do not know the metadata compute the same. What has no place is noted.
    """
    tensors: dict[str, Values] = {}
    configs: dict[str, Any] = {}
    for module, one in factors.items():
        if component_of(module) is None:
            problems.append(f"{module!r} does not begin with a component, as {', '.join(COMPONENTS[:2])}")
        if one.kind == "embedding":
            problems.append(f"{module!r} has factors of an embedding, which diffusers does not read")
    for component in dict.fromkeys(map(component_of, factors)):
        own = {module: one for module, one in factors.items() if component_of(module) == component}
        problems += mixed(own)
        own = {module: one.rescaled(1.0, module) for module, one in own.items()}
        tensors |= {
            module + end: array
            for module, one in own.items()
            for name, end in _SUFFIXES.items()
            if (array := getattr(one, name)) is not None
        }
        config = scales_to_config({module.partition(".")[2]: one for module, one in own.items()}) | {
            "target_modules": sorted(module.partition(".")[2] for module in own),
            "use_dora": any(one.magnitude is not None for one in own.values()),
            "lora_bias": any(one.bias is not None for one in own.values()),
        }
        configs |= {f"{component}.{name}": value for name, value in config.items()}
    return tensors, {METADATA: json.dumps(configs, indent=2, sort_keys=True)}


def _configs(metadata: Mapping[str, str], file: Path, problems: list[str]) -> dict[str, Prepared]:
    """Returns the configuration of each component."""
    found: dict[str, dict[str, Any]] = {}
    text = metadata.get(METADATA, "{}")
    for name, value in parse(text.encode(errors="surrogatepass"), file / METADATA).items():
        component, _, entry = name.partition(".")
        if component not in COMPONENTS:
            problems.append(f"its metadata {shown(name)} are of no component")
        found.setdefault(component, {"peft_type": "LORA"})[entry] = value
    bad = {component: problems_to_convert(config) for component, config in found.items()}
    problems += [f"its metadata of {component!r}: {line}" for component, lines in bad.items() for line in lines]
    return {component: prepared(config) for component, config in found.items() if not bad[component]}
