"""Targets: keys of a spec that select all leaves of a kind, independent of their names.

The kind of a leaf is determined from the traced model, so `init` needs `kernels=`; `adapt` traces the model itself. As
with patterns, the first key that matches a leaf decides. `kernels(...)[path].kind` is the kind of a leaf.

| target | selects |
|---|---|
| `all_linear` | `attention` and `mlp`: linear layers except the output head, as PEFT's `all-linear`; not embeddings |
| `attention` | the projections of attention: query, key, value and output |
| `mlp` | all other linear kernels except the output head: of MLPs, experts, routers and recurrent cells |
| `output_head` | the kernel that computes the model's output, such as logits |
| `embeddings` | tables for lookups by index or one-hot product, also if tied to the output head |
| `convolutions` | convolution kernels, also of grouped convolutions |
| `biases` | vectors that are added, except those of norm layers |
| `norms` | vectors that multiply, such as scales of norm layers, and the biases after them |

Attention is two consecutive contractions of activations: of queries with keys, then of the scores with values. A custom
kernel with query, key and value operands counts, too. A linear kernel that the program does not show to be part of
attention, such as one before the query projection, belongs to it if a segment of its path is `attention`, `attn`,
`cross_attention`, `cross_attn`, `self_attention` or `self_attn`.

The output head is the only linear kernel whose product is a result of the model and reaches no other kernel. An encoder
that returns its residual stream has none. If several kernels satisfy this, or none does (a loss with an auxiliary loss,
generated tokens), a linear kernel is an output head if a segment of its path is `classifier`, `embed_out`, `head`,
`lm_head`, `logits`, `logits_dense`, `output_head` or `score`.

>>> import jax, jax.numpy as jnp, lora_jax as lj
>>> params = {"up": jnp.ones((4, 8)), "norm": jnp.ones(8), "out": jnp.ones((8, 3))}
>>> apply = lambda p, x: jnp.tanh(x @ p["up"]) * p["norm"] @ p["out"]
>>> found = lj.kernels(apply, params, jnp.ones((2, 4)))
>>> {path: kernel.kind for path, kernel in found.items()}
{'norm': 'norm', 'out': 'head', 'up': 'mlp'}
>>> lj.spec(found, {lj.targets.all_linear: lj.LoRA(rank=2, alpha=4), lj.targets.norms: lj.Full()})
{'norm': Full(), 'up': LoRA(rank=2, alpha=4, axes='io')}
"""

from ._core.targets import Target as Target
from ._core.targets import all_linear as all_linear
from ._core.targets import attention as attention
from ._core.targets import biases as biases
from ._core.targets import convolutions as convolutions
from ._core.targets import embeddings as embeddings
from ._core.targets import mlp as mlp
from ._core.targets import norms as norms
from ._core.targets import output_head as output_head

__all__ = [
    "Target",
    "all_linear",
    "attention",
    "biases",
    "convolutions",
    "embeddings",
    "mlp",
    "norms",
    "output_head",
]
