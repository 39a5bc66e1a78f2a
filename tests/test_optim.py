"""`freeze_base`: training one tree of base and adapter equals training only the adapter."""

import collections
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from flax.training.train_state import TrainState

import lora_jax as lj
from lora_jax.optim import freeze_base


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = jnp.tanh(nn.Dense(16)(x))
        return nn.Dense(4)(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x)))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = nn.remat(Block, prevent_cse=False)
        layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(4)(layers()(x, None)[0])


X = jax.random.normal(jax.random.key(1), (6, 16))
OPTIMISERS = {
    "adam": lambda: optax.adam(1e-2),
    "sgd": lambda: optax.sgd(1e-2),
    "sgd with momentum": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "clipped adamw": lambda: optax.chain(optax.clip_by_global_norm(1e-2), optax.adamw(1e-2, weight_decay=0.1)),
    "a schedule": lambda: optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 8), weight_decay=0.1),
    "MultiSteps": lambda: optax.MultiSteps(optax.adamw(1e-2), every_k_schedule=2).gradient_transformation(),
    "lion": lambda: optax.lion(1e-3, weight_decay=0.1),
}


@functools.cache
def parts(model: nn.Module) -> tuple[Any, Any, Any]:
    """The parameters of a model, an adapter like a trained one, and the adapted model."""
    base = jax.jit(model.init)(jax.random.key(0), X)
    kernels = lj.kernels(model.apply, base, X)
    adapter = lj.init(jax.random.key(2), base, {"**/kernel": lj.LoRA(rank=2, alpha=4)}, kernels=kernels)
    return base, helpers.trained(jax.random.key(3), adapter), lj.lora(model.apply)


class Setting:
    """A training step with base and adapter in two trees, and in one tree."""

    def __init__(self, model: nn.Module, tx: optax.GradientTransformation) -> None:
        self.base, self.adapter, self.apply = parts(model)
        self.tx = tx

    def loss(self, base: Any, adapter: Any) -> jax.Array:
        return jnp.mean((self.apply(base, adapter, X) - 1.0) ** 2)

    def two_trees(self) -> tuple[Callable[..., TrainState], TrainState, Any]:
        """The step that updates the adapter's tree, its state, and the base."""

        def step(state: TrainState, base: Any) -> TrainState:
            return state.apply_gradients(grads=jax.grad(lambda adapter: self.loss(base, adapter))(state.params))

        return step, TrainState.create(apply_fn=None, params=self.adapter, tx=self.tx), self.base

    def one_tree(self) -> tuple[Callable[..., TrainState], TrainState]:
        """The step that differentiates one tree, and its state."""

        def step(state: TrainState) -> TrainState:
            grads = jax.grad(lambda tree: self.loss(tree["base"], tree["adapter"]))(state.params)
            return state.apply_gradients(grads=grads)

        tree = {"base": self.base, "adapter": self.adapter}
        return step, TrainState.create(apply_fn=None, params=tree, tx=freeze_base(self.tx))


def bits(tree: Any) -> list[tuple[Any, bytes]]:
    return [(leaf.dtype, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def size(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_state_equals_the_state_of_the_adapter(name: str) -> None:
    tx = OPTIMISERS[name]()
    tree = {"base": {"kernel": jnp.ones((64, 64))}, "adapter": {"a": jnp.ones((8, 4)), "b": jnp.ones((4, 8))}}
    combined, expected = freeze_base(tx).init(tree), tx.init(tree["adapter"])
    assert size(combined) == size(expected)
    assert jax.tree.structure(combined) == jax.tree.structure(expected)
    assert bits(combined) == bits(expected)


@pytest.mark.parametrize(
    "name", ["adam", "sgd with momentum", "adafactor", "clipped adamw", "a schedule", "MultiSteps"]
)
def test_the_adapter_is_trained_in_the_same_way(name: str) -> None:
    setting = Setting(MLP(), OPTIMISERS[name]())
    (two_trees, one, base), (one_tree, other) = setting.two_trees(), setting.one_tree()
    two_trees, one_tree = jax.jit(two_trees), jax.jit(one_tree)
    for _ in range(4):
        one, other = two_trees(one, base), one_tree(other)
    helpers.assert_close(other.params["adapter"], one.params)
    helpers.assert_close(jax.tree.leaves(other.opt_state), jax.tree.leaves(one.opt_state))
    assert bits(other.params["adapter"]) != bits(setting.adapter)


def awkward() -> dict[str, Any]:
    """A base with values that an added zero would change."""
    numbers = [-0.0, 0.0, 1.0, -1.0, 1e30, -1e-30, jnp.inf, -jnp.inf]
    return {
        "float32": jnp.array(numbers),
        "bfloat16": jnp.array(numbers, jnp.bfloat16),
        "float16": jnp.array([-0.0, 0.0, 6e4, 1e-3], jnp.float16),
        "steps": jnp.array(3),
    }


@pytest.mark.parametrize("under_jit", [False, True])
def test_the_base_is_unchanged_bit_for_bit(under_jit: bool) -> None:
    tree = {"base": awkward(), "adapter": {"a": jnp.ones(3)}}
    tx = freeze_base(optax.adamw(0.1, weight_decay=0.1))
    state = TrainState.create(apply_fn=None, params=tree, tx=tx)

    def step(state: TrainState) -> TrainState:
        return state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))

    step = jax.jit(step) if under_jit else step
    for _ in range(3):
        state = step(state)
    assert bits(state.params["base"]) == bits(tree["base"])
    assert bits(state.params["adapter"]) != bits(tree["adapter"])


def test_the_base_of_a_trained_model_is_unchanged() -> None:
    setting = Setting(Scanned(), OPTIMISERS["clipped adamw"]())
    step, state = setting.one_tree()
    step = jax.jit(step)
    for _ in range(3):
        state = step(state)
    assert bits(state.params["base"]) == bits(setting.base)
    assert bits(state.params["adapter"]) != bits(setting.adapter)


def test_updates_of_the_base_are_zero_in_the_dtypes_of_the_base() -> None:
    tree = {"base": awkward(), "adapter": {"a": jnp.ones(3)}}
    tx = freeze_base(optax.sgd(0.1))
    updates, _ = tx.update(tree, tx.init(tree), tree)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    for name, leaf in updates["base"].items():
        assert (leaf.dtype, leaf.shape) == (tree["base"][name].dtype, tree["base"][name].shape)
        assert not np.asarray(leaf, np.float32).any()


def test_a_base_in_a_dtype_without_zero_is_unchanged() -> None:
    # The dtype of scales in microscaling formats, such as mxfp4.
    tree = {"base": jnp.exp2(jnp.arange(-126, 128)).astype(jnp.float8_e8m0fnu), "adapter": {"a": jnp.ones(3)}}
    tx = freeze_base(optax.sgd(0.1))
    updates, _ = tx.update(tree, tx.init(tree), tree)
    assert bits(optax.apply_updates(tree, updates)["base"]) == bits(tree["base"])


def test_clipping_uses_the_norm_of_the_adapter() -> None:
    tree = {"base": {"kernel": jnp.full((8, 8), 1e6)}, "adapter": {"a": jnp.array([3.0, 4.0])}}
    tx = freeze_base(optax.chain(optax.clip_by_global_norm(1.0), optax.scale(-1.0)))
    updates, _ = tx.update(tree, tx.init(tree), tree)
    np.testing.assert_allclose(updates["adapter"]["a"], [-0.6, -0.8], rtol=1e-6)


def test_gradients_of_the_base_may_be_nonfinite() -> None:
    tree = {"base": {"kernel": jnp.ones(2)}, "adapter": {"a": jnp.ones(2)}}
    gradients = {"base": {"kernel": jnp.array([jnp.nan, jnp.inf])}, "adapter": {"a": jnp.ones(2)}}
    tx = freeze_base(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)))
    updates, _ = tx.update(gradients, tx.init(tree), tree)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(updates))


def test_gradients_of_integers_are_accepted() -> None:
    tree = {"base": {"steps": jnp.array(3), "w": jnp.ones(2)}, "adapter": {"a": jnp.ones(2)}}
    gradients = jax.grad(lambda t: jnp.sum(t["adapter"]["a"] * t["base"]["w"]), allow_int=True)(tree)
    tx = freeze_base(optax.adam(0.1))
    updates, _ = tx.update(gradients, tx.init(tree), tree)
    assert updates["base"]["steps"].dtype == jnp.int32
    assert optax.apply_updates(tree, updates)["base"]["steps"] == 3


def scale_by_loss() -> optax.GradientTransformationExtraArgs:
    def update(updates: Any, state: Any, params: Any = None, *, value: Any, **extra: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf * value, updates), extra["tag"]

    return optax.GradientTransformationExtraArgs(lambda params: None, update)


@pytest.mark.parametrize("chained", [False, True])
def test_extra_arguments_reach_the_optimizer(chained: bool) -> None:
    tx = freeze_base(optax.chain(scale_by_loss(), optax.scale(1.0)) if chained else scale_by_loss())
    tree = {"base": {"w": jnp.ones(2)}, "adapter": {"a": jnp.ones(2)}}
    updates, state = tx.update(tree, tx.init(tree), tree, value=3.0, tag="seen")
    np.testing.assert_array_equal(updates["adapter"]["a"], [3.0, 3.0])
    assert (state[0] if chained else state) == "seen"


def test_extra_arguments_are_dropped_if_the_optimizer_has_none() -> None:
    assert not isinstance(optax.scale(-0.1), optax.GradientTransformationExtraArgs)
    tx = freeze_base(optax.scale(-0.1))
    tree = {"base": {"w": jnp.ones(2)}, "adapter": {"a": jnp.ones(2)}}
    tx.update(tree, tx.init(tree), tree, value=3.0)


def test_a_line_search_gets_only_the_adapter() -> None:
    def loss(adapter: Any) -> jax.Array:
        return jnp.sum((adapter["a"] - 3.0) ** 2)

    tx = freeze_base(optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)))
    tree = {"base": {"w": jnp.ones(2)}, "adapter": {"a": jnp.zeros(2)}}
    gradients = {"base": tree["base"], "adapter": jax.grad(loss)(tree["adapter"])}
    value = loss(tree["adapter"])
    updates, _ = tx.update(gradients, tx.init(tree), tree, value=value, grad=gradients["adapter"], value_fn=loss)
    assert loss(optax.apply_updates(tree, updates)["adapter"]) < value


def test_params_are_optional() -> None:
    tree = {"base": {"w": jnp.ones(2)}, "adapter": {"a": jnp.ones(2)}}
    tx = freeze_base(optax.sgd(0.5))
    updates, _ = tx.update(tree, tx.init(tree))
    np.testing.assert_array_equal(updates["adapter"]["a"], [-0.5, -0.5])


@pytest.mark.parametrize("container", [dict, FrozenDict, collections.OrderedDict], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("order", [("base", "adapter"), ("adapter", "base")], ids="-".join)
def test_updates_have_the_container_and_order_of_the_tree(container: Any, order: tuple[str, str]) -> None:
    parts = {"base": {"w": jnp.ones(2)}, "adapter": {"a": jnp.ones(2)}}
    tree = container([(key, parts[key]) for key in order])
    tx = freeze_base(optax.adam(0.1))
    updates, _ = tx.update(tree, tx.init(tree), tree)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    assert type(optax.apply_updates(tree, updates)) is container


def cost(step: Any, *args: Any) -> tuple[float, int]:
    """The compiler's FLOPs, and its bytes other than arguments and results."""
    compiled = step.lower(*args).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("model", [MLP(), Scanned()], ids=lambda model: type(model).__name__)
@pytest.mark.parametrize("donate", [False, True])
def test_the_step_costs_the_same_as_with_two_trees(model: nn.Module, donate: bool) -> None:
    setting = Setting(model, OPTIMISERS["clipped adamw"]())
    (two_trees, one, base), (one_tree, other) = setting.two_trees(), setting.one_tree()
    two_trees, one_tree = (jax.jit(step, donate_argnums=0 if donate else ()) for step in (two_trees, one_tree))
    assert cost(one_tree, other) == cost(two_trees, one, base)


def test_a_step_of_full_fine_tuning_costs_more() -> None:
    setting = Setting(MLP(), OPTIMISERS["clipped adamw"]())
    step, state = setting.one_tree()
    full = TrainState.create(apply_fn=None, params=state.params, tx=setting.tx)
    assert cost(jax.jit(step), full)[0] > 1.1 * cost(jax.jit(step), state)[0]


ERROR = (
    'Expected a tree with the keys "base" and "adapter"; got {}.\n'
    '  Put both into one dict: TrainState.create(params={{"base": params, "adapter": adapter}}, …).'
)
TREE = {"base": {"w": jnp.ones(2)}, "adapter": {"a": jnp.ones(2)}}
STRANGERS = {
    "a params tree": ({"params": {"w": jnp.ones(2)}}, "['params']"),
    "only the adapter": ({"adapter": TREE["adapter"]}, "['adapter']"),
    "one key too many": (TREE | {"head": jnp.ones(2)}, "['adapter', 'base', 'head']"),
    "a tuple": ((TREE["base"], TREE["adapter"]), "tuple"),
    "an array": (jnp.ones(2), "ArrayImpl"),
}


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.parametrize("step", ["init", "updates", "params"])
def test_a_tree_of_other_keys_is_an_error(name: str, step: str) -> None:
    tree, got = STRANGERS[name]
    tx = freeze_base(optax.adam(0.1))
    with pytest.raises(lj.AdapterError) as caught:
        match step:
            case "init":
                tx.init(tree)
            case "updates":
                tx.update(tree, tx.init(TREE), TREE)
            case "params":
                tx.update(TREE, tx.init(TREE), tree)
    assert str(caught.value) == ERROR.format(got)
