"""`lora-jax combine`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from .._core.adapter import Adapters
from .._variants import Full
from ..peft._stored import named_for, stored_tensors
from ._console import error
from ._report import Report, UsageError, check_options, spans
from ._source import Source, check_target, open_adapter, write_like

_METHODS: dict[str, tuple[str, tuple[str, ...]]] = {  # names in `many`, and the options of each
    "concat": ("Concat", ()),
    "linear": ("Linear", ()),
    "svd": ("Truncate", ("rank", "energy")),
    "prune": ("Prune", ("density", "on", "rank")),
    "ties": ("Ties", ("density", "on", "rank", "sign")),
    "dare": ("Dare", ("density", "on", "rank", "sign", "seed")),
}


def combine(
    out: Path,
    /,
    *adapters: str,
    how: Literal["concat", "linear", "svd", "prune", "ties", "dare"],
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    on: Literal["updates", "factors"] | None = None,
    sign: Literal["total", "frequency"] | None = None,
    seed: int | None = None,
    base: Path | None = None,
    force: bool = False,
) -> Report:
    """Writes one adapter of several of the same base, with weights.

    `concat` is exactly the weighted sum of the updates, with the sum of the ranks; `svd` is its best approximation of
    a rank. The others are not sums of updates; `docs/combining.md` says what each computes.

    Example: `lora-jax combine both one=adapters/one:0.7 two=adapters/two:0.3 --how svd --rank 16`

    Args:
      out: the directory to write.
      adapters: NAME=DIRECTORY:WEIGHT for each adapter; a weight of 1 may be left out.
      how: the method.
      rank: of the result; for svd, prune, ties and dare.
      energy: for svd, in place of a rank, the fraction of ‖ΔW‖² to keep, in (0, 1).
      density: the share of the elements to keep, in (0, 1]; for prune, ties and dare.
      on: whether prune, ties and dare act on the updates, materialized one layer at a time, or on the factors.
      sign: how ties elects signs, and dare, if it is given.
      seed: for dare, of the random elements.
      base: the directory of the model, in safetensors files; for modules that are saved in full, trainable tokens and
        VeRA only.
      force: write to a directory that is not empty.
    """
    from .. import many

    options = {"rank": rank, "energy": energy, "density": density, "on": on, "sign": sign, "seed": seed}
    check_options(how, options, _METHODS[how][1])
    method, key = _method(how, {name: value for name, value in options.items() if value is not None})
    terms = _terms(adapters)
    check_target(out, [directory for directory, _ in terms.values()], force=force)
    opened = {name: open_adapter(directory, base) for name, (directory, _) in terms.items()}
    like = _like(opened)
    weighted = {name: (found.adapter, terms[name][1]) for name, found in opened.items()}
    values = None if base is None else _values(base, [found.adapter for found in opened.values()])
    result = many.combine(weighted, method, base=values, key=key)
    write_like(like, out, result)
    ranks = [part.a.shape[-1] for part in result.values() if "a" in part.arrays]
    data = {
        "target": str(out),
        "how": str(method),
        "adapters": {name: {"path": str(path), "weight": weight} for name, (path, weight) in terms.items()},
        "leaves": len(result),
        "ranks": [min(ranks), max(ranks)] if ranks else None,
        "parameters": sum(array.size for part in result.values() for array in part.arrays.values()),
    }
    return Report(data, lambda: [_shown(data)])


def _method(how: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Returns the method, and the key if it is random."""
    from .. import many  # here, because it imports optax

    kind, names = _METHODS[how]
    needed = [name for name in ("density", "seed") if name in names and name not in options]
    if needed:
        raise UsageError(f"Expected {' and '.join(f'--{name}' for name in needed)} for {how}.")
    seed = options.get("seed")
    method = getattr(many, kind)(**{name: value for name, value in options.items() if name != "seed"})
    return method, None if seed is None else jax.random.key(seed)


def _terms(adapters: tuple[str, ...]) -> dict[str, tuple[Path, float]]:
    """Returns the directory and the weight of each adapter by name."""
    terms: dict[str, tuple[Path, float]] = {}
    for text in adapters:
        name, equals, rest = text.partition("=")
        directory, colon, weight = rest.rpartition(":")
        try:
            value = float(weight) if colon else 1.0
        except ValueError:
            equals = ""
        if not name or not equals or not rest or name in terms:
            raise UsageError(f"Expected NAME=DIRECTORY:WEIGHT with a name of its own for each adapter; got {text!r}.")
        terms[name] = Path(directory if colon else rest), value
    if not terms:
        raise UsageError("Expected at least one adapter, as NAME=DIRECTORY:WEIGHT.")
    return terms


def _like(opened: Mapping[str, Source]) -> Source:
    """Returns an adapter with the paths of all."""
    first, *others = opened.values()
    if any(found.format != first.format for found in others):
        formats = ", ".join(f"{name}: {found.format}" for name, found in opened.items())
        raise UsageError(f"Expected adapters in one format; got {formats}. Convert them first: lora-jax convert.")
    bases = {name: found.base for name, found in opened.items()}
    if len(set(bases.values())) > 1:
        error(f"the adapters name different bases: {', '.join(f'{name}: {base}' for name, base in bases.items())}")
    for other in others:
        one, two = ({path: getattr(leaf, "saved", None) for path, leaf in x.params.items()} for x in (first, other))
        if unlike := [path for path in two if path in one and two[path] != one[path]]:
            error(f"the adapters were saved with different bases: {unlike[0]!r} is another in {other.path}")
        mapping, params = {**other.mapping, **first.mapping}, {**other.params, **first.params}
        stated = {name: value for name, value in first.stated.items() if other.stated.get(name) == value}
        first = dataclasses.replace(first, mapping=mapping, params=params, stated=stated)
    return first


def _values(base: Path, adapters: list[Adapters]) -> dict[str, Any]:
    """Returns the base's values of the leaves that are saved in full."""
    paths = [path for adapter in adapters for path, part in adapter.items() if isinstance(part.variant, Full)]
    tensors = named_for({path.partition("/")[0] for path in paths}, stored_tensors(base))
    return {path: tensors[name].read() for path in paths if (name := path.replace("/", ".")) in tensors}


def _shown(data: Mapping[str, Any]) -> str:
    ranks = "" if data["ranks"] is None else f", rank {spans(data['ranks'])}"
    leaves = "1 leaf" if data["leaves"] == 1 else f"{data['leaves']} leaves"
    return f"{data['target']}: {leaves}{ranks}, {data['parameters']:,} parameters"
