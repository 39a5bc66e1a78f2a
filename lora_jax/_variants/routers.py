"""Routers: how the experts of a mixture are weighted at each token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._core.axes import RANK, axes_of_a, axes_with
from .._core.contract import widest
from .._core.numbers import flag, integer, number
from .._core.routing import Router, Source
from .._errors import SpecError


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Constant(Router):
    """The same weights for every token: the mixture is one adapter, whose update is the weighted sum of the updates.

        y = x·W0 + Σ_e c_e·s_e·(x·A_e)·B_e

    Such a mixture can be merged. The weights are an array of each leaf, `weights`, that can be trained or replaced.

    >>> Constant()
    Constant()
    """

    source: ClassVar[Source] = "constant"

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """`weights`: (batch…, experts)."""
        return {"weights": (*axes_with(axes, "b"), RANK)}


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Given(Router):
    """Weights that the caller computes, as in X-LoRA (Buehler and Buehler 2024, arXiv:2402.07148).

    The adapted function takes them as `token_weights`, (tokens…, experts).

    >>> Given()
    Given()

    Attributes:
      per_layer: whether they are (batch…, tokens…, experts), with the batch axes of the kernel, such as the layers of a
        scanned stack.
    """

    per_layer: bool = False  # type: ignore[misc]
    source: ClassVar[Source] = "caller"

    def __post_init__(self) -> None:
        object.__setattr__(self, "per_layer", flag("per_layer", self.per_layer))

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """No arrays."""
        del axes
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class _Prototypes(Router):
    """Routers that multiply the activation with an array of the leaf, `gate`: (batch…, in…, experts)."""

    source: ClassVar[Source] = "activation"

    def layout(self, axes: str) -> dict[str, tuple[int, ...]]:
        """`gate`: (batch…, in…, experts)."""
        return {"gate": axes_of_a(axes)}

    def prototypes(self, arrays: Mapping[str, Array], axes: str) -> Array:
        """Returns `gate`."""
        del axes
        return arrays["gate"]


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Gate(_Prototypes):
    """A linear gate that is trained, as in mixtures of LoRA experts (LoRAMoE, arXiv:2312.09979; MixLoRA, 2404.15159).

        c = softmax over the top_k of x·gate / temperature, 0 for the other experts

    >>> Gate(top_k=2, balance=0.01)
    Gate(top_k=2, balance=0.01)

    Attributes:
      top_k: how many experts each token has; None for all.
      temperature: the larger, the more equal the weights.
      renormalize: whether the softmax is over the chosen experts only, so that their weights have the sum 1. With
        `top_k=1` the weight is then constant, and the gate has no gradient: use False, as Switch Transformers do.
      balance: the factor of `many.load_balance`. The gradient of the term is added to that of the gate, for each use
        of a kernel; the value of the loss does not contain it. Other than 0, it excludes forward-mode derivatives.
    """

    top_k: int | None = None
    temperature: float = 1.0
    renormalize: bool = True
    balance: float = 0.0

    def __post_init__(self) -> None:
        _check_top_k(self)
        object.__setattr__(self, "renormalize", flag("renormalize", self.renormalize))
        object.__setattr__(self, "balance", number("balance", self.balance))

    def weights(self, logits: Array) -> Array:
        """Returns the softmax over the experts with the largest logits."""
        scaled = logits if self.temperature == 1 else logits / self.temperature
        if self.renormalize:
            weights = _top_k_softmax(scaled, self.top_k)
        else:
            weights = jnp.where(_in_top_k(scaled, self.top_k), jax.nn.softmax(scaled), 0)
        if not self.balance:
            return weights
        return _with_gradient_of(weights, self.balance * load_balance(jax.nn.softmax(scaled), weights > 0))


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class SigmoidGate(_Prototypes):
    """A linear gate with a sigmoid for each expert: c = sigmoid(x·gate).

    With one expert, whose factors are frozen, it is the training of PHATGOOSE (Muqeeth et al. 2024, arXiv:2402.05859).

    >>> SigmoidGate()
    SigmoidGate()
    """

    def weights(self, logits: Array) -> Array:
        """Returns the sigmoid of each logit."""
        return jax.nn.sigmoid(logits)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class PHATGOOSE(_Prototypes):
    """Routes each token by the gates that its experts were trained with (Muqeeth et al. 2024, arXiv:2402.05859).

        c = softmax over the top_k of v̄_e·x̄ / √inputs, 0 for the other experts

    v̄ and x̄ are the gate of an expert and the activation of a token, with mean 0 and standard deviation 1 over the
    inputs. The gates are constants.

    >>> PHATGOOSE(top_k=2)
    PHATGOOSE()

    Attributes:
      top_k: how many experts each token has.
    """

    top_k: int = 2
    standardizes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_top_k(self)

    def prototypes(self, arrays: Mapping[str, Array], axes: str) -> Array:
        """Returns v̄ / √inputs. As its mean is 0, that of the activation does not matter."""
        gate = lax.stop_gradient(arrays["gate"])
        gate = gate.astype(widest(gate.dtype, jnp.float32))
        inputs = [at for at, axis in enumerate(axes_of_a(axes)) if axis in axes_with(axes, "i")]
        centered = gate - gate.mean(inputs, keepdims=True)
        deviation = jnp.std(gate, axis=inputs, keepdims=True) * math.sqrt(math.prod(gate.shape[at] for at in inputs))
        return centered / jnp.where(deviation == 0, 1, deviation)

    def weights(self, logits: Array) -> Array:
        """Returns the softmax over the experts with the largest logits."""
        return _top_k_softmax(logits, self.top_k)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Arrow(_Prototypes):
    """Routes each token by the direction of the inputs that each expert amplifies most (arXiv:2405.11157).

        c = softmax over the top_k of |x·p_e| / temperature, 0 for the other experts

    p_e is the first left singular vector of A_e·B_e, (Ostapenko et al. 2024); nothing is trained. As in PEFT, the
    activation is not normalized.

    >>> Arrow(top_k=2)
    Arrow(top_k=2)

    Attributes:
      top_k: how many experts each token has.
      temperature: the larger, the more equal the weights.
    """

    top_k: int = 3
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_top_k(self)

    def prototypes(self, arrays: Mapping[str, Array], axes: str) -> Array:
        """Returns `gate`, as a constant."""
        return lax.stop_gradient(super().prototypes(arrays, axes))

    def weights(self, logits: Array) -> Array:
        """Returns the softmax over the experts with the largest magnitudes."""
        similarity = jnp.abs(logits)
        return _top_k_softmax(similarity if self.temperature == 1 else similarity / self.temperature, self.top_k)


ROUTERS = {router.__name__: router for router in (Arrow, Constant, Gate, Given, PHATGOOSE, SigmoidGate)}


def load_balance(probabilities: Array, chosen: Array) -> Array:
    """Returns the load-balancing term of Switch Transformers (Fedus et al. 2021, arXiv:2101.03961).

        experts · Σ_e f_e·P_e

    f_e is the share of the choices that are of expert e, a constant in the gradient, and P_e its mean probability. The
    term is 1 if the load is balanced, and at most the number of experts.

    >>> import jax.numpy as jnp
    >>> load_balance(jnp.array([[0.9, 0.1], [0.1, 0.9]]), jnp.array([[True, False], [False, True]]))
    Array(1., dtype=float32)

    Args:
      probabilities: (tokens…, experts), the softmax of the gate's logits.
      chosen: (tokens…, experts), booleans for the experts of each token.

    Returns:
      A scalar.
    """
    tokens, experts = range(probabilities.ndim - 1), probabilities.shape[-1]
    share = lax.stop_gradient(chosen.astype(probabilities.dtype).mean(tokens))
    return experts * jnp.sum(share / jnp.maximum(share.sum(), 1e-9) * probabilities.mean(tokens))


@jax.custom_vjp
def _with_gradient_of(x: Array, loss: Array) -> Array:
    """Returns `x`; the gradient of `loss` is added to any gradient that is propagated through it."""
    del loss
    return x


_with_gradient_of.defvjp(lambda x, loss: (x, loss), lambda loss, cotangent: (cotangent, jnp.ones_like(loss)))


def _in_top_k(logits: Array, top_k: int | None) -> Array:
    """Returns for each expert whether it is among the `top_k` with the largest logits; the first of equal ones is."""
    experts = logits.shape[-1]
    if top_k is None or top_k >= experts:
        return jnp.ones(logits.shape, bool)
    chosen = lax.top_k(logits, top_k)[1]
    return (chosen[..., None] == lax.expand_dims(jnp.arange(experts, dtype=chosen.dtype), range(chosen.ndim))).any(-2)


def _top_k_softmax(logits: Array, top_k: int | None) -> Array:
    if top_k is None or top_k >= logits.shape[-1]:
        return jax.nn.softmax(logits)
    return jax.nn.softmax(logits, where=_in_top_k(logits, top_k))


def _check_top_k(router: Gate | PHATGOOSE | Arrow) -> None:
    if router.top_k is not None:
        object.__setattr__(router, "top_k", integer("top_k", router.top_k, least=1))
    temperature = number("temperature", getattr(router, "temperature", 1.0))
    if temperature <= 0:
        raise SpecError(f"Expected a positive temperature; got temperature={temperature}.")
