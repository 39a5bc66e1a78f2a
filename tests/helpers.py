"""Shared by the tests: the table of tolerances, adapters with nonzero factors, and the dense oracle."""

import os
import sys
from collections.abc import Container, Iterable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj

# Largest difference from the oracle, relative to the oracle's largest element, by dtype of the computation.
FORWARD = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 3e-2}
GRADIENT = {"float64": 1e-11, "float32": 1e-4, "bfloat16": 8e-2}


def sweep_except(kept: Container[Any], cases: Iterable[Any]) -> list[Any]:
    """Returns the cases as parameters; `make test` runs those in `kept`, and `make sweeps` runs the others."""
    return [case if case in kept else sweep(*case) if isinstance(case, tuple) else sweep(case) for case in cases]


def sweep(*values: Any) -> Any:
    """Returns a case, the values of one or more parameters, that `make sweeps` runs."""
    return pytest.param(*values, marks=pytest.mark.sweep)


def assert_close(got: Any, expected: Any, table: Mapping[str, float] = FORWARD, *, dtype: str | None = None) -> None:
    """Compares two trees leaf by leaf; integers must be equal.

    The tolerance is that of `dtype`, the dtype of the computation, or of the leaf's dtype if it is None. The
    comparison runs in NumPy, because JAX would compile one for each shape.
    """
    chex.assert_trees_all_equal_structs(got, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(one.dtype, jnp.floating):
            one_wide, other_wide = np.asarray(one, np.float64), np.asarray(other, np.float64)
            scale = max(np.max(np.abs(other_wide), initial=0.0), 1e-6)
            np.testing.assert_allclose(one_wide, other_wide, rtol=0, atol=scale * table[dtype or one.dtype.name])
        else:
            np.testing.assert_array_equal(one, other)


def assert_few_ulp(got: Any, expected: Any, ulp: int = 8) -> None:
    """Compares two trees that differ only because separate programs computed them.

    The compiler may fuse a multiplication and an addition in one program and not in the other. Each array may differ
    by some units in the last place of its largest element; integers must be equal.
    """
    chex.assert_trees_all_equal_structs(got, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        if not jnp.issubdtype(one.dtype, jnp.floating):
            np.testing.assert_array_equal(one, other)
            continue
        tolerance = ulp * float(jnp.finfo(one.dtype).eps)
        one, other = one.astype(np.float64), other.astype(np.float64)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.max(np.abs(other), initial=0.0))


def trained(key: jax.Array, adapter: Any, size: float = 0.3) -> Any:
    """An adapter like a trained one: every array random and nonzero."""
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)))  # NumPy compiles nothing
    return jax.tree.map(
        lambda leaf: jax.device_put((size * random.standard_normal(leaf.shape)).astype(leaf.dtype)), adapter
    )


def dense(apply: Any) -> Any:
    """The oracle: the call with merged kernels, `f(merge(p, ad), x)`, which is differentiable in the adapter."""
    return lambda params, adapter, *args, **kwargs: apply(lj.merge(params, adapter), *args, **kwargs)


def bits(tree: Any) -> list[Any]:
    """The leaves of a tree with their paths, for bitwise comparison: a NaN equals itself, and −0 differs from 0."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path), *_bits_of(leaf)) for path, leaf in leaves]


def _bits_of(leaf: Any) -> tuple[Any, ...]:
    if not isinstance(leaf, jax.Array | np.ndarray):
        return type(leaf), leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes()
    return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()


def environment(**changed: str) -> dict[str, str]:
    """The environment of a Python process that imports the same packages."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | changed
