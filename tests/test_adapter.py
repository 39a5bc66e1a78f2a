"""The adapter as a value: it prints, copies, maps and serialises as other pytrees do."""

import copy
import pickle

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import trained

import lora_jax as lj


@pytest.fixture
def adapter(key: jax.Array) -> dict[str, lj.Adapter]:
    params = {"query": {"kernel": jnp.ones((4, 3))}, "head": {"bias": jnp.ones(3)}}
    spec = {"query/kernel": lj.LoRA(rank=2, alpha=4), "head/bias": lj.Full()}
    return trained(key, lj.init(key, params, spec))


def test_it_prints_its_variant_axes_and_shapes(adapter: dict[str, lj.Adapter]) -> None:
    assert repr(adapter["query/kernel"]) == "Adapter(LoRA(rank=2, alpha=4), 'io', a=float32[4, 2], b=float32[2, 3])"
    assert repr(adapter["head/bias"]) == "Adapter(Full(), '', value=float32[3])"


def test_an_unknown_array_is_an_attribute_error(adapter: dict[str, lj.Adapter]) -> None:
    with pytest.raises(AttributeError, match="'Adapter' object has no attribute 'magnitude'"):
        _ = adapter["query/kernel"].magnitude


@pytest.mark.parametrize(
    "through",
    [
        copy.deepcopy,
        lambda adapter: pickle.loads(pickle.dumps(adapter)),
        lambda adapter: flax.serialization.from_bytes(
            jax.tree.map(jnp.zeros_like, adapter), flax.serialization.to_bytes(adapter)
        ),
        lambda adapter: jax.tree.map(lambda leaf: leaf, adapter),
    ],
    ids=["deepcopy", "pickle", "flax.serialization", "tree.map"],
)
def test_it_survives(through: object, adapter: dict[str, lj.Adapter]) -> None:
    assert callable(through)
    again = through(adapter)
    chex.assert_trees_all_equal_structs(again, adapter)
    chex.assert_trees_all_equal(again, adapter)


def test_its_arrays_have_readable_key_paths(adapter: dict[str, lj.Adapter]) -> None:
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(adapter)]
    assert paths == ["['head/bias'].value", "['query/kernel'].a", "['query/kernel'].b"]


def test_an_optimiser_state_is_a_tree_of_adapters(adapter: dict[str, lj.Adapter]) -> None:
    moments = optax.adam(1e-3).init(adapter)[0].mu
    chex.assert_trees_all_equal_structs(moments, adapter)
