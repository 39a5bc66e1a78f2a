"""What `reproduce_paper.py` compares: which leaves are trained, how, and at which learning rate.

Nothing here computes anything but sizes. The learning rates were chosen on held-out training questions; see `GRID`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import lora_jax as lj
from finetune_trec import MODEL

ALPHA = 16  # for every rank, as in the paper: "we simply set α to the first r we try"
RANK = 8
RANKS = (1, 2, 4, 8, 64)
RATIO = 16  # of LoRA+

_D_MODEL, _D_MLP = MODEL.encoder.d_model, MODEL.encoder.d_mlp
# The numbers of both factors at rank 1, of one layer's kernel.
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
HEAD = {"**/classifier/*": lj.Full()}  # of every configuration: it starts from random numbers


def factor_count(matrices: str, rank: int) -> int:
    """How many numbers the factors of these matrices have in all layers; the head is not among them."""
    return MODEL.encoder.layers * rank * sum(FACTORS[name] for name in MATRICES[matrices])


def budget_rank(matrices: str, budget: int) -> int:
    """The rank at which the factors of these matrices come nearest to `budget` numbers."""
    return max(1, round(budget / factor_count(matrices, 1)))


BUDGET = factor_count("all", RANK)

HEAD_RATE = 1e-2  # of all but the probe, which has nothing else
GRID: dict[str, tuple[float, ...]] = {
    "lora-all-r8": (2e-3, 1e-3, 4e-3),
    "lora-q": (4e-3, 8e-3),
    "lora-qv": (4e-3, 2e-3),
    "lora-all-r1": (2e-3, 1e-3),
    "lora-all-r64": (4e-3, 2e-3),
    "full": (2e-4, 4e-4),
    "bias": (5e-3, 1e-2),
    "probe": (4e-2, 2e-2),
    "lora-plus": (5e-4, 2.5e-4),
    "rslora-r64": (1e-3, 5e-4),
    "dora": (2e-3, 4e-3),
    "pissa": (1e-3, 5e-4),
}


def rate_of(name: str) -> float:
    """The peak learning rate of a configuration: its own best, or LoRA's at rank 8 where none was tried."""
    return GRID.get(name, GRID["lora-all-r8"])[0]


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One way to fine-tune.

    Attributes:
      name: what its files are called.
      method: its name in tables.
      spec: what is trained, as `lj.init` takes it.
      rate: the peak learning rate of all but the head.
      head_rate: the head's.
      matrices: of the low-rank ones, a key of `MATRICES`; "–" for the others.
      ratio: how many times A's learning rate B has (LoRA+).
      principal: whether the factors start as the kernel's principal part (PiSSA), not by chance and zero.
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
        """The rank of its low-rank leaves, None without."""
        return next((its.rank for its in self.spec.values() if not isinstance(its, lj.Full)), None)

    def settings(self) -> dict[str, Any]:
        """All of it as JSON gives it back; the spec as text."""
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


_EVERY = (
    _lora("all", RANK),
    *(_lora(matrices, budget_rank(matrices, BUDGET)) for matrices in MATRICES if matrices != "all"),
    *(_lora("all", rank) for rank in RANKS if rank != RANK),
    Configuration("full", "full fine-tuning", {"**": lj.Full()}, rate_of("full")),
    Configuration("bias", "biases alone (BitFit)", {"**/bias": lj.Full()} | HEAD, rate_of("bias")),
    Configuration("probe", "linear probe", HEAD, rate_of("probe"), head_rate=rate_of("probe")),
    _low_rank("lora-plus", f"LoRA+, λ = {RATIO}", lj.LoRA(rank=RANK, alpha=ALPHA), ratio=RATIO),
    _low_rank("rslora-r64", "rsLoRA", lj.RSLoRA(rank=max(RANKS), alpha=ALPHA)),
    _low_rank("dora", "DoRA", lj.DoRA(rank=RANK, alpha=ALPHA)),
    _low_rank("pissa", "PiSSA", lj.LoRA(rank=RANK, alpha=ALPHA), principal=True),
)
CONFIGURATIONS = {its.name: its for its in _EVERY}

# What is compared with what; the first of each is what the others are held against.
COMPARISONS: dict[str, tuple[str, ...]] = {
    "matrices": ("lora-all-r8", "lora-mlp", "lora-qkvo", "lora-qv", "lora-q"),
    "ranks": ("lora-all-r8", "lora-all-r1", "lora-all-r2", "lora-all-r4", "lora-all-r64"),
    "methods": ("lora-all-r8", "full", "bias", "probe"),
    "variants": ("lora-all-r8", "lora-plus", "dora", "pissa", "lora-all-r64", "rslora-r64"),
}
