"""The configurations that `reproduce_paper.py` compares: trained leaves, methods and learning rates.

The learning rates were chosen on held-out training questions; see `GRID`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import lora_jax as lj
from finetune_trec import MODEL

ALPHA = 16  # for every rank, as in the paper: "we simply set α to the first r we try"
RANK = 8
RANKS = (1, 2, 4, 8, 64)
RATIO = 16  # the ratio of LoRA+

_D_MODEL, _D_MLP = MODEL.encoder.d_model, MODEL.encoder.d_mlp
# The number of parameters of both factors at rank 1, for the kernel of one layer.
FACTORS = {
    "attention/query": 2 * _D_MODEL,
    "attention/key": 2 * _D_MODEL,
    "attention/value": 2 * _D_MODEL,
    "attention/out": 2 * _D_MODEL,
    "mlp/up": _D_MODEL + _D_MLP,
    "mlp/down": _D_MLP + _D_MODEL,
}
MATRICES: dict[str, tuple[str, ...]] = {
    "q": ("attention/query",),
    "q, v": ("attention/query", "attention/value"),
    "q, k, v, o": tuple(name for name in FACTORS if name.startswith("attention")),
    "MLP": ("mlp/up", "mlp/down"),
    "all": tuple(FACTORS),
}
HEAD = {"**/classifier/*": lj.Full()}  # trained in every configuration, because it is randomly initialized


def factor_count(matrices: str, rank: int) -> int:
    """Returns the number of parameters of the factors of these matrices in all layers, without the head."""
    return MODEL.encoder.layers * rank * sum(FACTORS[name] for name in MATRICES[matrices])


def budget_rank(matrices: str, budget: int) -> int:
    """Returns the rank at which the factors of these matrices have about `budget` parameters."""
    return max(1, round(budget / factor_count(matrices, 1)))


BUDGET = factor_count("all", RANK)

HEAD_RATE = 1e-2  # for all configurations except the probe, which only trains the head
# Peak rates that were tried with `--tune`, and the accuracy in percent on 882 held-out training questions, for one seed
# and the steps of a run. The first one is used. The standard error of an accuracy is 1.2 points.
GRID: dict[str, tuple[float, ...]] = {
    "lora-all-r8": (2e-3,),  # 85.1
    "lora-q": (4e-3, 8e-3),  # 82.3, 81.7
    "lora-qv": (4e-3,),  # 85.1
    "lora-all-r1": (2e-3, 1e-3),  # 84.4, 83.7
    "lora-all-r64": (4e-3,),  # 84.9
    "full": (2e-4,),  # 85.6
    "bias": (5e-3,),  # 83.3
    "probe": (2e-2, 4e-2),  # 64.4, 63.3
    "lora-plus": (2.5e-4, 5e-4),  # 84.9, 84.4
    "rslora-r64": (1e-3,),  # 85.0
    "pissa": (1e-3, 5e-4),  # 85.3, 84.9
}
# Tried before with a rate of 2e-3 for the head, which was too low: LoRA 80.7 at 2e-3, 79.9 at 4e-3; on q 65.6
# at 2e-3, 69.2 at 4e-3; rank 1 75.7 at 2e-3, 68.8 at 4e-3; rank 64 81.9 at 2e-3; full 83.4 at 2e-4, 82.7 at 4e-4;
# biases 65.0 at 5e-3, 57.0 at 1e-2; LoRA+ 81.1 at 5e-4, 76.1 at 1e-3; rsLoRA 84.7 at 1e-3, 80.3 at 2e-3; PiSSA 78.3 at
# 1e-3, 76.6 at 2e-3; DoRA 80.8 at 4e-3; the probe 60.7 at 1e-2.


def rate_of(name: str) -> float:
    """Returns the peak learning rate of a configuration, or LoRA's at rank 8 if none was tried."""
    return GRID.get(name, GRID["lora-all-r8"])[0]


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One way to fine-tune.

    Attributes:
      name: the name of its files.
      method: its name in tables.
      spec: the spec for `lj.init`.
      rate: the peak learning rate of everything except the head.
      head_rate: the peak learning rate of the head.
      matrices: a key of `MATRICES` for low-rank methods; "–" for others.
      ratio: the ratio of the learning rates of B and A (LoRA+).
      principal: whether the factors are initialized with PiSSA.
    """

    name: str
    method: str
    spec: Mapping[str, lj.LoRA | lj.RSLoRA | lj.DoRA | lj.Full]
    rate: float
    head_rate: float = HEAD_RATE
    matrices: str = "–"
    ratio: float | None = None
    principal: bool = False

    @property
    def rank(self) -> int | None:
        """The rank of the low-rank leaves; None if there are none."""
        return next((variant.rank for variant in self.spec.values() if not isinstance(variant, lj.Full)), None)

    def settings(self) -> dict[str, Any]:
        """Returns all fields as JSON values, the spec as text."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"spec": {pattern: repr(variant) for pattern, variant in self.spec.items()}}


def _low_rank(
    name: str, method: str, variant: lj.LoRA | lj.RSLoRA | lj.DoRA, *, matrices: str = "all", **more: Any
) -> Configuration:
    spec = {f"**/{kernel}/kernel": variant for kernel in MATRICES[matrices]} | HEAD
    return Configuration(name, method, spec, rate_of(name), matrices=matrices, **more)


def _lora(matrices: str, rank: int) -> Configuration:
    letters = matrices.replace(", ", "").lower()
    name = f"lora-all-r{rank}" if matrices == "all" else f"lora-{letters}"
    return _low_rank(name, "LoRA", lj.LoRA(rank=rank, alpha=ALPHA), matrices=matrices)


_ALL = (
    _lora("all", RANK),
    *(_lora(matrices, budget_rank(matrices, BUDGET)) for matrices in MATRICES if matrices != "all"),
    *(_lora("all", rank) for rank in RANKS if rank != RANK),
    Configuration("full", "full fine-tuning", {"**": lj.Full()}, rate_of("full")),
    Configuration("bias", "biases only (BitFit)", {"**/bias": lj.Full()} | HEAD, rate_of("bias")),
    Configuration("probe", "linear probe", HEAD, rate_of("probe"), head_rate=rate_of("probe")),
    _low_rank("lora-plus", f"LoRA+, λ = {RATIO}", lj.LoRA(rank=RANK, alpha=ALPHA), ratio=RATIO),
    _low_rank("rslora-r64", "rsLoRA", lj.RSLoRA(rank=max(RANKS), alpha=ALPHA)),
    _low_rank("dora", "DoRA", lj.DoRA(rank=RANK, alpha=ALPHA)),
    _low_rank("pissa", "PiSSA", lj.LoRA(rank=RANK, alpha=ALPHA), principal=True),
)
CONFIGURATIONS = {configuration.name: configuration for configuration in _ALL}

# The first configuration of each comparison is the reference of the others.
COMPARISONS: dict[str, tuple[str, ...]] = {
    "matrices": ("lora-all-r8", "lora-mlp", "lora-qkvo", "lora-qv", "lora-q"),
    "ranks": ("lora-all-r8", "lora-all-r1", "lora-all-r2", "lora-all-r4", "lora-all-r64"),
    "methods": ("lora-all-r8", "full", "bias", "probe"),
    "variants": ("lora-all-r8", "lora-plus", "dora", "pissa"),
    "stabilized": ("lora-all-r64", "rslora-r64"),
}
