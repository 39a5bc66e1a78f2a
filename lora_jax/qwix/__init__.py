"""Adapters from and to the arrays that Qwix (https://github.com/google/qwix) trains, without importing it.

Qwix puts `{name}_lora_a` and `{name}_lora_b` beside a kernel, in a tree of Linen or in an NNX module. Tunix and MaxText
train and checkpoint these. Their axes depend on the operation in which the model uses the kernel:

| operation | `a` | `b` |
|---|---|---|
| `dot_general` | (batch…, product of inputs, rank) | (batch…, rank, product of outputs) |
| `einsum` | (batch and inputs, in the kernel's order, rank) | (rank, outputs…) |
| `conv_general_dilated` | (spatial axes and inputs, rank) | (rank, outputs) |

A stack of layers (`nn.scan`, `nnx.vmap`) adds its axis to `a` and `b` where the kernel has it. A product of axes is
taken to be in the kernel's order, as in every layer of Flax; shapes do not show another order.
"""

from ._convert import from_qwix as from_qwix
from ._convert import to_qwix as to_qwix

__all__ = ["from_qwix", "to_qwix"]
