"""DoRA: each output's direction by low rank, its length by a magnitude; against the formula with everything formed."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from law import assert_close, normal, total

import lora_jax as lj
from lora_jax import testing


def dora(w: jax.Array, part: lj.Adapter) -> jax.Array:
    """The paper's formula, everything formed; the norm is a constant of the gradient."""
    axes = part.axes
    batch, inputs, outputs = ([at for at, role in enumerate(axes) if role == its] for its in "bio")
    names = "".join(chr(ord("a") + at) for at in range(len(axes)))
    pick = lambda its: "".join(names[at] for at in its)  # noqa: E731
    ab = jnp.einsum(
        f"{pick(batch)}{pick(inputs)}z,{pick(batch)}z{pick(outputs)}->{names}", part.a, part.b, precision="highest"
    )
    whole = w + part.variant.scale * ab
    length = lax.stop_gradient(jnp.sqrt(jnp.sum(whole**2, inputs, keepdims=True)))
    return whole / length * jnp.expand_dims(part.magnitude, inputs) if batch == sorted(batch) else whole
