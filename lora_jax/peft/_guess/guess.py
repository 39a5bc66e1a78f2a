"""Proposes a mapping between a tree of parameters and the parameters of a torch model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..._core.paths import flatten
from ..._core.uses import Kernel
from ..._errors import CheckpointError, SpecError
from .._safetensors import read_header
from .groups import Group, Shape, groups, shape_of
from .names import Names, owner, words
from .propose import Proposal, shapes_of
from .result import Confidence, Guess, GuessedRow
from .values import Both


def guess(
    params: Any,
    state_dict: Mapping[str, Any] | str | os.PathLike[str],
    *,
    kernels: Mapping[str, Kernel] | None = None,
) -> Guess:
    """Proposes the mapping between a tree of parameters and a torch model, and says how sure it is of each row.

    Shapes exclude what is impossible. With values on both sides, values decide, also about rotary orders and factors.
    Without, axes of the traced model decide the orientation of square kernels, and names decide between modules of one
    shape; where only a convention or a similar name speaks for a row, the row says so. Check those, and change them in
    the mapping, which is a dict.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> params = {"layers": {"up": {"kernel": jnp.ones((2, 4, 8))}}, "head": {"kernel": jnp.ones((4, 3))}}
    >>> shapes = {"model.h.0.fc_up.weight": (8, 4), "model.h.1.fc_up.weight": (8, 4), "score.weight": (3, 4)}
    >>> found = lj.peft.guess(params, shapes)
    >>> found
    leaf              torch                     axes  confidence  because
    ────────────────  ────────────────────────  ────  ──────────  ─────────────────────────────────────────────────────
    head/kernel       score.weight                    likely      no other has its shape, and their names share no word
    layers/up/kernel  model.h.{i}.fc_up.weight        sure        no other has its shape
    >>> list(found.mapping)
    ['head/kernel', 'layers/up/kernel']

    Args:
      params: the parameter tree; arrays may be `ShapeDtypeStruct`s.
      state_dict: names of torch parameters to their arrays or shapes, such as `model.state_dict()`; or a safetensors
        file or a directory of them, of which the headers are read.
      kernels: from `lora_jax.kernels`, for the roles of axes in the traced model.

    Returns:
      The rows with their reasons; `mapping` is for `export` and `load`.

    Raises:
      CheckpointError: if a safetensors file cannot be read, or a directory has none.
      SpecError: if `state_dict` is a mapping with a value that has no shape.
    """
    tensors = state_dict if isinstance(state_dict, Mapping) else read_shapes(Path(state_dict))
    leaves = {path.removeprefix("params/"): leaf for path, leaf in flatten(params)[0].items()}
    traced = {path.removeprefix("params/"): kernel for path, kernel in (kernels or {}).items()}
    own = groups({path: tuple(leaf.shape) for path, leaf in leaves.items()}, "/")
    other = groups({name: _shape(name, tensor) for name, tensor in tensors.items()}, ".")
    axes = {path: kernel.axes for path, kernel in traced.items()}
    tables = {path: _is_table(kernel) for path, kernel in traced.items() if kernel.uses}
    names = Names([owner(group.name) for group in own], "/"), Names([_module(group) for group in other], ".")
    both = Both(leaves, tensors)
    proposal = Proposal(axes, tables, both, names)
    own, other = proposal.add(own, other)
    singles = [[one for group in rest for one in group.single()] for rest in (own, other)]
    own, other = proposal.add(*singles)
    left = shapes_of(other)
    rows = tuple(_with_head(row, left, leaves, tensors, traced) for row in proposal.rows)
    order = {path: at for at, path in enumerate(leaves)}
    rows = tuple(sorted(rows, key=lambda row: order[next(iter(row.paths.values()))]))
    heads = {f"{row.row.head}.weight" for row in rows if row.row.head}
    return Guess(rows, shapes_of(own), {name: shape for name, shape in left.items() if name not in heads})


def read_shapes(path: Path) -> dict[str, Shape]:
    """Reads the names and shapes of the tensors in safetensors files, without their values."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise CheckpointError(
            f"Expected safetensors files in {path}; got none.\n  Save the torch model as safetensors."
        )
    shapes: dict[str, Shape] = {}
    for file in files:
        try:
            shapes |= {name: stored.shape for name, stored in read_header(file).tensors.items()}
        except OSError as error:
            raise CheckpointError(
                f"Expected a safetensors file; {file} cannot be read.\n  {type(error).__name__}: {error}"
            ) from error
    return shapes


def _shape(name: str, tensor: Any) -> Shape:
    try:
        return shape_of(tensor)
    except (AttributeError, TypeError, ValueError) as error:
        raise SpecError(
            f"Expected an array or a shape for each torch parameter; got {type(tensor).__name__} for {name!r}.\n"
            "  Pass `model.state_dict()`, or names to shapes such as (16, 8)."
        ) from error


def _is_table(kernel: Kernel) -> bool:
    return any(use.primitive == "gather" for use in kernel.uses)


def _module(group: Group) -> str:
    return group.name.rpartition(".")[0]


_HEADS = {"head", "decoder", "o", "lm", "logits"}


def _with_head(
    guessed: GuessedRow, left: Mapping[str, Shape], leaves: Any, tensors: Any, traced: Mapping[str, Kernel]
) -> GuessedRow:
    """Returns the row of a table with the head that is tied to it: a tensor of its shape that no leaf is."""
    path = next(iter(guessed.paths.values()))
    if guessed.row.kind != "embedding" or "position" in words(guessed.pattern):
        return guessed
    shape = tuple(leaves[path].shape)
    names = [name.removesuffix(".weight") for name, own in left.items() if own == shape and name.endswith(".weight")]
    both = Both(leaves, tensors)
    own = both.compare(guessed.pattern, guessed.row, [path], all_of_them=True)
    for name in names:
        row = dataclasses.replace(guessed.row, parts=(dataclasses.replace(guessed.row.parts[0], module=name),))
        compared = both.compare(guessed.pattern, row, [path], all_of_them=True)
        # A head that is not tied may have almost the values of the table.
        equal = compared.equal and compared.nearness >= own.nearness
        if equal or (compared.cosine is None and set(words(name.rpartition(".")[2])) & _HEADS):
            sure = equal and guessed.confidence == "sure"
            confidence: Confidence = "sure" if sure else "unsure" if guessed.confidence == "unsure" else "likely"
            reason = f"tied: {name!r} has " + ("its values" if equal else "its shape, and no leaf")
            head = dataclasses.replace(guessed.row, head=name)
            return dataclasses.replace(guessed, row=head, confidence=confidence, reasons=(*guessed.reasons, reason))
    if path in traced and {"gather", "dot_general"} <= {use.primitive for use in traced[path].uses}:
        reason = "the model uses it as its head, too, and no tensor is that head: state `head=`, such as 'lm_head'"
        return dataclasses.replace(guessed, confidence="unsure", reasons=(*guessed.reasons, reason))
    return guessed
