"""Writes `tests/data/minilm_reference.npz`: hidden states of `transformers`' BertModel on the published weights.

Run it in the environment of `make test-oracle`: `PYTHONPATH=examples python tests/oracle/make_minilm_reference.py`.
The file holds `ids` and `mask`, both `(sentences, tokens)`, and `hidden`, `(sentences, tokens, 384 // STRIDE)`,
float32: every `STRIDE`-th channel of the last layer's hidden states, enough to notice a wrong weight, small to commit.
"""

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

import minilm

REFERENCE = Path(__file__).parent.parent / "data" / "minilm_reference.npz"
STRIDE = 16
SENTENCES = (
    "What is an adapter ?",
    "How many parameters does a matrix of rank eight have , and why are there fewer of them than of a full one ?",
    "Who wrote \u201c Ein Brief \u201d in 1902 ?",
    "naïve café",
    "?",
    "It rained all night, the river rose, and by the morning nobody could tell where the road had been.",
)


def bert_model() -> BertModel:
    """`transformers`' BertModel in evaluation mode, with exactly the weights that `minilm` loads."""
    weights = minilm.installed_file(minilm.DISTRIBUTION, minilm.WEIGHTS)
    sizes = json.loads((weights.parent / "config.json").read_text())
    model = BertModel(BertConfig(**sizes)).eval()
    tensors = {name: torch.from_numpy(array.copy()) for name, array in minilm.load_file(weights).items()}
    left_over = model.load_state_dict(tensors, strict=False)
    # `position_ids` is in the file but is not a parameter of current versions of BertModel.
    assert not left_over.missing_keys, left_over
    assert set(left_over.unexpected_keys) <= {"embeddings.position_ids"}, left_over
    return model


def hidden_states(model: BertModel, ids: NDArray[np.integer], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The last layer's hidden states, `(batch, tokens, 384)`, for `ids` and `mask` of shape `(batch, tokens)`."""
    with torch.no_grad():
        out = model(torch.from_numpy(ids.astype(np.int64)), attention_mask=torch.from_numpy(mask.astype(np.int64)))
    return out.last_hidden_state.numpy()


def tokens_of(sentences: tuple[str, ...]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Token ids and mask of some sentences, both `(sentences, tokens)`, padded to the longest."""
    tokenizer = Tokenizer.from_file(str(minilm.installed_file(minilm.DISTRIBUTION, minilm.TOKENIZER)))
    tokenizer.enable_padding()  # to the longest, while the file's settings pad to 128
    encodings = tokenizer.encode_batch(list(sentences))
    ids = np.array([encoding.ids for encoding in encodings], np.int32)
    return ids, np.array([encoding.attention_mask for encoding in encodings], bool)


if __name__ == "__main__":
    ids, mask = tokens_of(SENTENCES)
    hidden = hidden_states(bert_model(), ids, mask)[..., ::STRIDE]
    REFERENCE.parent.mkdir(exist_ok=True)
    np.savez_compressed(REFERENCE, ids=ids, mask=mask, hidden=hidden)
    print(f"{REFERENCE.name}: hidden states {hidden.shape}, {REFERENCE.stat().st_size:,} bytes")
