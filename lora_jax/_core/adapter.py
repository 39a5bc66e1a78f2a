"""`Adapter`: the trainable arrays of one kernel, with the variant and the roles of the kernel's axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import flax.serialization
import jax
from jax.tree_util import GetAttrKey

from .._errors import AdapterError, LoRAError
from . import display
from .variant import Variant


@jax.tree_util.register_pytree_with_keys_class
class Adapter:
    """The trainable arrays of one kernel. The variant and the axes are static.

    A pytree whose leaves are the arrays, by name.

    >>> import jax.numpy as jnp
    >>> from lora_jax import LoRA
    >>> adapter = Adapter(LoRA(rank=2, alpha=4), "io", a=jnp.zeros((3, 2)), b=jnp.zeros((2, 5)))
    >>> adapter.a.shape, adapter.variant.scale
    ((3, 2), 2.0)

    Attributes:
      variant: the method with its hyperparameters, such as `LoRA(rank=8, alpha=16)`.
      axes: the role of each of the kernel's axes, such as `"bio"`.
      arrays: the arrays by name; each is also an attribute. For `LoRA`: `a`, `(batch…, in…, rank)`, and `b`,
        `(batch…, rank, out…)`.
    """

    __slots__ = ("arrays", "axes", "variant")

    def __init__(self, variant: Variant, axes: str, **arrays: Any) -> None:
        self.variant = variant
        self.axes = axes
        self.arrays = dict(sorted(arrays.items()))

    def __getattr__(self, name: str) -> Any:
        if name in Adapter.__slots__ or name not in self.arrays:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self.arrays[name]

    def __repr__(self) -> str:
        arrays = "".join(f", {name}={_summary(array)}" for name, array in self.arrays.items())
        return f"Adapter({self.variant}, {self.axes!r}{arrays})"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        # Not `_repr_html_`, which Treescope would show below what it shows itself.
        del include, exclude  # IPython selects
        return {"text/plain": repr(self), "text/html": display.table(self.variant, self.axes, self.arrays).html()}

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        texts = display.described(self.variant, self.axes, self.arrays)
        comments = {name: text.line for name, text in texts.items()}
        summary = f"{self.variant}, {self.axes!r}"
        return display.tree_node(self, summary, self.arrays, path, subtree_renderer, comments)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[GetAttrKey, Any]], Any]:
        """Returns the arrays by name, and the static data."""
        children = [(GetAttrKey(name), array) for name, array in self.arrays.items()]
        return children, (self.variant, self.axes, tuple(self.arrays))

    @classmethod
    def tree_unflatten(cls, static: Any, children: Sequence[Any]) -> Self:
        """Rebuilds an adapter; not checked, as JAX also unflattens placeholders."""
        variant, axes, names = static
        return cls(variant, axes, **dict(zip(names, children, strict=True)))


# `flax.serialization` stores the arrays by name. The variant and the axes come from the target.
flax.serialization.register_serialization_state(
    Adapter,
    lambda adapter: flax.serialization.to_state_dict(adapter.arrays),
    lambda adapter, state: Adapter(
        adapter.variant, adapter.axes, **flax.serialization.from_state_dict(adapter.arrays, state)
    ),
)

Adapters = Mapping[str, Adapter]


def check_adapter(adapter: Any, advice: str, error: type[LoRAError] = AdapterError) -> None:
    """Raises `error` unless `adapter` is a mapping from paths to `Adapter`. Gradients of an adapter pass."""
    if isinstance(adapter, Mapping):
        wrong = [f"{kind_of(x)} at {path!r}" for path, x in adapter.items() if not isinstance(x, Adapter)]
    else:
        wrong = [kind_of(adapter)]
    if wrong:
        raise error(
            f"Expected an adapter: a dict from paths to `Adapter`, as `init` returns; got {wrong[0]}.\n  {advice}"
        )


def kind_of(x: Any) -> str:
    """Returns what a value is, for an error: its class, or that it is an array, whose class is JAX's own."""
    return "an array" if isinstance(x, jax.Array) else type(x).__name__


def _summary(array: Any) -> str:
    shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
    return repr(array) if shape is None or dtype is None else f"{dtype}{list(shape)}"
