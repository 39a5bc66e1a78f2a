"""The same decoder and step in PyTorch, eager: LoRA by hand, full fine-tuning, and PEFT."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import sizes
import torch
from sizes import ALPHA, Size
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the usual name
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from . import BY_HAND, ENVIRONMENTS, FULL, peft
from .figures import Figures, first_line, progress
from .values import tokens, values

TARGETS = ("query", "key", "value", "out", "up", "down")


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.query, self.key, self.value, self.out = (nn.Linear(size.width, size.width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and an MLP, each after a norm."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = (nn.LayerNorm(size.width, eps=1e-6) for _ in range(2))
        self.attention = Attention(size)
        self.up, self.down = nn.Linear(size.width, size.hidden), nn.Linear(size.hidden, size.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class Decoder(nn.Module):
    """A decoder with a tied embedding."""

    def __init__(self, size: Size, *, remat: bool = False) -> None:
        super().__init__()
        self.remat = remat
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.position = nn.Embedding(size.length, size.width)
        for number in range(size.layers):
            self.add_module(f"block_{number}", Block(size))
        self.norm = nn.LayerNorm(size.width, eps=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1]))
        for name, block in self.named_children():
            if name.startswith("block_"):
                x = checkpoint(block, x, use_reentrant=False) if self.remat else block(x)
        return F.linear(self.norm(x), self.embedding.weight)


class ByHand(nn.Module):
    """A linear layer with LoRA: x·W + bias + ((x·A)·s)·B."""

    def __init__(self, layer: nn.Linear, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(F.linear(x, self.a) * self.scale, self.b)


def path_of(name: str) -> str:
    """Returns the Flax path of a PyTorch module."""
    return name.replace(".", "/")


def tensor(path: str, *shape: int) -> Tensor:
    """Returns the values of a path, in Flax's shape."""
    return torch.tensor(values(path, shape))


def factors_of(name: str, d_in: int, d_out: int, rank: int) -> tuple[Tensor, Tensor]:
    """Returns the factors of a linear layer in PyTorch's layout: (rank, in), (out, rank)."""
    path = f"{path_of(name)}/kernel"
    return tensor(f"{path}/a", d_in, rank).T.contiguous(), tensor(f"{path}/b", rank, d_out).T.contiguous()


@torch.no_grad()
def decoder(size: Size, **options: Any) -> Decoder:
    """Returns the decoder with the values of its Flax counterpart."""
    model = Decoder(size, **options)
    for name, module in model.named_modules():
        path = path_of(name)
        if isinstance(module, nn.Embedding):
            module.weight.copy_(tensor(f"{path}/embedding", *module.weight.shape))
        elif isinstance(module, nn.Linear):
            module.weight.copy_(tensor(f"{path}/kernel", *module.weight.shape[::-1]).T)
        elif isinstance(module, nn.LayerNorm):
            module.weight.copy_(tensor(f"{path}/scale", *module.weight.shape))
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.bias.copy_(tensor(f"{path}/bias", *module.bias.shape))
    return model


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Returns the linear layers of the blocks, with their names."""
    return ((name, layer) for name, layer in list(model.named_modules()) if isinstance(layer, nn.Linear))


def by_hand(size: Size, **options: Any) -> nn.Module:
    """Returns the decoder with LoRA in its layers."""
    model = decoder(size, **options).requires_grad_(False)
    for name, layer in adapted_layers(model):
        a, b = factors_of(name, layer.in_features, layer.out_features, size.rank)
        model.set_submodule(name, ByHand(layer, a, b, ALPHA / size.rank))
    return model


def with_peft(size: Size, **options: Any) -> nn.Module:
    """Returns the decoder with PEFT's LoRA, with the values of the case."""
    return peft.adapt(decoder(size, **options), TARGETS, size.rank, factors_of)


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Returns the mean loss of predicting each next token."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten().long())


@dataclasses.dataclass
class Training:
    """A model with an optimizer and a batch."""

    model: nn.Module
    tokens: Tensor

    def __post_init__(self) -> None:
        trained = [x for x in self.model.parameters() if x.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1e-4)

    def step(self) -> float:
        """Takes one step of AdamW, and returns the loss before it."""
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(self.tokens), self.tokens)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def saved(self) -> int:
        """Returns the bytes that the forward pass saves for the backward pass, without the parameters."""
        parameters = {x.data_ptr() for x in self.model.parameters()}
        found: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            if x.untyped_storage().data_ptr() not in parameters:
                found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = cross_entropy(self.model(self.tokens), self.tokens)
        del loss  # kept alive until here, so that no address is reused
        return sum(found.values())

    def state_bytes(self) -> int:
        """Returns the bytes of the optimizer state."""
        return sum(x.nbytes for state in self.optimizer.state.values() for x in state.values())


def measure(size: Size, builds: dict[str, Callable[..., nn.Module]], steps: int, **options: Any) -> dict[str, Any]:
    """Measures the methods, interleaved."""
    batch = torch.tensor(tokens(size.vocabulary, (size.batch, size.length)))
    found: dict[str, Any] = {}
    training = {}
    for name, build in builds.items():
        progress(f"build: {name}")
        try:
            training[name] = Training(build(size, **options), batch)
        except Exception as error:  # PEFT raises errors of any type
            found[name] = first_line(error)
    saved = {name: trainer.saved() for name, trainer in training.items()}
    flops, losses = {}, {}
    for name, trainer in training.items():
        with FlopCounterMode(display=False) as counter:
            losses[name] = trainer.step()
        flops[name] = counter.get_total_flops()
    seconds: dict[str, list[float]] = {name: [] for name in training}
    for number in range(steps):
        progress(f"step {number + 1} of {steps}")
        for name, trainer in training.items():
            start = time.perf_counter()
            trainer.step()
            seconds[name].append(time.perf_counter() - start)
    for name, trainer in training.items():
        figures = Figures(seconds[name], flops[name], saved[name], trainer.state_bytes(), None, losses[name])
        found[name] = dataclasses.asdict(figures)
    return found


def torch_environment(given: argparse.Namespace) -> dict[str, Any]:
    """Measures the references and PEFT. PyTorch has no scan, so its blocks are unrolled and checkpointed."""
    (peer,) = ENVIRONMENTS["torch"]
    builds = {BY_HAND: by_hand, FULL: decoder, peer.name: with_peft}
    size = getattr(sizes, given.size.upper())
    cases = {
        "unrolled layers": measure(size, builds, given.steps),
        "scan + remat": measure(size, builds, given.steps, remat=True),
    }
    return {"cases": cases, "capabilities": {} if given.quick else {peer.name: peft.capabilities()}}
