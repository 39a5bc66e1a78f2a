"""What the tests share: the one table of tolerances, adapters that do something, and the dense oracle."""

import os
import sys
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj

# Largest difference from the oracle, relative to the oracle's largest element, by the dtype of the computation.
FORWARD = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 3e-2}
GRADIENT = {"float64": 1e-11, "float32": 1e-4, "bfloat16": 8e-2}


def assert_close(got: Any, expected: Any, table: Mapping[str, float] = FORWARD, *, dtype: str | None = None) -> None:
    """Compares two trees leaf by leaf; integers must be equal.

    The tolerance is the table's for `dtype`, that of the computation; without it, for the leaf's own dtype. On the
    host, as JAX would compile a comparison for each shape.
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


def trained(key: jax.Array, adapter: Any, size: float = 0.3) -> Any:
    """An adapter as training might leave it: every array random, none zero."""
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)))  # NumPy's: nothing to compile
    return jax.tree.map(
        lambda leaf: jax.device_put((size * random.standard_normal(leaf.shape)).astype(leaf.dtype)), adapter
    )


def dense(apply: Any) -> Any:
    """The oracle: the same call with the kernels formed, `f(merge(p, ad), x)`, differentiable in the adapter."""
    return lambda params, adapter, *args, **kwargs: apply(lj.merge(params, adapter), *args, **kwargs)


def bits(tree: Any) -> list[Any]:
    """All that a tree holds, with its paths, to be compared bit for bit: a NaN equals itself, and −0 is not 0."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path), *_bits_of(leaf)) for path, leaf in leaves]


def _bits_of(leaf: Any) -> tuple[Any, ...]:
    if not isinstance(leaf, jax.Array | np.ndarray):
        return type(leaf), leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes()
    return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()


def environment(**changed: str) -> dict[str, str]:
    """For a Python process that shall import what this one imports."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | changed
