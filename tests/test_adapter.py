"""The adapter is a value: it prints, copies, maps and serializes like other pytrees."""

import copy
import pickle
from collections.abc import Callable

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import trained

import lora_jax as lj
from lora_jax import _errors


@pytest.fixture
def adapter(key: jax.Array) -> dict[str, lj.Adapter]:
    params = {"query": {"kernel": jnp.ones((4, 3))}, "head": {"bias": jnp.ones(3)}}
    spec = {"query/kernel": lj.LoRA(rank=2, alpha=4), "head/bias": lj.Full()}
    return trained(key, lj.init(key, params, spec))


def test_an_adapter_prints_variant_axes_and_shapes(adapter: dict[str, lj.Adapter]) -> None:
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
def test_an_adapter_survives_copying_and_serialization(through: object, adapter: dict[str, lj.Adapter]) -> None:
    assert callable(through)
    again = through(adapter)
    chex.assert_trees_all_equal_structs(again, adapter)
    chex.assert_trees_all_equal(again, adapter)


def errors() -> list[lj.LoRAError]:
    """One error of every class."""
    classes = [cls for cls in vars(_errors).values() if isinstance(cls, type) and issubclass(cls, lj.LoRAError)]
    assert {lj.AdapterError, lj.CheckpointError, lj.MergeError, lj.SpecError, lj.UnsupportedError} < set(classes)
    special = {lj.UnsupportedError: lj.UnsupportedError("what", "line", "advice")}
    return [special[cls] if cls in special else cls("what was expected") for cls in classes]


@pytest.mark.parametrize("through", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
@pytest.mark.parametrize("error", errors(), ids=lambda error: type(error).__name__)
def test_an_error_survives_copying_and_serialization(error: lj.LoRAError, through: Callable[[object], object]) -> None:
    again = through(error)
    assert type(again) is type(error)
    assert (str(again), vars(again)) == (str(error), vars(error))
    assert str(error)


def test_an_unsupported_error_survives_pickling() -> None:
    params = {"w": jnp.ones((4, 4))}
    adapter = lj.init(jax.random.key(0), params, {"w": lj.LoRA(rank=2, alpha=4)})
    with pytest.raises(lj.UnsupportedError) as caught:
        lj.lora(lambda p, x: x @ jnp.exp(p["w"]))(params, adapter, jnp.ones((2, 4)))
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert (again.what, again.line, again.advice) == (caught.value.what, caught.value.line, caught.value.advice)


def test_the_results_of_explain_and_kernels_survive_pickling(adapter: dict[str, lj.Adapter]) -> None:
    params = {"query": {"kernel": jnp.ones((4, 3))}, "head": {"bias": jnp.ones(3)}}
    call = (lambda p, x: x @ p["query"]["kernel"] + p["head"]["bias"]), params
    for found in (lj.explain(*call, adapter, jnp.ones((2, 4))), lj.kernels(*call, jnp.ones((2, 4)))):
        assert copy.deepcopy(found) == found
        assert pickle.loads(pickle.dumps(found)) == found
        assert str(pickle.loads(pickle.dumps(found))) == str(found)


def test_a_plan_survives_pickling_without_the_program() -> None:
    params = {"w": jax.ShapeDtypeStruct((4, 3), jnp.float32)}
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    x = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    found = lj.plan(lambda p, x: x @ p["w"], params, {"w": lj.LoRA(rank=2, alpha=4)}, optax.sgd(0.1), mesh, x)
    again = pickle.loads(pickle.dumps(found))
    assert again == found
    assert str(again) == str(found)
    assert again.lora.compiled is None
    assert copy.deepcopy(found).lora.compiled is copy.copy(found.lora).compiled is found.lora.compiled is not None


def test_arrays_have_readable_key_paths(adapter: dict[str, lj.Adapter]) -> None:
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(adapter)]
    assert paths == ["['head/bias'].value", "['query/kernel'].a", "['query/kernel'].b"]


def test_an_optimizer_state_is_a_tree_of_adapters(adapter: dict[str, lj.Adapter]) -> None:
    moments = optax.adam(1e-3).init(adapter)[0].mu
    chex.assert_trees_all_equal_structs(moments, adapter)
