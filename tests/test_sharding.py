"""Shardings of adapters, and models with sharded parameters on automatic and explicit meshes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from helpers import assert_few_ulp, trained
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from law import adapted, assert_close, assert_law, normal

import lora_jax as lj
from lora_jax import testing


@functools.cache
def mesh(kind: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))


def on_mesh(*spec: Any, kind: AxisType = AxisType.Auto) -> NamedSharding:
    return NamedSharding(mesh(kind), P(*spec))


def specs(tree: Any) -> Any:
    """The partition specs of a tree of shardings or arrays."""
    return jax.tree.map(lambda x: x if isinstance(x, P) else getattr(x, "sharding", x).spec, tree)


# The shardings of an adapter

PARAMS = {
    "query": {"kernel": jax.ShapeDtypeStruct((8, 4, 3), jnp.float32)},
    "layers": {"kernel": jax.ShapeDtypeStruct((2, 8, 12), jnp.float32)},
    "head": {"kernel": jax.ShapeDtypeStruct((12, 16), jnp.bfloat16), "bias": jax.ShapeDtypeStruct((16,), jnp.float32)},
}
SPECS = {
    "query": {"kernel": P("data", "model")},
    "layers": {"kernel": P("data", None, "model")},
    "head": {"kernel": P(None, ("data", "model")), "bias": P("model")},
}
SPEC = {
    "query/kernel": lj.LoRA(rank=2, alpha=4, axes="ioo"),
    "layers/kernel": lj.LoRA(rank=2, alpha=4, axes="bio"),
    "head/kernel": lj.LoRA(rank=2, alpha=4),
    "head/bias": lj.Full(),
}


@functools.cache
def shapes() -> Any:
    return jax.eval_shape(lambda params: lj.init(jax.random.key(0), params, SPEC), PARAMS)


def placed(params: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, sharding: jax.device_put(jnp.zeros(x.shape, x.dtype), sharding), params, shardings)


NAMED = jax.tree.map(lambda spec: on_mesh(*spec), SPECS)
GIVEN = {
    "specs": lambda: SPECS,
    "shardings": lambda: NAMED,
    "arrays": lambda: placed(PARAMS, NAMED),
    "shapes": lambda: jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), PARAMS, NAMED),
    "the top of the tree": lambda: NAMED | {"query": on_mesh("data", "model"), "layers": P("data", None, "model")},
}


@pytest.mark.parametrize("name", GIVEN)
def test_factors_are_sharded_along_the_axes_of_the_kernel(name: str) -> None:
    found = lj.sharding.like_base(shapes(), GIVEN[name]())
    assert {path: specs(part.arrays) for path, part in found.items()} == {
        "query/kernel": {"a": P("data", None), "b": P(None, "model", None)},
        "layers/kernel": {"a": P("data", None, None), "b": P("data", None, "model")},
        "head/kernel": {"a": P(None, None), "b": P(None, ("data", "model"))},
        "head/bias": {"value": P("model")},
    }
    assert jax.tree.structure(found) == jax.tree.structure(shapes())
    if name != "specs" and name != "the top of the tree":
        assert all(sharding.mesh == mesh() for sharding in jax.tree.leaves(found))


def test_one_sharding_may_apply_to_all_parameters() -> None:
    found = lj.sharding.like_base({"head/kernel": shapes()["head/kernel"]}, on_mesh("model"))
    assert specs(found["head/kernel"].arrays) == {"a": P("model", None), "b": P(None, None)}


def test_an_adapter_of_arrays_on_one_device_stays_there() -> None:
    found = lj.sharding.like_base(shapes(), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), PARAMS))
    assert {sharding.device_set == {jax.devices()[0]} for sharding in jax.tree.leaves(found)} == {True}


def test_optimizer_state_is_sharded_like_the_adapter() -> None:
    for tx in (optax.adamw(1e-3), optax.chain(optax.clip_by_global_norm(1.0), optax.adafactor(1e-3))):
        state = jax.eval_shape(tx.init, shapes())
        found = lj.sharding.like_base(state, NAMED)
        assert jax.tree.structure(found) == jax.tree.structure(state)
        jax.tree.map(lambda x, sharding: sharding.shard_shape(x.shape), state, found)  # raises if one does not fit
    found = lj.sharding.like_base(jax.eval_shape(optax.adamw(1e-3).init, shapes()), NAMED)
    assert jax.tree.leaves(found[0].mu) == jax.tree.leaves(lj.sharding.like_base(shapes(), NAMED))
    assert found[0].count == on_mesh()


def test_optimizer_state_may_cover_a_part_of_the_adapter() -> None:
    tx = optax.masked(optax.trace(0.9), lambda ad: jax.tree_util.tree_map_with_path(lambda k, _: k[-1].name == "b", ad))
    found = lj.sharding.like_base(jax.eval_shape(tx.init, shapes()), SPECS)
    trace = found.inner_state.trace["query/kernel"]
    assert (trace.a, trace.b) == (optax.MaskedNode(), P(None, "model", None))


# Boxes that name the axes of the parameters

RULES = (("embed", None), ("mlp", "model"), ("heads", "model"))


class Boxed(nn.Module):
    """A model with named axes of its parameters."""

    box: Callable[..., Any]
    names: tuple[Any, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(16, kernel_init=self.box(nn.initializers.lecun_normal(), self.names))(x)


class InNNX(nnx.Module):
    def __init__(self, names: tuple[Any, ...], rngs: nnx.Rngs, **options: Any) -> None:
        start = nnx.with_partitioning(nnx.initializers.lecun_normal(), names, **options)
        self.dense = nnx.Linear(8, 16, kernel_init=start, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(x)


class Boxes(NamedTuple):
    """A model with boxed parameters, and their shardings."""

    apply: Callable[..., Any]
    params: Any
    kernel: str
    given: Callable[[Any], Any]


def linen(box: Callable[..., Any], names: tuple[Any, ...], given: Callable[[Any], Any]) -> Boxes:
    model = Boxed(box, names)
    return Boxes(model.apply, model.init(jax.random.key(0), jnp.ones((4, 8))), "params/Dense_0/kernel", given)


def in_nnx(given: Callable[[Any], Any], names: tuple[Any, ...] = (None, "model"), **options: Any) -> Boxes:
    with jax.set_mesh(mesh()):
        graph, state = nnx.split(InNNX(names, nnx.Rngs(0), **options))
    return Boxes(lambda state, x: nnx.merge(graph, state)(x), state, "dense/kernel", given)


def logical(params: Any) -> Any:
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(params), mesh(), RULES)


MESH_NAMES = (None, "model")
BOXES = {
    "nn.get_partition_spec": lambda: linen(nn.with_partitioning, MESH_NAMES, nn.get_partition_spec),
    "nn.get_sharding": lambda: linen(nn.with_partitioning, MESH_NAMES, lambda params: nn.get_sharding(params, mesh())),
    "nn.logical_to_mesh_sharding": lambda: linen(nn.with_logical_partitioning, ("embed", "mlp"), logical),
    "boxes of arrays on the mesh": lambda: linen(
        nn.with_partitioning,
        MESH_NAMES,
        lambda params: jax.device_put(params, nn.get_sharding(params, mesh())),
    ),
    "nnx.get_partition_spec": lambda: in_nnx(nnx.get_partition_spec),
    "nnx.get_named_sharding": lambda: in_nnx(lambda state: nnx.get_named_sharding(state, mesh())),
    "rules of NNX": lambda: in_nnx(nnx.get_partition_spec, ("embed", "mlp"), sharding_rules=RULES),
    "a state on the mesh": lambda: in_nnx(lambda state: state),
}


@pytest.mark.parametrize("name", BOXES)
def test_boxed_shardings_of_kernels_apply_to_factors(name: str) -> None:
    _, params, kernel, given = BOXES[name]()
    adapter = lj.init(jax.random.key(1), params, {kernel: lj.LoRA(rank=2, alpha=4)})
    assert specs(lj.sharding.like_base(adapter, given(params))[kernel].arrays) == {
        "a": P(None, None),
        "b": P(None, "model"),
    }


@pytest.mark.parametrize("name", ["nn.get_sharding", "nn.logical_to_mesh_sharding", "a state on the mesh"])
def test_a_model_with_boxed_parameters_can_be_adapted(name: str) -> None:
    apply, params, kernel, _ = BOXES[name]()
    adapter = trained(jax.random.key(2), lj.init(jax.random.key(1), params, {kernel: lj.LoRA(rank=2, alpha=4)}))
    with jax.set_mesh(mesh()):
        assert_law(apply, params, adapter, normal(4, 8))


def test_logical_names_can_be_translated_afterwards() -> None:
    _, params, kernel, _ = BOXES["nn.logical_to_mesh_sharding"]()
    adapter = lj.init(jax.random.key(1), params, {kernel: lj.LoRA(rank=2, alpha=4)})
    found = lj.sharding.like_base(adapter, nn.get_partition_spec(params))
    assert specs(found[kernel].arrays) == {"a": P("embed", None), "b": P(None, "mlp")}
    assert nn.logical_to_mesh_sharding(found, mesh(), RULES)[kernel].b == on_mesh(None, "model")


# Errors


def test_an_axis_that_the_devices_do_not_divide_is_replicated_and_reported() -> None:
    params = {"kernel": jnp.ones((6, 32)), "bias": jnp.ones(32)}
    adapter = lj.init(jax.random.key(0), params, {"kernel": lj.LoRA(rank=2, alpha=4), "bias": lj.Full()})
    shardings = {"kernel": on_mesh("model", "data"), "bias": on_mesh(("data", "model"))}
    found = lj.sharding.like_base(adapter, shardings)
    assert specs(found["kernel"].arrays) == {"a": P(None, None), "b": P(None, "data")}
    jax.device_put(adapter, found)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["kernel"] + params["bias"]

    explained = lj.explain(apply, params, adapter, jnp.ones((3, 6)), shardings=shardings)
    assert {row.path: row.placed for row in explained.rows} == {
        "kernel": "a 6×2, b 2×32@data",
        "bias": "value 32@(data,model)",
    }
    assert explained.undivided == (
        "a of 'kernel' is replicated along its axis of size 6, which the devices along 'model' do not divide",
    )
    header, *_, last = str(explained).split("\n")
    assert header.endswith("placed") and last == f"placed:    {explained.undivided[0]}"
    assert ">value 32@(data,model)</td>" in explained._repr_html_()
    assert "placed" not in str(lj.explain(apply, params, adapter, jnp.ones((3, 6))))


KERNEL = {"kernel": lj.Adapter(lj.LoRA(rank=2, alpha=4), "io", a=jnp.zeros((8, 2)), b=jnp.zeros((2, 4)))}
WRONG = {
    "no sharding for it": (KERNEL, {"kernels": P()}, "there is none for 'kernel'.\n  The nearest paths: 'kernels'"),
    "only shapes": (
        KERNEL,
        {"kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32)},
        "carry axis names: `nn.get_sharding",
    ),
    "a box of shapes": (
        KERNEL,
        {"kernel": nn.Partitioned(jax.ShapeDtypeStruct((8, 4), jnp.float32), (None, "model"))},
        "got a ShapeDtypeStruct without",
    ),
    "of more axes": (KERNEL, P("data", None, "model"), r"a leaf with the axes 'io' for 'kernel'; got P\('data', None"),
    "of a stack": (KERNEL, {"kernel": jnp.zeros((3, 8, 4))}, r"axes 'io' for 'kernel'; got \(\), of \(3, 8, 4\)"),
    "swapped": (
        P("data"),
        KERNEL,
        r"a tree with one.*; got P.*\n  .*: sharding.like_base\(adapter, params_shardings\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_invalid_sharding_of_the_base_is_an_error(name: str) -> None:
    adapter, given, message = WRONG[name]
    with pytest.raises(lj.AdapterError, match=message):
        lj.sharding.like_base(adapter, given)


# Initialization


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_init_makes_each_shard_on_its_device(kind: AxisType) -> None:
    spec = {path: variant for path, variant in SPEC.items() if variant.needs_axes}

    def init(key: jax.Array) -> Any:
        return lj.init(key, PARAMS, spec)

    key = jax.random.key(3)
    shardings = lj.sharding.like_base(
        jax.eval_shape(init, key), jax.tree.map(lambda spec: on_mesh(*spec, kind=kind), SPECS)
    )
    make = jax.jit(init, out_shardings=shardings)
    program = make.lower(key).compile()
    assert testing.wire_bytes(make, key).total() == 0
    memory = program.memory_analysis()
    assert memory.argument_size_in_bytes == jax.random.key_data(key).nbytes
    adapter = make(key)
    leaves = list(zip(jax.tree.leaves(adapter), jax.tree.leaves(shardings), strict=True))
    assert all(x.sharding.is_equivalent_to(sharding, x.ndim) for x, sharding in leaves)
    assert_few_ulp(jax.device_get(adapter), jax.device_get(init(key)), 2)


# Explicit meshes


def scanned(layer: Callable[..., Any]) -> Callable[..., Any]:
    return lambda w, x: lax.scan(lambda x, w: (layer(w, x), None), x, w)[0]


def gathered(w: jax.Array) -> jax.Array:
    """Gathers a kernel that is sharded along inputs."""
    return jax.reshard(w, P(*(None,) * w.ndim))


class Typed(NamedTuple):
    """A function of a kernel on an explicit mesh, and a call of it."""

    call: Callable[..., Any]
    kernel: tuple[int, ...]
    roles: str
    at: P
    x: tuple[int, ...] | list[int] = (8, 8)
    x_at: P = P("data")


EXPLICIT = {
    "outputs": Typed(lambda w, x: jnp.tanh(x @ w) + 1.0, (8, 12), "io", P(None, "model")),
    "inputs, gathered": Typed(lambda w, x: jnp.tanh(x @ gathered(w)), (8, 12), "io", P("data")),
    "inputs, summed": Typed(
        lambda w, x: jnp.tanh(jnp.einsum("td,df->tf", x, w, out_sharding=P("data"))),
        (8, 12),
        "io",
        P("model"),
        x_at=P("data", "model"),
    ),
    "inputs and outputs": Typed(
        lambda w, x: jnp.einsum("td,df->tf", x, w, out_sharding=P(None, "data")),
        (8, 12),
        "io",
        P("model", "data"),
        x_at=P(None, "model"),
    ),
    "inputs, summed and scattered": Typed(
        lambda w, x: jnp.einsum("td,df->tf", x, w, out_sharding=P("data", "model")),
        (8, 12),
        "io",
        P("model"),
        x_at=P("data", "model"),
    ),
    "a tied embedding": Typed(lambda w, x: jnp.einsum("td,vd->tv", x, w), (12, 8), "oi", P("model")),
    "rows": Typed(
        lambda w, ids: w.at[ids].get(out_sharding=P("data")), (12, 8), "io", P("model"), [0, 1, 2, 3, 4, 5, 6, 11]
    ),
    "rows, filled": Typed(
        lambda w, ids: w.at[ids].get(mode="fill", fill_value=2.0, out_sharding=P("data")),
        (12, 8),
        "io",
        P(None, "model"),
        [0, 1, 12, 3, 4, 99, 6, 11],
    ),
    "rows of columns": Typed(
        lambda w, ids: w.at[ids].get(out_sharding=P("data", "model")), (12, 8), "io", P(None, "model"), [0, 11] * 4
    ),
    "heads": Typed(lambda w, x: jnp.einsum("td,dhk->thk", x, w), (8, 4, 3), "ioo", P(None, "model")),
    "out of heads": Typed(
        lambda w, x: jnp.einsum("thk,hkd->td", x, w, out_sharding=P("data")),
        (4, 3, 8),
        "iio",
        P("model"),
        (8, 4, 3),
        P("data", "model"),
    ),
    "experts": Typed(
        lambda w, x: jnp.einsum("edf,etd->etf", w, x), (4, 8, 12), "bio", P("model"), (4, 3, 8), P("model")
    ),
    "layers, outputs": Typed(
        scanned(lambda w, x: jax.reshard(jnp.tanh(x @ w), P("data"))), (3, 8, 8), "bio", P(None, None, "model")
    ),
    "layers, inputs gathered, again": Typed(
        scanned(jax.checkpoint(lambda w, x: jnp.tanh(x @ gathered(w)))), (3, 8, 8), "bio", P(None, "data")
    ),
    "transposed": Typed(lambda w, x: x @ w.T, (12, 8), "oi", P("model")),
    "axes merged": Typed(lambda w, x: x @ w.reshape(8, 12), (8, 4, 3), "ioo", P(None, "model")),
    "axes merged with a word": Typed(
        lambda w, x: x @ lax.reshape(w, (8, 12), out_sharding=P(None, "model")), (8, 4, 3), "ioo", P(None, None, None)
    ),
    "an axis split": Typed(
        lambda w, x: jnp.einsum("td,dhk->thk", x, lax.reshape(w, (8, 4, 3), out_sharding=P(None, "model"))),
        (8, 12),
        "io",
        P(None, "model"),
    ),
    "concatenated with a leaf": Typed(
        lambda w, x: x @ jnp.concatenate([w, jnp.ones((8, 4), out_sharding=P(None, "model"))], 1),
        (8, 12),
        "io",
        P(None, "model"),
    ),
    "repeated": Typed(
        lambda w, x: jnp.einsum("etd,edf->etf", x, jnp.broadcast_to(w, (2, 8, 12))),
        (8, 12),
        "io",
        P(None, "model"),
        (2, 8, 8),
        P(None, "data"),
    ),
    "one of a stack": Typed(lambda w, x: x @ w[1], (3, 8, 12), "bio", P(None, None, "model")),
    "with itself": Typed(lambda w, x: x @ (w @ w.T), (8, 12), "io", P()),
    "with itself, on devices": Typed(
        lambda w, x: x @ jnp.einsum("io,jo->ij", w, w, out_sharding=P()), (8, 12), "io", P(None, "model")
    ),
    "a convolution, outputs": Typed(
        lambda w, x: lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), out_sharding=P("data", None, "model")
        ),
        (3, 8, 12),
        "iio",
        P(None, None, "model"),
        (8, 5, 8),
    ),
    "a convolution": Typed(
        lambda w, x: lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")),
        (3, 8, 12),
        "iio",
        P(),
        (8, 5, 8),
    ),
    "in a jit": Typed(lambda w, x: jax.jit(jnp.matmul)(x, w), (8, 12), "io", P(None, "model")),
    "under vmap": Typed(lambda w, x: jax.vmap(lambda x: x @ w)(x), (8, 12), "io", P(None, "model"), (8, 2, 8)),
    "in part automatic": Typed(
        lambda w, x: jax.sharding.auto_axes(jnp.matmul, out_sharding=P("data", "model"))(x, w),
        (8, 12),
        "io",
        P("data", "model"),
    ),
}


def typed(name: str) -> tuple[Callable[..., Any], Any, Any, jax.Array]:
    case = EXPLICIT[name]
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh(AxisType.Explicit), spec))  # noqa: E731
    x = normal(*case.x, seed=1) if isinstance(case.x, tuple) else jnp.asarray(case.x)
    params = {"w": place(normal(*case.kernel, size=0.5), case.at)}
    adapter = adapted(params, {"w": case.roles})
    adapter = jax.device_put(adapter, lj.sharding.like_base(adapter, params))
    return lambda params, x: case.call(params["w"], x), params, adapter, place(x, case.x_at)


@pytest.mark.parametrize("name", EXPLICIT)
def test_on_an_explicit_mesh_result_and_gradient_match_the_merged_kernel(name: str) -> None:
    with jax.set_mesh(mesh(AxisType.Explicit)):
        apply, params, adapter, x = typed(name)
        assert_law(apply, params, adapter, x)


@pytest.mark.parametrize("form", ["factored", "merged", "hybrid"])
@pytest.mark.parametrize("name", ["inputs, summed and scattered", "out of heads", "layers, inputs gathered, again"])
def test_on_an_explicit_mesh_every_form_has_the_type_of_the_base(name: str, form: Any) -> None:
    with jax.set_mesh(mesh(AxisType.Explicit)):
        apply, params, adapter, x = typed(name)
        loss = lambda adapter: jnp.sum(jnp.sin(lj.lora(apply, form=form)(params, adapter, x)))  # noqa: E731
        out, gradient = jax.eval_shape(
            lambda ad: (lj.lora(apply, form=form)(params, ad, x), jax.grad(loss)(ad)), adapter
        )
        assert jax.typeof(out) == jax.typeof(jax.eval_shape(apply, params, x))
        assert list(map(jax.typeof, jax.tree.leaves(gradient))) == list(map(jax.typeof, jax.tree.leaves(adapter)))


def test_an_eager_step_works_on_an_explicit_mesh() -> None:
    with jax.set_mesh(mesh(AxisType.Explicit)):
        apply, params, adapter, x = typed("outputs")
        assert_close(lj.lora(apply)(params, adapter, x), apply(lj.merge(params, adapter), x))


def test_dropout_masks_have_the_sharding_of_the_activation() -> None:
    with jax.set_mesh(mesh(AxisType.Explicit)):
        apply, params, adapter, x = typed("outputs")
        spec = {"w": lj.LoRA(rank=8, alpha=4, dropout=0.5)}
        adapter = trained(jax.random.key(1), lj.init(jax.random.key(0), params, spec))
        run = jax.jit(lambda key: lj.lora(apply)(params, adapter, x, dropout_key=key))
        some, others = run(jax.random.key(2)), run(jax.random.key(3))
        assert jax.typeof(some) == jax.typeof(apply(params, x))
        assert not jnp.array_equal(some, others)


def test_a_ragged_product_has_the_sharding_of_the_base() -> None:
    """Compares only the value: JAX has no derivative of it on an explicit mesh."""
    with jax.set_mesh(mesh(AxisType.Explicit)):
        params, x = (
            {"w": jax.device_put(normal(2, 8, 12), on_mesh(None, None, "model", kind=AxisType.Explicit))},
            normal(8, 8),
        )
        adapter = adapted(params, {"w": "bio"})
        adapter = jax.device_put(adapter, lj.sharding.like_base(adapter, params))

        def apply(params: Any, x: jax.Array) -> jax.Array:
            return lax.ragged_dot(x, params["w"], jnp.array([3, 5]), out_sharding=P(None, "model"))

        assert_close(jax.jit(lj.lora(apply))(params, adapter, x), apply(lj.merge(params, adapter), x))


class Megatron(nnx.Module):
    """A layer with sharded hidden units, and a sum with the sharding of the activation."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        def start(*names: Any) -> Any:
            return nnx.with_partitioning(nnx.initializers.lecun_normal(), names)

        bias = nnx.with_partitioning(nnx.initializers.zeros, ("model",))
        self.up = nnx.Linear(8, 16, kernel_init=start(None, "model"), bias_init=bias, rngs=rngs)
        self.down = nnx.Linear(16, 8, kernel_init=start("model", None), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(x)), out_sharding=P("data", None))


def test_an_nnx_model_with_sharding_names_can_be_adapted() -> None:
    with jax.set_mesh(mesh(AxisType.Explicit)):
        graph, state = nnx.split(Megatron(nnx.Rngs(0)))
        adapter = trained(jax.random.key(2), lj.init(jax.random.key(1), state, {"**/kernel": lj.LoRA(rank=2, alpha=4)}))
        adapter = jax.device_put(adapter, lj.sharding.like_base(adapter, state))
        assert str(jax.typeof(adapter["down/kernel"].a)) == "float32[16@model,2]"
        x = jax.device_put(normal(8, 8), on_mesh("data", kind=AxisType.Explicit))
        assert_law(lambda state, x: nnx.merge(graph, state)(x), state, adapter, x)


def test_linen_attention_with_sharded_examples_can_be_adapted() -> None:
    model = nn.MultiHeadDotProductAttention(num_heads=4)
    with jax.set_mesh(mesh(AxisType.Explicit)):
        x = jax.device_put(normal(8, 5, 16), on_mesh("data", kind=AxisType.Explicit))
        params = model.init(jax.random.key(0), x)
        adapter = adapted(params, {f"params/{name}/kernel": axes for name, axes in HEADS.items()})
        assert_law(model.apply, params, adapter, x)


HEADS = {"query": "ioo", "value": "ioo", "out": "iio"}
