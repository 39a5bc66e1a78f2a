"""Programs to adapt: two decoders to measure, and a small program for each capability."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from decoder import Decoder, cross_entropy, on_matrices, plain
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from sizes import ALPHA, TINY, Size

from .values import tokens, values


def by_role(roles: str, axes: Iterable[Any]) -> list[list[Any]]:
    """Groups a property of each axis by role: batch, input, output."""
    pairs = list(zip(roles, axes, strict=True))
    return [[value for role, value in pairs if role == wanted] for wanted in "bio"]


class Factors(NamedTuple):
    """The low-rank factors of one kernel.

    Attributes:
      roles: the roles of the kernel's axes: `b` batch, `i` input, `o` output.
      a: `(batch…, in…, rank)`.
      b: `(batch…, rank, out…)`.
    """

    roles: str
    a: Array
    b: Array

    def delta(self) -> Array:
        """Returns `A·B` in the kernel's shape."""
        letters = "wxyzuv"[: len(self.roles)]
        batch, contracted, out = map("".join, by_role(self.roles, letters))
        return jnp.einsum(f"{batch}{contracted}r,{batch}r{out}->{letters}", self.a, self.b)


class Case(NamedTuple):
    """A Linen model with its weights, factors for some of its kernels, inputs and loss.

    A kernel with factors is `W0 + scale·A·B`.
    """

    model: nn.Module
    params: Any
    adapter: Mapping[str, Factors]
    inputs: Array
    loss: Callable[[Array, Array], Array]
    rank: int

    @property
    def scale(self) -> float:
        """α / rank."""
        return ALPHA / self.rank

    def apply(self, params: Any, inputs: Array) -> Array:
        """Applies the unmodified model."""
        return plain(self.model)(params, inputs)

    def kernels(self) -> dict[str, Array]:
        """Returns the leaves by path."""
        return flatten_dict(self.params, sep="/")


class Experts(nn.Module):
    """A linear layer for each group of rows, with one kernel `(experts, in, out)`."""

    experts: int = 3

    def setup(self) -> None:
        self.kernel = self.param("kernel", nn.initializers.normal(), (self.experts, 8, 6))

    def __call__(self, x: Array) -> Array:
        return jnp.einsum("etd,edf->etf", x, self.kernel)


class MappedExperts(nn.Module):
    """The same layers as one `nn.Dense` under `nn.vmap`."""

    experts: int = 3

    @nn.compact
    def __call__(self, x: Array) -> Array:
        mapped = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
        return mapped(6, use_bias=False, name="dense")(x)


class Images(nn.Module):
    """A convolution, 3 × 3 with stride 2, and a nonlinearity."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return jnp.tanh(nn.Conv(6, (3, 3), strides=2, name="conv")(x))


def make(model: nn.Module, targets: Mapping[str, str], inputs: Any, loss: Any, rank: int, dtype: Any = None) -> Case:
    """Returns a case with values for the model and for the factors of the targets, `{end of a path: roles}`."""
    inputs = jnp.asarray(inputs)
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.PRNGKey(0), inputs)["params"], sep="/")
    params = {path: jnp.asarray(values(path, leaf.shape), leaf.dtype) for path, leaf in shapes.items()}
    adapter = {
        path: factors(path, leaf.shape, roles, rank)
        for path, leaf in shapes.items()
        for end, roles in targets.items()
        if path.endswith(end)
    }
    return Case(model, unflatten_dict(params, sep="/"), adapter, inputs, loss, rank)


def factors(path: str, shape: tuple[int, ...], roles: str, rank: int) -> Factors:
    """Returns the factors of one kernel, in float32."""
    batch, contracted, out = by_role(roles, shape)
    a, b = values(f"{path}/a", (*batch, *contracted, rank)), values(f"{path}/b", (*batch, rank, *out))
    return Factors(roles, jnp.asarray(a), jnp.asarray(b))


LAYERS = ("query", "key", "value", "out", "up", "down")


def decoder(
    size: Size,
    *,
    matrices: bool = True,
    scanned: bool = False,
    tied: bool = True,
    dtype: Any = jnp.float32,
    targets: Mapping[str, str] | None = None,
) -> Case:
    """Returns a decoder, adapted in all layers of its blocks, or in `targets`."""
    roles = dict.fromkeys(LAYERS, "io")
    if not matrices:
        roles |= {"query": "ioo", "key": "ioo", "value": "ioo", "out": "iio"}
    dense = on_matrices(nn.Dense) if matrices else nn.DenseGeneral
    return make(
        Decoder(size, scanned=scanned, tied=tied, dtype=dtype, dense=dense),
        targets or {f"/{layer}/kernel": "b" * scanned + roles[layer] for layer in LAYERS},
        tokens(size.vocabulary, (size.batch, size.length)),
        cross_entropy,
        size.rank,
    )


MEASURED: dict[str, Callable[[Size], Case]] = {
    "unrolled layers": decoder,
    "scan + remat": lambda size: decoder(size, scanned=True),
}

EMBEDDING = {"embedding/embedding": "io"}


def squares(y: Array, x: Array) -> Array:
    """Returns a loss that depends on every output."""
    del x  # nothing is predicted
    return jnp.mean(y**2)


def _one(model: nn.Module, end: str, roles: str, *shape: int) -> Case:
    return make(model, {end: roles}, values("inputs", shape), squares, rank=2)


ONE_LAYER = dataclasses.replace(TINY, layers=1)
CAPABILITIES: dict[str, Callable[[], Case]] = {
    "matrices": lambda: decoder(ONE_LAYER),
    "scan + remat": lambda: decoder(TINY, scanned=True),
    "rank-3 attention": lambda: decoder(ONE_LAYER, matrices=False),
    "embedding": lambda: decoder(ONE_LAYER, tied=False, targets=EMBEDDING),
    "tied embedding": lambda: decoder(ONE_LAYER, targets=EMBEDDING),
    "convolution": lambda: _one(Images(), "conv/kernel", "iiio", 2, 8, 8, 3),
    "experts, einsum": lambda: _one(Experts(), "kernel", "bio", 3, 5, 8),
    "experts, vmap": lambda: _one(MappedExperts(), "dense/kernel", "bio", 3, 5, 8),
    "bfloat16 base": lambda: decoder(ONE_LAYER, dtype=jnp.bfloat16),
}
