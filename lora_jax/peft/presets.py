"""Mappings for models that exist in both frameworks. They are dicts: change or add rows as needed.

The order of rows matters, as in a spec: `{"**/my_head/kernel": ..., **presets.bert()}` puts a row first.

| preset | the JAX model | the torch model |
|---|---|---|
| `bert()` | `FlaxBert…` of `transformers` 4 | `Bert…` |
| `roberta()` | `FlaxRoberta…` of `transformers` 4 | `Roberta…` |
| `gpt2()` | `FlaxGPT2…` of `transformers` 4 | `GPT2…` |
| `vit()` | `FlaxViT…` of `transformers` 4 | `ViT…` |
| `clip()` | `FlaxCLIP…` of `transformers` 4 | `CLIP…` |
| `whisper()` | `FlaxWhisper…` of `transformers` 4 | `Whisper…` |
| `bart()` | `FlaxBart…` of `transformers` 4 | `Bart…` |
| `smollm2()` | `Llama` of `examples/smollm2.py` | `LlamaForCausalLM` |
| `t5()` | `FlaxT5…` of `transformers` 4 | `T5…` |
| `tunix_llama3()`, `tunix_qwen3()` | `Llama3`, `Qwen2`, `Qwen3` of Tunix | `Llama…`, `Qwen2…`, `Qwen3ForCausalLM` |
| `tunix_gemma1()`, `tunix_gemma2()` | `Gemma` of Tunix | `Gemma…`, `Gemma2ForCausalLM` |
| `tunix_gemma3()` | `Gemma3` of Tunix | `Gemma3ForCausalLM` |
| `bonsai_llama3()`, `bonsai_qwen3()` | `Llama`, `Qwen3` of Bonsai | `Llama…`, `Qwen3ForCausalLM` |
| `bonsai_gemma3()` | `Gemma3Model` of Bonsai | `Gemma3ForConditionalGeneration` |
"""

from __future__ import annotations

from ._presets_nnx import bonsai_gemma3 as bonsai_gemma3
from ._presets_nnx import bonsai_llama3 as bonsai_llama3
from ._presets_nnx import bonsai_qwen3 as bonsai_qwen3
from ._presets_nnx import tunix_gemma1 as tunix_gemma1
from ._presets_nnx import tunix_gemma2 as tunix_gemma2
from ._presets_nnx import tunix_gemma3 as tunix_gemma3
from ._presets_nnx import tunix_llama3 as tunix_llama3
from ._presets_nnx import tunix_qwen3 as tunix_qwen3
from ._row import Row
from ._rows import conv, embedding, layer, linear, norm, vector

__all__ = ["bart", "bert", "clip", "gpt2", "roberta", "smollm2", "t5", "vit", "whisper"]
__all__ += ["bonsai_gemma3", "bonsai_llama3", "bonsai_qwen3"]
__all__ += ["tunix_gemma1", "tunix_gemma2", "tunix_gemma3", "tunix_llama3", "tunix_qwen3"]


def bert(*, head: str | None = "cls.predictions.decoder") -> dict[str, Row]:
    """Returns the mapping of BERT.

    >>> bert()["{**}/attention/self/query/kernel"].parts[0].module
    '{**}.attention.self.query'

    Args:
      head: the module of the output head that is tied to the word embeddings; None if the model has none. Used only
        if the word embeddings are adapted.

    Returns:
      The mapping.
    """
    return _encoder(head) | {"{**}/predictions/bias": vector("{**}.predictions.decoder")}


def roberta(*, head: str | None = "lm_head.decoder") -> dict[str, Row]:
    """Returns the mapping of RoBERTa.

    >>> roberta()["{**}/classifier/out_proj/kernel"].parts[0].module
    '{**}.classifier.out_proj'

    Args:
      head: as in `bert`.

    Returns:
      The mapping.
    """
    names = ("classifier/dense", "classifier/out_proj", "lm_head/dense")
    mapping = _encoder(head) | _same(*names) | norm("{**}/lm_head/layer_norm", "{**}.lm_head.layer_norm")
    return mapping | {"{**}/lm_head/bias": vector("{**}.lm_head.decoder")}


def gpt2(*, head: str | None = "lm_head") -> dict[str, Row]:
    """Returns the mapping of GPT-2. Its kernels are `(out, in)` in Flax, and `Conv1D` modules in torch.

    >>> row = gpt2()["{**}/c_attn/kernel"]
    >>> row.axes, row.conv1d
    ('oi', True)

    Args:
      head: as in `bert`.

    Returns:
      The mapping.
    """
    mapping = {"{**}/wte/embedding": embedding("{**}.wte", head=head), "{**}/wpe/embedding": embedding("{**}.wpe")}
    for name in ("c_attn", "q_attn", "c_proj", "c_fc"):
        mapping |= layer(f"{{**}}/{name}", f"{{**}}.{name}", conv1d=True, axes="oi")
    for name in ("ln_1", "ln_2", "ln_cross_attn", "ln_f"):
        mapping |= norm(f"{{**}}/{name}", f"{{**}}.{name}")
    return mapping


def vit(*, transformers: int = 5) -> dict[str, Row]:
    """Returns the mapping of ViT, whose modules have other names in `transformers` 5.

    >>> row = "{**}/encoder/layer/{i}/attention/attention/query/kernel"
    >>> [vit(transformers=version)[row].parts[0].module for version in (4, 5)]
    ['{**}.encoder.layer.{i}.attention.attention.query', '{**}.layers.{i}.attention.q_proj']

    Args:
      transformers: the major version of `transformers` with the torch model.

    Returns:
      The mapping.
    """
    projection = "embeddings/patch_embeddings/projection"
    names = {
        "attention/attention/query": "attention.q_proj",
        "attention/attention/key": "attention.k_proj",
        "attention/attention/value": "attention.v_proj",
        "attention/output/dense": "attention.o_proj",
        "intermediate/dense": "mlp.fc1",
        "output/dense": "mlp.fc2",
    }
    mapping = _same(projection, "pooler/dense", "classifier")
    mapping[f"{{**}}/{projection}/kernel"] = conv("{**}." + projection.replace("/", "."))
    layers = "{**}.layers.{i}" if transformers >= 5 else "{**}.encoder.layer.{i}"
    for path, module in names.items():
        name = module if transformers >= 5 else path.replace("/", ".")
        mapping |= layer("{**}/encoder/layer/{i}/" + path, f"{layers}.{name}")
    for name in ("layernorm_before", "layernorm_after"):
        mapping |= norm("{**}/encoder/layer/{i}/" + name, f"{layers}.{name}")
    for name in ("cls_token", "position_embeddings"):
        mapping[f"{{**}}/embeddings/{name}"] = vector("{**}.embeddings", parameter=name, keep_shape=True)
    return mapping | norm("{**}/layernorm", "{**}.layernorm")


def clip() -> dict[str, Row]:
    """Returns the mapping of CLIP, of both encoders and their projections.

    >>> clip()["{**}/self_attn/q_proj/kernel"].parts[0].module
    '{**}.self_attn.q_proj'

    Returns:
      The mapping.
    """
    tables = {name: embedding(f"{{**}}.{name}") for name in ("token_embedding", "position_embedding")}
    mapping = {f"{{**}}/{name}/embedding": row for name, row in tables.items()}
    mapping["{**}/patch_embedding/kernel"] = conv("{**}.patch_embedding")
    mapping["{**}/class_embedding"] = vector("{**}", parameter="class_embedding")
    mapping["logit_scale"] = vector("", parameter="logit_scale", keep_shape=True)
    mapping |= _same(*_ATTENTION, "mlp/fc1", "mlp/fc2", "visual_projection", "text_projection")
    for name in ("layer_norm1", "layer_norm2", "pre_layrnorm", "post_layernorm", "final_layer_norm"):
        mapping |= norm(f"{{**}}/{name}", f"{{**}}.{name}")
    return mapping


def whisper(*, head: str | None = "proj_out") -> dict[str, Row]:
    """Returns the mapping of Whisper.

    >>> whisper()["{**}/conv1/kernel"].kind
    'conv'

    Args:
      head: as in `bert`.

    Returns:
      The mapping.
    """
    mapping = {"{**}/embed_tokens/embedding": embedding("{**}.embed_tokens", head=head)}
    mapping["{**}/embed_positions/embedding"] = embedding("{**}.embed_positions")
    for name in ("conv1", "conv2"):
        mapping |= layer(f"{{**}}/{name}", f"{{**}}.{name}") | {f"{{**}}/{name}/kernel": conv(f"{{**}}.{name}")}
    mapping |= _same(*_ATTENTION, *(name.replace("self", "encoder") for name in _ATTENTION), "fc1", "fc2")
    for name in ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm", "layer_norm"):
        mapping |= norm(f"{{**}}/{name}", f"{{**}}.{name}")
    return mapping


def bart() -> dict[str, Row]:
    """Returns the mapping of BART, without its embedding: torch has one each in encoder, decoder and head, all tied.

    >>> bart()["{**}/encoder_attn/q_proj/kernel"].parts[0].module
    '{**}.encoder_attn.q_proj'

    Returns:
      The mapping.
    """
    mapping = {"{**}/embed_positions/embedding": embedding("{**}.embed_positions")}
    mapping |= _same(*_ATTENTION, *(name.replace("self", "encoder") for name in _ATTENTION), "fc1", "fc2")
    for name in ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm", "layernorm_embedding"):
        mapping |= norm(f"{{**}}/{name}", f"{{**}}.{name}")
    return mapping


def smollm2(*, head: str | None = "lm_head") -> dict[str, Row]:
    """Returns the mapping of the Llama of `examples/smollm2.py`, with layers that are stacked or not.

    >>> [row.parts[0].module for path, row in smollm2().items() if path.endswith("query/kernel")]
    ['model.layers.{i}.self_attn.q_proj', 'model.layers.{i}.self_attn.q_proj']

    Args:
      head: as in `bert`.

    Returns:
      The mapping.
    """
    names = {
        "attention/query": "self_attn.q_proj",
        "attention/key": "self_attn.k_proj",
        "attention/value": "self_attn.v_proj",
        "attention/out": "self_attn.o_proj",
        "mlp/gate": "mlp.gate_proj",
        "mlp/up": "mlp.up_proj",
        "mlp/down": "mlp.down_proj",
    }
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    mapping = {"embed/embedding": embedding("model.embed_tokens", head=head)} | norm("norm", "model.norm")
    for layers in ("layers", "layers/{i}"):  # a path without {i} is a stack
        for path, module in names.items():
            mapping |= layer(f"{layers}/{path}", f"model.layers.{{i}}.{module}")
        for path, module in norms.items():
            mapping |= norm(f"{layers}/{path}", f"model.layers.{{i}}.{module}")
    return mapping


def t5() -> dict[str, Row]:
    """Returns the mapping of T5, whose torch modules have the same names.

    The table has no row: the torch model has it in three modules, the embeddings of the encoder and of the decoder and
    the head.

    >>> t5()["{**}/SelfAttention/q/kernel"].parts[0].module
    '{**}.SelfAttention.q'

    Returns:
      The mapping.
    """
    names = [f"{attention}/{name}" for attention in ("SelfAttention", "EncDecAttention") for name in "qkvo"]
    names += [*(f"DenseReluDense/{name}" for name in ("wi", "wi_0", "wi_1", "wo")), "lm_head"]
    mapping = {f"{{**}}/{name}/kernel": linear("{**}." + name.replace("/", ".")) for name in names}
    mapping["{**}/relative_attention_bias/embedding"] = embedding("{**}.relative_attention_bias")
    for name in ("layer_norm", "final_layer_norm"):
        mapping[f"{{**}}/{name}/weight"] = vector(f"{{**}}.{name}", parameter="weight")
    return mapping


_ATTENTION = [f"self_attn/{name}_proj" for name in ("q", "k", "v", "out")]


def _encoder(head: str | None) -> dict[str, Row]:
    """Returns the rows that BERT and RoBERTa share: their modules have the same names in both frameworks."""
    tables = {name: embedding(f"{{**}}.{name}") for name in ("position_embeddings", "token_type_embeddings")}
    tables["word_embeddings"] = embedding("{**}.word_embeddings", head=head)
    names = [f"attention/self/{name}" for name in ("query", "key", "value")]
    names += ["attention/output/dense", "intermediate/dense", "output/dense", "pooler/dense", "transform/dense"]
    mapping = {f"{{**}}/{name}/embedding": row for name, row in tables.items()}
    return (
        mapping
        | _same(*names, "seq_relationship", "classifier", "qa_outputs")
        | norm("{**}/LayerNorm", "{**}.LayerNorm")
    )


def _same(*names: str) -> dict[str, Row]:
    """Returns the rows of linear layers whose torch modules have the same names."""
    mapping: dict[str, Row] = {}
    for name in names:
        mapping |= layer(f"{{**}}/{name}", "{**}." + name.replace("/", "."))
    return mapping
