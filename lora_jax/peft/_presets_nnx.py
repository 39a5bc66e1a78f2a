"""Mappings for the NNX models of Tunix and Bonsai. They rotate halves of a head, as Hugging Face's models do.

Gemma's norms multiply by 1 + scale in all of them, and the scale of the queries is part of no kernel.
"""

from __future__ import annotations

from collections.abc import Mapping

from ._row import Part, Row
from ._rows import conv, embedding, layer, linear, norm, vector


def tunix_llama3(*, head: str | None = "lm_head", model: str = "model") -> dict[str, Row]:
    """Returns the mapping of Tunix's Llama 3, and of Qwen 2, which has the same names and biases.

    >>> tunix_llama3()["layers/{i}/attn/q_proj/w"].axes
    'ioo'

    Args:
      head: the module of the output head, if it is tied to the embedding. A tree with a leaf for this module has a head
        of its own, and then it is not tied.
      model: the torch module of the decoder, such as `"model.language_model"` in a model that also reads images.

    Returns:
      The mapping.
    """
    mapping = _decoder(model, attention="attn", table="embedder/input_embedding", head=head, scale="w")
    mapping |= _projections(model, "layers/{i}/attn", "w", heads=True) | {"lm_head/w": linear("lm_head")}
    for name in "qkv":
        mapping[f"layers/{{i}}/attn/{name}_bias"] = vector(f"{model}.layers.{{i}}.self_attn.{name}_proj")
    return mapping


def tunix_qwen3(*, head: str | None = "lm_head", model: str = "model") -> dict[str, Row]:
    """Returns the mapping of Tunix's Qwen 3 without experts.

    >>> tunix_qwen3()["layers/{i}/attn/q_norm/w"].parts[0].module
    'model.layers.{i}.self_attn.q_norm'

    Args:
      head: as in `tunix_llama3`.
      model: as in `tunix_llama3`.

    Returns:
      The mapping.
    """
    return tunix_llama3(head=head, model=model)


def tunix_gemma1(*, head: str | None = "lm_head", model: str = "model") -> dict[str, Row]:
    """Returns the mapping of Tunix's Gemma 1, which has two norms in a layer.

    >>> tunix_gemma1()["layers/{i}/pre_ffw_norm/scale"].parts[0].module
    'model.layers.{i}.post_attention_layernorm'

    Args:
      head: as in `tunix_llama3`.
      model: as in `tunix_llama3`.

    Returns:
      The mapping.
    """
    norms = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    return _tunix_gemma(head, model, norms)


def tunix_gemma2(*, head: str | None = "lm_head", model: str = "model") -> dict[str, Row]:
    """Returns the mapping of Tunix's Gemma 2.

    Keys and values are one kernel, `(2, heads, in, features)`, or one with the queries if there are as many of them.

    >>> [part.module for part in tunix_gemma2()["layers/{i}/attn/kv_einsum/w"].parts]
    ['model.layers.{i}.self_attn.k_proj', 'model.layers.{i}.self_attn.v_proj']

    Args:
      head: as in `tunix_llama3`.
      model: as in `tunix_llama3`.

    Returns:
      The mapping.
    """
    return _tunix_gemma(head, model, _GEMMA_NORMS | {"post_attn_norm": "post_attention_layernorm"})


def tunix_gemma3(*, head: str | None = "lm_head", model: str = "model") -> dict[str, Row]:
    """Returns the mapping of Tunix's Gemma 3, without its image encoder.

    >>> tunix_gemma3(model="model.language_model")["final_norm/scale"].parts[0].module
    'model.language_model.norm'

    Args:
      head: as in `tunix_llama3`.
      model: as in `tunix_llama3`.

    Returns:
      The mapping.
    """
    return _tunix_gemma(head, model, _GEMMA_NORMS | {"post_attention_norm": "post_attention_layernorm"})


def bonsai_llama3(*, head: str | None = "lm_head", model: str = "model") -> dict[str, Row]:
    """Returns the mapping of Bonsai's Llama 3.2.

    >>> bonsai_llama3()["layers/{i}/self_attn/q_proj/kernel"].parts[0].module
    'model.layers.{i}.self_attn.q_proj'

    Args:
      head: as in `tunix_llama3`.
      model: as in `tunix_llama3`.

    Returns:
      The mapping.
    """
    mapping = _decoder(model, attention="self_attn", table="embedder/embedding", head=head, scale="scale")
    return mapping | _projections(model, "layers/{i}/self_attn", "kernel") | {"lm_head/kernel": linear("lm_head")}


def bonsai_qwen3(*, head: str | None = None, model: str = "model") -> dict[str, Row]:
    """Returns the mapping of Bonsai's Qwen 3, whose head is a leaf of its own, also in sizes that tie it in torch.

    >>> bonsai_qwen3()["layers/{i}/attn/o_proj/kernel"].axes
    'iio'

    Args:
      head: as in `tunix_llama3`.
      model: as in `tunix_llama3`.

    Returns:
      The mapping.
    """
    mapping = _decoder(model, attention="attn", table="embedder/embedding", head=head, scale="scale")
    mapping |= _projections(model, "layers/{i}/attn", "kernel", heads=True)
    return mapping | {"lm_head/kernel": linear("lm_head")}


def bonsai_gemma3(*, head: str | None = "lm_head", model: str = "model") -> dict[str, Row]:
    """Returns the mapping of Bonsai's Gemma 3, with its image encoder, to `Gemma3ForConditionalGeneration`.

    >>> bonsai_gemma3()["language_model/norm/scale"].parts[0].module
    'model.language_model.norm'

    Args:
      head: as in `tunix_llama3`.
      model: the torch module that has `language_model` and `vision_tower`.

    Returns:
      The mapping.
    """
    text, tower = f"{model}.language_model", "vision_tower"
    mapping = _decoder(
        text,
        attention="self_attn",
        table="embed_tokens/weight/embedding",
        head=head,
        scale="scale",
        root="language_model/",
        final="norm",
    )
    mapping |= _projections(text, "language_model/layers/{i}/self_attn", "kernel")
    images = f"{model}.{tower}"
    mapping[f"{tower}/embeddings/patch_embedding/kernel"] = conv(f"{images}.embeddings.patch_embedding")
    mapping[f"{tower}/embeddings/patch_embedding/bias"] = vector(f"{images}.embeddings.patch_embedding")
    mapping[f"{tower}/embeddings/position_embedding/embedding"] = embedding(f"{images}.embeddings.position_embedding")
    for name in (*(f"self_attn/{name}_proj" for name in ("q", "k", "v", "out")), "mlp/fc1", "mlp/fc2"):
        module = f"{images}.encoder.layers.{{i}}.{name.replace('/', '.')}"
        mapping |= layer(f"{tower}/encoder/layers/{{i}}/{name}", module)
    for name in ("layer_norm1", "layer_norm2"):
        mapping |= norm(f"{tower}/encoder/layers/{{i}}/{name}", f"{images}.encoder.layers.{{i}}.{name}")
    projector = f"{model}.multi_modal_projector.mm_soft_emb_norm"
    mapping["multi_modal_projector/mm_soft_emb_norm/scale"] = vector(projector, parameter="weight")
    return mapping | norm(f"{tower}/post_layernorm", f"{images}.post_layernorm")


_BEFORE_AND_AFTER = ("input", "post_attention", "pre_feedforward", "post_feedforward")
_NORMS = {f"{place}_layernorm": f"{place}_layernorm" for place in _BEFORE_AND_AFTER}


def _decoder(
    model: str,
    *,
    attention: str,
    table: str,
    head: str | None,
    scale: str,
    root: str = "",
    final: str = "final_norm",
    norms: Mapping[str, str] = _NORMS,
) -> dict[str, Row]:
    """Returns the rows of a decoder without those of the projections of its attention."""
    torch_layer, layers = f"{model}.layers.{{i}}", f"{root}layers/{{i}}"
    mapping = {table: embedding(f"{model}.embed_tokens", head=head)}
    mapping[f"{root}{final}/{scale}"] = vector(f"{model}.norm", parameter="weight")
    for path, module in norms.items():
        mapping[f"{layers}/{path}/{scale}"] = vector(f"{torch_layer}.{module}", parameter="weight")
    for name in ("q_norm", "k_norm"):
        mapping[f"{layers}/{attention}/{name}/{scale}"] = vector(f"{torch_layer}.self_attn.{name}", parameter="weight")
    for name in ("gate_proj", "up_proj", "down_proj"):
        mapping[f"{layers}/mlp/{name}/kernel"] = linear(f"{torch_layer}.mlp.{name}")
    return mapping


def _projections(model: str, path: str, leaf: str, *, heads: bool = False) -> dict[str, Row]:
    """Returns the rows of the four projections of an attention, whose kernels may have an axis of heads."""
    axes = {"q_proj": "ioo", "k_proj": "ioo", "v_proj": "ioo", "o_proj": "iio"}
    return {
        f"{path}/{name}/{leaf}": linear(f"{model}.layers.{{i}}.self_attn.{name}", axes=roles if heads else None)
        for name, roles in axes.items()
    }


_GEMMA_NORMS = {
    "pre_attention_norm": "input_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _tunix_gemma(head: str | None, model: str, norms: Mapping[str, str]) -> dict[str, Row]:
    table = "embedder/input_embedding"
    mapping = _decoder(model, attention="attn", table=table, head=head, scale="scale", norms=norms)
    attention, paths = f"{model}.layers.{{i}}.self_attn", "layers/{i}/attn"
    query, key, value = (Part(f"{attention}.{name}_proj") for name in "qkv")
    mapping |= {
        f"{paths}/q_einsum/w": linear(query, axes="oio"),
        f"{paths}/kv_einsum/w": linear([key, value], axes="ooio"),
        f"{paths}/qkv_einsum/w": linear([query, key, value], axes="ooio"),
        f"{paths}/attn_vec_einsum/w": linear(f"{attention}.o_proj", axes="iio"),
    }
    for path, name in {"_query_norm": "q_norm", "_key_norm": "k_norm"}.items():
        mapping[f"{paths}/{path}/scale"] = vector(f"{attention}.{name}", parameter="weight")
    return mapping
