"""TREC question types as text: chats in which SmolLM2 answers with the name of a label, loss masks and exact match.

    system: Classify the question by the kind of its answer: …
    user: Who wrote Hamlet ?
    assistant: human: individual

Questions, split and batches are those of `trec`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray
from tokenizers import Tokenizer

import smollm2
import trec

COARSE = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}
# The second part of a fine label. Names that are missing are words already, such as `animal`.
FINE = {
    "abb": "abbreviation",
    "exp": "expansion",
    "def": "definition",
    "desc": "description",
    "body": "body part",
    "cremat": "creative work",
    "dismed": "disease or medicine",
    "instru": "instrument",
    "lang": "language",
    "techmeth": "technique",
    "termeq": "equivalent term",
    "veh": "vehicle",
    "gr": "group",
    "ind": "individual",
    "mount": "mountain",
    "dist": "distance",
    "ord": "order",
    "perc": "percentage",
    "temp": "temperature",
    "volsize": "size",
}


class Task(NamedTuple):
    """A classification task as text.

    Attributes:
      system: the instruction, which is the system message of every chat.
      answers: the assistant's answer to a question with label `i`, which indexes the label names of `trec`.
      lengths: the padded lengths of its batches, in tokens, which suffice for every question and answer.
    """

    system: str
    answers: tuple[str, ...]
    lengths: tuple[int, ...]


class Texts(NamedTuple):
    """Tokenized chats.

    Attributes:
      tokens: ids of prompt and answer without padding, and the questions' labels.
      prompts: number of tokens of each prompt, `(questions,)`.
      lengths: the padded lengths of batches.
      answer_tokens: number of tokens of the longest answer of the task, with `<|im_end|>`.
    """

    tokens: trec.Tokens
    prompts: NDArray[np.intp]
    lengths: tuple[int, ...]
    answer_tokens: int


class Batch(NamedTuple):
    """Padded chats. The model is trained to predict `targets` from its logits at the positions `at`.

    Attributes:
      ids: prompts and answers, `(batch, tokens)`, padded at the end.
      at: `(batch, answer_tokens)`: positions before each token of the answer; the first is the prompt's last token.
      targets: `(batch, answer_tokens)`: the answer's ids, then `smollm2.END`.
      mask: `(batch, answer_tokens)`, boolean; True up to the first `smollm2.END`. False in rows without a question.
      rows: indices of the questions in the set; empty rows at the end are not included.
    """

    ids: NDArray[np.int32]
    at: NDArray[np.int32]
    targets: NDArray[np.int32]
    mask: NDArray[np.bool_]
    rows: NDArray[np.intp]


def coarse(names: tuple[str, ...]) -> Task:
    """Returns the task of the 6 coarse types, which the instruction lists.

    Args:
      names: the label names of `trec.Trec`.
    """
    *first, last = COARSE.values()
    system = f"Classify the question by the kind of its answer: {', '.join(first)} or {last}."
    return Task(system, tuple(COARSE[name.split(":")[0]] for name in names), lengths=(48, 53, 60, 92))


def fine(names: tuple[str, ...]) -> Task:
    """Returns the task of the 50 fine types, with answers such as `location: city`.

    Args:
      names: the label names of `trec.Trec`.
    """
    pairs = [name.split(":") for name in names]
    answers = tuple(f"{COARSE[kind]}: {FINE.get(detail, detail)}" for kind, detail in pairs)
    return Task("Classify the question by the kind of its answer.", answers, lengths=(38, 43, 50, 82))


def tokenize(questions: trec.Questions, task: Task, tokenizer: Tokenizer) -> Texts:
    """Returns the ids of each question's prompt, its answer and `<|im_end|>`, without padding."""
    answers = [tokenizer.encode(f"{answer}<|im_end|>").ids for answer in task.answers]
    chats = [smollm2.chat(question, system=task.system) for question in questions.texts]
    prompts = [encoding.ids for encoding in tokenizer.encode_batch(chats)]
    ids = [prompt + answers[label] for prompt, label in zip(prompts, questions.labels, strict=True)]
    tokens = trec.Tokens(ids, questions.labels)
    return Texts(tokens, np.array([len(prompt) for prompt in prompts]), task.lengths, max(map(len, answers)))


def training_batches(texts: Texts, batch_size: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Yields one epoch of full batches in random order; see `trec.training_batches`."""
    for batch in trec.training_batches(texts.tokens, batch_size, rng, texts.lengths):
        yield _with_answers(texts, batch)


def batches_per_epoch(texts: Texts, batch_size: int) -> int:
    """Returns the number of batches in each epoch of `training_batches`."""
    return trec.batches_per_epoch(texts.tokens, batch_size, texts.lengths)


def ordered_batches(texts: Texts, batch_size: int) -> Iterator[Batch]:
    """Yields every question once, short ones first; the last batch of a length is padded with empty rows."""
    for batch in trec.ordered_batches(texts.tokens, batch_size, texts.lengths):
        yield _with_answers(texts, batch)


def _with_answers(texts: Texts, batch: trec.Batch) -> Batch:
    size, width, filled = len(batch.ids), texts.answer_tokens, len(batch.rows)
    at = np.zeros((size, width), np.int32)
    targets = np.full((size, width), smollm2.END, np.int32)
    mask = np.zeros((size, width), bool)
    at[:filled] = texts.prompts[batch.rows][:, None] - 1 + np.arange(width)
    at = np.minimum(at, batch.ids.shape[1] - 1)  # of a short answer; not in the mask
    for i, row in enumerate(batch.rows):
        answer = texts.tokens.ids[row][texts.prompts[row] :]
        targets[i, : len(answer)] = answer
        mask[i, : len(answer)] = True
    return Batch(batch.ids, at, targets, mask, batch.rows)


def without_answers(batch: Batch) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Returns the prompts of a batch, for `smollm2.generate`.

    Returns:
      Ids, `(batch, tokens)`, with padding in place of the answers, and lengths, `(batch,)`; 1 for an empty row.
    """
    lengths = batch.at[:, 0] + 1
    return np.where(np.arange(batch.ids.shape[1]) < lengths[:, None], batch.ids, smollm2.END), lengths


def cross_entropy(logits: Array, targets: Array, mask: Array) -> Array:
    """Returns the mean cross-entropy of the answers' tokens.

    Args:
      logits: at the positions `at`, `(batch, answer_tokens, vocabulary)`, float32.
      targets: `(batch, answer_tokens)`.
      mask: `(batch, answer_tokens)`, boolean; tokens at which it is False are left out of the mean.

    Returns:
      A scalar, in nats per token.
    """
    log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return -jnp.where(mask, log_likelihood, 0).sum() / mask.sum()


def exact_matches(predicted: NDArray[np.integer], batch: Batch) -> NDArray[np.bool_]:
    """Tells which questions of a batch are answered exactly as expected.

    With `logits.argmax(-1)` at the positions `at`, the result is that of greedy decoding, at the cost of one call:
    each prediction follows the expected tokens, and a decoded answer departs from them at the first one that differs.

    Args:
      predicted: `(batch, answer_tokens)`: generated ids, or the most likely ids at the positions `at`.
      batch: the batch.

    Returns:
      `(questions,)`, without the empty rows.
    """
    return ((predicted == batch.targets) | ~batch.mask).all(-1)[: len(batch.rows)]
