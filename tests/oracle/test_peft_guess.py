"""`peft.guess` against the presets: from names and shapes of torch models, with and without traced axes and values."""

import re
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
TUNIX += [("gemma", 4, True), ("gemma3", 2, True), ("gemma3", 1, True)]
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


def judged(guess, mapping, leaves):
    """The numbers of rows that are sure and right, likely and right, unsure, and wrong without being unsure; missed."""
    expected, got = places(mapping, leaves), places(guess.mapping, leaves)
    wrong, counts = [], {"sure": 0, "likely": 0, "unsure": 0}
    for row in guess.rows:
        right = all(got[path] == expected.get(path) for path in row.paths.values())
        counts[row.confidence] += right or row.confidence == "unsure"
        if not right:
            wrong.append(row)
    silent = [row for row in wrong if row.confidence != "unsure"]
    return np.array([*counts.values(), len(silent), len(set(expected) - set(got))]), silent


def guesses(apply, params, model):
    """The guesses from shapes, from shapes and traced axes if there is a function, and from values."""
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    abstract = jax.eval_shape(lambda: params)
    yield "shapes", peft.guess(abstract, shapes)
    if apply is not None:
        yield "traced", peft.guess(abstract, shapes, kernels=lj.kernels(apply, params, WORD_IDS))
    yield "values", peft.guess(params, state)


def test_no_guess_is_wrong_without_saying_so_and_the_table_is_in_the_documentation():
    table = {}
    for name, mapping, apply, params, model in cases():
        leaves = flatten(params)[0]
        for what, guess in guesses(apply, params, model):
            counts, silent = judged(guess, mapping, leaves)
            assert not silent, f"{name}, {what}\n{guess}"
            table[name, what] = table.get((name, what), 0) + counts
    lines = [f"| {name}, {what} | {' | '.join(map(str, counts))} |" for (name, what), counts in table.items()]
    assert re.findall(r"^\| .*, (?:shapes|traced|values) \|.*\|$", PAGE.read_text(), re.MULTILINE) == lines, "\n".join(
        lines
    )
