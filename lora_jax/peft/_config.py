"""The configuration of an adapter: what it states for each module, and what of it cannot be read here."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NewType

from . import _patterns
from ._patterns import Patterns
from ._row import Row
from ._untrusted import shown

Config = Mapping[str, Any]  # as it is in a file
Prepared = NewType("Prepared", Config)  # from `prepared`


class Scale(NamedTuple):
    """The rank and α of one module; `scale` depends on whether the adapter is rank-stabilized."""

    rank: int
    alpha: float

    def scale(self, rank_stabilized: bool) -> float:
        """Returns α/r or α/√r."""
        return self.alpha / (math.sqrt(self.rank) if rank_stabilized else self.rank)


def ranks_to_config(scales: Mapping[str, Scale], first: Sequence[str] = ()) -> dict[str, Any]:
    """Returns `r`, `lora_alpha` and the patterns: the most frequent values, and the modules with others.

    The values are the most frequent of the modules in `first`, if there are any.
    """
    if not scales:
        return {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}}
    (rank, alpha), _ = collections.Counter(scales[name] for name in first or scales).most_common(1)[0]
    return {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {_exactly(name): own.rank for name, own in scales.items() if own.rank != rank},
        "alpha_pattern": {_exactly(name): _plain(own.alpha) for name, own in scales.items() if own.alpha != alpha},
    }


def scale_of(config: Prepared, module: str) -> Scale:
    """Returns the rank and α of a module, as PEFT reads them: the first pattern that matches, else the default.

    Of AdaLoRA, the rank is what is left, and α that of the same scale, which PEFT computes with the initial rank.
    """
    if config.get("peft_type") == "ADALORA":
        initial, alpha = config.get("init_r", 12), config.get("lora_alpha", 8)
        mask = (config.get("rank_pattern") or {}).get(f"{module}.lora_E")
        rank = initial if mask is None else sum(mask)
        return Scale(rank, (alpha if alpha > 0 else initial) * rank / initial)
    rank = config["rank_pattern"].find(module, config.get("r", 8))
    alpha = config["alpha_pattern"].find(module, config.get("lora_alpha", 8))
    return Scale(rank, alpha)


def is_target(config: Prepared, module: str, parameter: bool = False) -> bool:
    """Whether the configuration gives a module, or a parameter, factors, as far as its targets say."""
    targets = config.get("target_parameters" if parameter else "target_modules")
    if isinstance(targets, str):
        return targets == "all-linear" or _patterns.fullmatch(targets, module)
    return not frozenset(targets or ()).isdisjoint(_patterns.ends(module))


def target_of(config: Prepared, module: str, row: Row) -> str:
    """Returns the name that PEFT adapts a module by: that of a `Linear`'s weight, if it is in `target_parameters`."""
    weight = f"{module}.{row.parameter}"
    is_parameter = row.kind == "linear" and not row.conv1d and is_target(config, weight, parameter=True)
    return weight if is_parameter else module


def prepared(config: Config) -> Prepared:
    """Returns a configuration without `problems`, with only what PEFT reads of it, and patterns compiled."""
    if config["peft_type"] == "VERA":
        config = {name: value for name, value in config.items() if name not in _LORA_ONLY}
    targets = config.get("target_modules")
    names = ("alpha_pattern",) if config["peft_type"] == "ADALORA" else ("rank_pattern", "alpha_pattern")
    patterns = {name: Patterns(config.get(name) or {}) for name in names}
    targets = frozenset(targets) if isinstance(targets, list) else targets
    return Prepared({**config, **patterns, "target_modules": targets})


def is_exact(config: Prepared) -> bool:
    """Whether only `target_modules` and `target_parameters` decide what has factors, and can be matched."""
    others = ("exclude_modules", "layers_to_transform")
    targets = config.get("target_modules")
    if any(config.get(name) is not None for name in others) or targets == "all-linear":
        return False
    return not (isinstance(targets, str) and _patterns.problems([targets]))


def rows_of(config: Prepared, module: str) -> list[int] | None:
    """Returns the ids of the trainable tokens of a module, whose name may end in several: the longest is its own."""
    ids = config.get("trainable_token_indices")
    if isinstance(ids, Mapping):
        return ids.get(max((name for name in ids if module.endswith(name)), key=len, default=None))
    return ids


_BASE_CHANGES = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LORA_ONLY = ("use_rslora", "use_dora", "lora_dropout", "alora_invocation_tokens", "trainable_token_indices")
_METHODS = ("layer_replication", "use_bdlora", "use_qalora", "arrow_config", "kasa_config", "velora_config")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -3e38 < value < 3e38  # of float32; an integer of JSON may be larger than any


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(index) is int and index < 2**31 for index in value)


# What each entry has to be, unless it is null.
_TYPES: dict[str, Callable[[Any], bool]] = {
    "r": lambda value: type(value) is int,
    "lora_alpha": _is_number,
    "rank_pattern": lambda value: isinstance(value, dict),
    "alpha_pattern": lambda value: isinstance(value, dict),
    "target_modules": lambda value: isinstance(value, str) or _are_names(value),
    "target_parameters": _are_names,
    "modules_to_save": _are_names,
    "trainable_token_indices": lambda value: all(map(_are_ids, value.values() if isinstance(value, dict) else [value])),
    "alora_invocation_tokens": _are_ids,
    **dict.fromkeys(("lora_dropout", "vera_dropout", "d_initial"), _is_number),
    **dict.fromkeys(("use_rslora", "use_dora", "save_projection", "ensure_weight_tying"), _is_flag),
}


def problems(config: Config) -> list[str]:
    """Returns what a configuration states that cannot be read here, with the reason."""
    found = []
    if (kind := config.get("peft_type")) not in ("LORA", "VERA", "ADALORA"):
        return [f"peft_type is {shown(kind)}; 'LORA', 'VERA' and 'ADALORA' can be read"]
    if kind == "VERA" and not config.get("save_projection", True):
        found.append("save_projection is false: the random matrices are not in the file")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_BASE_CHANGES):
        found.append(
            f"init_lora_weights is {shown(start)}: the adapter is for a base that this start has changed; save it with "
            "PEFT's path_initial_model_for_weight_conversion"
        )
    found += [
        f"{name} is set, which has no variant here" for name in (*_METHODS, "monteclora_config") if config.get(name)
    ]
    if config.get("use_dora") and config.get("alora_invocation_tokens") is not None:
        found.append("use_dora and alora_invocation_tokens are both set, and PEFT has one or the other")
    for name, fits in _TYPES.items():
        if config.get(name) is not None and not fits(config[name]):
            found.append(f"{name} is {shown(config[name])}")
    return found + _numbers(config)


def problems_to_convert(config: Config) -> list[str]:
    """Returns what of a configuration cannot be read as that of factors with a scale for each module."""
    if (kind := config.get("peft_type")) != "LORA":
        return [f"peft_type is {shown(kind)}; only 'LORA' can be converted"]
    return problems(config)


def _numbers(config: Config) -> list[str]:
    """Returns values that are not numbers where numbers are expected, and expressions that are invalid."""
    found = []
    if config.get("peft_type") == "ADALORA":
        found += _masks(config)
        config = {**config, "rank_pattern": None}
    ranks = [config.get("r", 8), *_values(config, "rank_pattern")]
    alphas = [config.get("lora_alpha", 8), *_values(config, "alpha_pattern")]
    found += [f"a rank is {shown(rank)}" for rank in ranks if type(rank) is not int or not 1 <= rank < 2**31]
    found += [f"an alpha is {shown(alpha)}" for alpha in alphas if not _is_number(alpha)]
    patterns = [*_keys(config, "rank_pattern"), *_keys(config, "alpha_pattern")]
    return found + [f"{shown(pattern)} {why}" for pattern, why in _patterns.problems(patterns)]


def _masks(config: Config) -> list[str]:
    """Returns what is wrong with the initial rank of AdaLoRA, and with the masks of its directions by module."""
    found = []
    if type(rank := config.get("init_r", 12)) is not int or not 1 <= rank < 2**31:
        found.append(f"init_r is {shown(rank)}")
    masks = config.get("rank_pattern")
    for name, mask in masks.items() if isinstance(masks, dict) else ():
        if not isinstance(mask, list) or not all(type(kept) is bool for kept in mask):
            found.append(f"rank_pattern of {shown(name)} is {shown(mask)}")
    return found


def _values(config: Config, name: str) -> list[Any]:
    return list(config[name].values()) if isinstance(config.get(name), dict) else []


def _keys(config: Config, name: str) -> list[str]:
    return list(config[name]) if isinstance(config.get(name), dict) else []


def _exactly(module: str) -> str:
    """Returns a pattern for one module; without `^` it would also match longer names with this end."""
    return "^" + re.escape(module)


def _plain(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else float(alpha)
