"""PEFT on PyTorch, which replaces modules by name."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import peft
import torch
from sizes import ALPHA
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .figures import first_line, progress
from .values import values

YES = "yes"


@torch.no_grad()
def adapt(model: nn.Module, targets: Collection[str], rank: int, factors: Callable[..., tuple[Tensor, Tensor]]) -> Any:
    """Returns the model with LoRA in the named linear layers, with the given factors."""
    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=list(targets))
    adapted = peft.get_peft_model(model, config)
    for name, layer in adapted.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            a, b = factors(name, layer.in_features, layer.out_features, rank)
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
    return adapted


class Tied(nn.Module):
    """A tied embedding and head, declared as PEFT expects."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(12, 8)
        self.lm_head = nn.Linear(8, 12, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self._tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}

    def get_input_embeddings(self) -> nn.Module:
        """Returns the embedding, as PEFT expects."""
        return self.embed_tokens

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.embed_tokens(x))


class Parameter(nn.Module):
    """A parameter with three axes, in one einsum."""

    def __init__(self, equation: str, *shape: int) -> None:
        super().__init__()
        self.kernel, self.equation = nn.Parameter(torch.randn(shape)), equation

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, x, self.kernel)


class Blocks(nn.Module):
    """Two checkpointed layers; PyTorch has no scan."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = torch.tanh(checkpoint(layer, x, use_reentrant=False))
        return x


class Trial(NamedTuple):
    """A program, PEFT's options for its target, inputs, and the number of parameters of an adapter of rank 2."""

    model: Callable[[], nn.Module]
    target: dict[str, Any]
    inputs: Tensor
    parameters: int


def batch(*shape: int) -> Tensor:
    """Returns inputs for a program."""
    return torch.tensor(values("inputs", shape))


FIRST, KERNEL = {"target_modules": ["0"]}, {"target_parameters": ["0.kernel"]}
TIED = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
WORDS = torch.arange(10)[None] % 7
TRIALS: dict[str, Trial] = {
    "matrices": Trial(lambda: nn.Sequential(nn.Linear(8, 6)), FIRST, batch(5, 8), 28),
    "scan + remat": Trial(Blocks, {"target_modules": ["first", "second"]}, batch(5, 8), 64),
    "rank-3 attention": Trial(lambda: nn.Sequential(Parameter("td,dhk->thk", 8, 2, 3)), KERNEL, batch(5, 8), 28),
    "embedding": Trial(lambda: nn.Sequential(nn.Embedding(12, 8)), FIRST, WORDS, 40),
    "tied embedding": Trial(Tied, TIED, WORDS, 40),
    "convolution": Trial(lambda: nn.Sequential(nn.Conv2d(3, 6, 3, 2)), FIRST, batch(2, 3, 8, 8), 66),
    "experts, einsum": Trial(lambda: nn.Sequential(Parameter("etd,efd->etf", 3, 6, 8)), KERNEL, batch(3, 5, 8), 84),
    "bfloat16 base": Trial(lambda: nn.Sequential(nn.Linear(8, 6)).bfloat16(), FIRST, batch(5, 8).bfloat16(), 28),
}


def support(trial: Trial) -> str:
    """Returns "yes" if PEFT adapts and merges a program correctly, else the reason."""
    torch.manual_seed(0)
    try:
        config = peft.LoraConfig(r=2, lora_alpha=ALPHA, init_lora_weights=False, **trial.target)
        model = peft.get_peft_model(trial.model(), config)
        trained = [x for x in model.parameters() if x.requires_grad]
        loss = model(trial.inputs).float().square().mean()
        gradients = torch.autograd.grad(loss, trained, materialize_grads=True)
        merged = model.merge_and_unload()(trial.inputs).float().square().mean()
    except Exception as error:  # PEFT raises errors of any type
        return first_line(error)
    # Two layers may share the storage of a factor, transposed.
    count = sum({x.untyped_storage().data_ptr(): x.numel() for x in trained}.values())
    dtypes = {str(x.dtype).removeprefix("torch.") for x in trained}
    if count != trial.parameters:
        return f"makes an adapter of {count} parameters instead of {trial.parameters}"
    if not all(map(torch.any, gradients)):
        return "a factor has no gradient"
    if not torch.allclose(loss, merged, rtol=3e-2 if trial.inputs.dtype == torch.bfloat16 else 1e-4):
        return "runs, but computes another function after merging"
    return YES if dtypes == {"float32"} else f"the adapter is in {', '.join(sorted(dtypes))}"


def capabilities() -> dict[str, str]:
    """Runs all trials. Each of them merges, so the first one also tests merging."""
    found = {}
    for name, trial in TRIALS.items():
        progress(f"try {name}: PEFT")
        found[name] = support(trial)
    return found | {"merging back": found["matrices"]}
