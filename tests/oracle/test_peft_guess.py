"""`peft.guess` against the presets: from names and shapes of torch models, with and without traced axes and values."""

import re
import zlib
from pathlib import Path

import jax
import numpy as np
from bonsai_models import bonsai_case
from test_peft_files import llama_pair, preset_case
from tunix_models import WORD_IDS, tunix_case

import lora_jax as lj
from lora_jax import peft
from lora_jax._core.paths import flatten
from lora_jax.peft._sites import compiled, find, sites, without_own_heads

FLAX = ["bert", "roberta", "gpt2", "vit", "clip", "whisper"]
TUNIX = [("llama3", 2, True), ("llama3", 2, False), ("qwen2", 2, False), ("qwen3", 2, True), ("gemma", 2, True)]
TUNIX += [("gemma", 4, True), ("gemma1", 1, True), ("gemma3", 2, True), ("gemma3", 1, True)]
PAGE = Path(__file__).parents[2] / "docs" / "peft.md"


def cases():
    """The name in the table, the mapping, a function or None, the parameters, and the torch model."""
    for name in FLAX:
        model, tree, mapping, *_ = preset_case(name)
        yield f"`{name}`", mapping, None, tree, model
    for scanned in (True, False):
        apply, params, model = llama_pair(scanned)
        yield "`smollm2`", peft.presets.smollm2(), apply, params, model
    for case in TUNIX:
        mapping, apply, params, model = tunix_case(*case)
        yield "Tunix", mapping, apply, params, model
    for name in ("llama3", "qwen3", "gemma3"):
        mapping, tree, model = bonsai_case(name)
        yield "Bonsai", mapping, None, tree, model


def places(mapping, leaves):
    """What a mapping says of each leaf."""
    rows, found = without_own_heads(compiled(mapping), leaves), {}
    for path, leaf in leaves.items():
        if (row := find(path, rows)) is not None:
            own = sites(path, leaf.shape, row)
            found[path] = [(one.module, one.first, one.last, one.index, one.layout.axes, *said(one)) for one in own]
    return found


def said(site):
    row, part = site.row, site.part
    return row.kind, row.parameter, row.conv1d, row.head, part.interleaved, part.factor, part.of


def judged(guess, mapping, leaves, names=None):
    """The numbers of rows that are sure, likely and unsure, of those wrong and not unsure, and of leaves missed.

    `names` are the true names of torch modules by those in the guess.
    """
    expected, got = places(mapping, leaves), places(guess.mapping, leaves)
    if names is not None:
        got = {path: [(names[module], *rest) for module, *rest in found] for path, found in got.items()}
        got, expected = (
            {path: [without_head(one) for one in of] for path, of in all_.items()} for all_ in (got, expected)
        )
    counts, silent = dict.fromkeys(("sure", "likely", "unsure"), 0), []
    for row in guess.rows:
        right = all(got[path] == expected.get(path) for path in row.paths.values())
        counts[row.confidence] += right or row.confidence == "unsure"
        silent += [row] if not right and row.confidence != "unsure" else []
    return np.array([*counts.values(), len(silent), len(set(expected) - set(got))]), silent


def without_head(place):
    return tuple("head" if at == 8 else one for at, one in enumerate(place))


def guesses(apply, params, state):
    """The guesses from shapes, from shapes and traced axes if there is a function, and from values."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    abstract = jax.eval_shape(lambda: params)
    yield "shapes", peft.guess(abstract, shapes)
    if apply is not None:
        yield "shapes and axes", peft.guess(abstract, shapes, kernels=lj.kernels(apply, params, WORD_IDS))
    yield "values", peft.guess(params, state)


def meaningless(name):
    """A name in which every word has become one that says nothing."""
    *module, parameter = name.split(".")
    words = [segment if segment.isdigit() else f"m{zlib.crc32(segment.encode()):x}" for segment in module]
    letters = str.maketrans("0123456789", "ghijklmnop")
    return ".".join([word if word.isdigit() else word.translate(letters) for word in words] + [parameter])


def test_no_guess_is_wrong_without_saying_so_and_the_table_is_in_the_documentation():
    table = {}
    for name, mapping, apply, params, model in cases():
        leaves, state = flatten(params)[0], model.state_dict()
        module = {meaningless(each).rpartition(".")[0]: each.rpartition(".")[0] for each in state}
        anonymous = {meaningless(each): tensor for each, tensor in state.items()}
        for label, tensors, names in ((name, state, None), ("all, meaningless names", anonymous, module)):
            for what, guess in guesses(apply, params, tensors):
                counts, silent = judged(guess, mapping, leaves, names)
                assert not silent, f"{label}, {what}\n{guess}"
                table[label, what] = table.get((label, what), 0) + counts
    lines = [f"| {name} | {what} | {' | '.join(map(str, counts))} |" for (name, what), counts in sorted(table.items())]
    written = re.findall(r"^\| .* \| (?:shapes|shapes and axes|values) \|.*\|$", PAGE.read_text(), re.MULTILINE)
    assert written == lines, "\n".join(lines)
