"""Targets by name: keys of a spec that stand for all leaves of a kind, whatever the model calls them.

They are told from the traced model, so that `init` needs `kernels=`; `adapt` traces by itself. As with patterns, the
first key that matches a leaf decides. `kernels(...)[path].kind` is the kind of a leaf.

| target | the leaves |
|---|---|
| `all_linear` | `attention` and `mlp`: every linear layer but the output head and embeddings, as PEFT's `all-linear` |
| `attention` | kernels of queries, keys, values and the output projection |
| `mlp` | linear kernels that are none of the others: those of an MLP, of experts and routers, of recurrent cells |
| `output_head` | the kernel whose product is the model's result |
| `embeddings` | tables in which rows are looked up, by index or one-hot product; one that is also the output head |
| `convolutions` | kernels of convolutions, in groups too |
| `biases` | vectors that are added, but those of norms |
| `norms` | vectors that multiply, as the scale of a norm, and the bias after it |

Attention is what is multiplied into scores, and then with values: two contractions of activations, one after the other.
A custom kernel that gets query, key and value counts too. A linear kernel that the program does not show to be
attention, such as one before the query's, is attention if a part of its path is one of `attention`, `attn`,
`cross_attention`, `cross_attn`, `self_attention`, `self_attn`.

The output head is the one linear kernel whose product is a result, and goes into no other kernel; an encoder that
returns its residual stream has none. Where several kernels end in results, or none does (a loss with an auxiliary one,
generated tokens), a linear kernel is an output head if a part of its path is one of `classifier`, `embed_out`, `head`,
`lm_head`, `logits`, `logits_dense`, `output_head`, `score`.

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
