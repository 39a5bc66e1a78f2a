"""Compares names of parameters in two frameworks, as bags of words in which synonyms are equal."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Sequence

Words = frozenset[str]

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# Words that say nothing, and words for the same thing; a word may stand for several.
_NOISE = "proj projection dense linear einsum layer layers model block blocks h params kernel weight w transformer"
_SYNONYMS = {
    "attention": "attn mha",
    "mlp": "ffn ffw ff feed forward feedforward",
    "norm": "layernorm layrnorm rmsnorm ln rms",
    "q": "query wq",
    "k": "key wk",
    "v": "value wv",
    "o": "out output vec wo",
    "q k v": "qkv wqkv",
    "k v": "kv",
    "gate up": "gating gateup",
    "embed": "embedding embeddings embedder emb",
    "token": "tokens tok word words",
    "position": "positions pos positional",
    "token embed": "wte",
    "position embed": "wpe",
}
_MEANING = {word: meaning.split() for meaning, words in _SYNONYMS.items() for word in words.split()}
_MEANING |= {word: [] for word in _NOISE.split()}
_BIAS, _SCALE = {"bias", "b", "beta"}, {"scale", "weight", "w", "gamma", "g"}
_LEAVES = _BIAS | _SCALE | {"kernel", "embedding"}
_PLACEHOLDER = re.compile(r"\{\w+\}")


def words(name: str) -> list[str]:
    """Returns the words of a name, with synonyms replaced and without those that say nothing.

    >>> words("attn_vec_einsum"), words("kv_einsum"), words("LayerNorm")
    (['attention', 'o'], ['k', 'v'], ['norm'])
    """
    name = _PLACEHOLDER.sub("", name).replace("c_attn", "attn_qkv")  # GPT-2's
    found = [word.lower() for word in _WORD.findall(name)]
    return [meaning for word in found for meaning in _MEANING.get(word, [word])]


def owner(path: str) -> str:
    """Returns the path of the layer that has a leaf.

    >>> owner("layers/{i}/attn/q_proj/kernel"), owner("embedder/input_embedding"), owner("attn/q_bias")
    ('layers/{i}/attn/q_proj', 'embedder/input_embedding', 'attn/q')
    """
    before, _, last = path.rpartition("/")
    if last in _LEAVES:
        return before
    stem, _, end = last.rpartition("_")
    return f"{before}/{stem}".lstrip("/") if stem and end in _BIAS else path


def vector_parameter(path: str) -> str | None:
    """Returns the torch parameter that a leaf of one axis is, by its name: a bias or a weight."""
    last = path.rpartition("/")[2].rpartition("_")[2]
    return "bias" if last in _BIAS else "weight" if last in _SCALE else None


class Names:
    """The names of one framework, with what their words mean beside the others.

    A block with one norm before its attention and one before its MLP often calls the latter `post_attention_layernorm`;
    one with four norms has another one of this name.
    """

    def __init__(self, names: Iterable[str], separator: str) -> None:
        self.separator = separator
        all_words = [self._last(name) for name in names]
        self.has_norm_before_mlp = any({"norm", "mlp"} <= found and "post" not in found for found in all_words)

    def bag(self, name: str) -> collections.Counter[str]:
        """Returns the words of a name, with a weight for each: the last part of the name counts twice."""
        parts = self._parts(name)
        bag = collections.Counter(word for part in parts[:-1] for word in words(part))
        for word in self._norm(self._last(name), bag):
            bag[word] += 2
        return bag

    def last(self, name: str) -> Words:
        """Returns the words of the last part of a name."""
        return frozenset(self._last(name))

    def _last(self, name: str) -> set[str]:
        parts = self._parts(name)
        return set(words(parts[-1])) if parts else set()

    def _parts(self, name: str) -> list[str]:
        return [part for part in name.split(self.separator) if words(part)]

    def _norm(self, last: set[str], before: collections.Counter[str]) -> set[str]:
        if "norm" not in last or "attention" in before or "mlp" in before:
            return last
        if last == {"input", "norm"}:
            return {"pre", "attention", "norm"}
        if {"post", "attention"} <= last and not self.has_norm_before_mlp:
            return {"pre", "mlp", "norm"}
        if last & {"attention", "mlp"} and not last & {"pre", "post"}:
            return last | {"pre"}
        return last


def similarity(one: collections.Counter[str], other: collections.Counter[str]) -> float:
    """Returns the share of common words, from 0 to 1."""
    total = one.total() + other.total()
    return 2 * (one & other).total() / total if total else 0.0


def is_table(name: str) -> bool:
    """Whether the last part of a name is that of an embedding.

    >>> is_table("embedder/input_embedding"), is_table("model.embed_tokens"), is_table("patch_embeddings.projection")
    (True, True, False)
    """
    return "embed" in words(re.split(r"[./]", name)[-1])


def in_order(kinds: Sequence[Words], order: str) -> list[int] | None:
    """Returns where each word of an order is among some words; None unless each is in exactly one of them.

    >>> in_order([frozenset({"v"}), frozenset({"k"})], "k v")
    [1, 0]
    """
    places = [[at for at, kind in enumerate(kinds) if word in kind] for word in order.split()]
    return [place[0] for place in places] if all(len(place) == 1 for place in places) else None
