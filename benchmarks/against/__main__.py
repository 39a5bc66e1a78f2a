"""Measures the libraries of one environment: `python -m against ENVIRONMENT --out FILE`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import sizes

from . import ENVIRONMENTS
from .figures import Figures, first_line


def versions(distributions: set[str]) -> dict[str, str]:
    """Returns the versions of the distributions that are installed."""
    found = {"python": platform.python_version()}
    for name in sorted(distributions):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def jax_environment(given: argparse.Namespace) -> dict[str, Any]:
    """Measures the references and the libraries of a JAX environment."""
    from .by_hand import METHODS
    from .capabilities import capabilities
    from .cases import MEASURED
    from .measure import measure

    libraries, missing = {}, {}
    for peer in ENVIRONMENTS[given.environment]:
        if given.only and peer.name not in given.only:
            continue
        try:
            libraries[peer.name] = importlib.import_module(f".{peer.module}", __package__)
        except Exception as error:
            missing[peer.name] = f"not installed: {first_line(error)}"
    builds = METHODS | {name: library.build for name, library in libraries.items()}
    size = getattr(sizes, given.size.upper())
    options = {"rounds": given.rounds, "steps": given.steps}
    cases = {title: measure(make(size), builds, **options) | missing for title, make in MEASURED.items()}
    supported = {} if given.quick else {name: capabilities(name, library) for name, library in libraries.items()}
    return {"cases": cases, "capabilities": supported}


def main() -> None:
    """Measures, and writes the figures to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("environment", choices=ENVIRONMENTS)
    parser.add_argument("--size", default="small")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", action="append")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    measured = jax_environment
    if given.environment == "torch":
        from .torch_step import torch_environment as measured
    peers = ENVIRONMENTS[given.environment]
    names = {peer.distribution for peer in peers} | {"jax", "jaxlib", "flax", "optax", "torch"}
    found = {"versions": versions(names), "cores": os.cpu_count()} | measured(given)
    given.out.write_text(json.dumps(found, default=plain, indent=2))


def plain(value: Any) -> Any:
    """Converts figures to JSON values."""
    if isinstance(value, Figures):
        return dataclasses.asdict(value)
    raise TypeError(f"Expected figures; got {value!r}")


if __name__ == "__main__":
    main()
