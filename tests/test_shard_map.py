"""Models that distribute their computation: `shard_map`, shardings of a `jit`, `vmap` with `spmd_axis_name`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dense, sweep_except
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from law import Case, adapted, assert_case, assert_close, assert_law, normal, total

import lora_jax as lj
from lora_jax import many


def mesh(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


def mapped(function: Callable[..., Any], *in_specs: P, out: Any, **options: Any) -> Callable[..., Any]:
    return jax.shard_map(function, mesh=mesh(), in_specs=in_specs, out_specs=out, **options)


def multiply(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


def summed(w: jax.Array, x: jax.Array) -> jax.Array:
    return lax.psum(x @ w, "x")


def gathered(axis: int, *, tiled: bool = True, name: Any = "x") -> Callable[..., Any]:
    return lambda w, x: jnp.tanh(x @ lax.all_gather(w, name, axis=axis, tiled=tiled))


def stack(w: jax.Array, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(lax.psum_scatter(x @ w, "x", scatter_dimension=1, tiled=True)), None

    return lax.scan(layer, x, w)[0]


def feed_forward(w: jax.Array, x: jax.Array) -> jax.Array:
    """The feed-forward layer of Megatron, with sharded hidden units."""
    return lax.psum(jnp.tanh(x @ w) @ w.T, "x")


X = (8, 8)
SHARD_MAPS = {
    "replicated": Case(mapped(multiply, P(), P("x"), out=P("x")), (8, 12), [X], "io"),
    "replicated, closed over": Case(lambda w, x: mapped(lambda x: x @ w, P("x"), out=P("x"))(x), (8, 12), [X], "io"),
    "input on devices": Case(mapped(summed, P("x"), P(None, "x"), out=P()), (8, 12), [X], "io"),
    "output on devices": Case(mapped(multiply, P(None, "x"), P(), out=P(None, "x")), (8, 12), [X], "io"),
    "input and output on devices": Case(
        mapped(summed, P("x", "y"), P(None, "x"), out=P(None, "y")), (8, 12), [X], "io"
    ),
    "input on all devices": Case(
        mapped(lambda w, x: lax.psum(x @ w, ("x", "y")), P(("x", "y")), P(None, ("x", "y")), out=P()),
        (8, 12),
        [X],
        "io",
    ),
    "experts on devices": Case(
        mapped(lambda w, x: jnp.einsum("edf,etd->etf", w, x), P("x"), P("x"), out=P("x")),
        (4, 8, 12),
        [(4, 3, 8)],
        "bio",
    ),
    "heads on devices": Case(
        mapped(lambda w, x: jnp.einsum("dhk,td->thk", w, x), P(None, "x"), P(), out=P(None, "x")), (8, 4, 3), [X], "ioo"
    ),
    "up and down": Case(mapped(feed_forward, P(None, "x"), P(), out=P()), (8, 12), [X], "io"),
    "transposed": Case(mapped(lambda w, x: x @ w.T, P("x"), P(), out=P(None, "x")), (12, 8), [X], "oi"),
    "in a scan": Case(mapped(stack, P(None, "x"), P(None, "x"), out=P(None, "x")), (3, 8, 8), [X], "bio"),
    "of a scan": Case(
        lambda w, x: lax.scan(lambda x, w: (mapped(summed, P("x"), P(None, "x"), out=P())(w, x), None), x, w)[0],
        (3, 8, 8),
        [X],
        "bio",
    ),
    "one axis of the mesh by hand": Case(
        mapped(summed, P("x"), P(None, "x"), out=P(), axis_names={"x"}), (8, 12), [X], "io"
    ),
    "unchecked": Case(mapped(summed, P("x"), P(None, "x"), out=P(), check_vma=False), (8, 12), [X], "io"),
    "unchecked, output on devices": Case(
        mapped(multiply, P(None, "x"), P("y"), out=P("y", "x"), check_vma=False), (8, 12), [X], "io"
    ),
    "in jit in remat": Case(
        lambda w, x: jax.checkpoint(jax.jit(mapped(summed, P("x"), P(None, "x"), out=P())))(w, x), (8, 12), [X], "io"
    ),
    "a lookup": Case(
        mapped(lambda w, ids: w[ids], P(None, "x"), P("y"), out=P("y", "x")), (6, 12), [[0, 5, 2, 1]], "io"
    ),
    "gathered inputs": Case(mapped(gathered(0), P("x"), P("x"), out=P("x")), (8, 12), [X], "io"),
    "gathered outputs": Case(mapped(gathered(1), P(None, "x"), P("x"), out=P("x")), (8, 12), [X], "io"),
    "gathered over all devices": Case(
        mapped(gathered(0, name=("x", "y")), P(("x", "y")), P(("x", "y")), out=P(("x", "y"))), (8, 12), [X], "io"
    ),
    "gathered, then transposed": Case(
        mapped(lambda w, x: x @ lax.all_gather(w, "x", axis=0, tiled=True).T, P("x"), P("x"), out=P("x")),
        (12, 8),
        [X],
        "oi",
    ),
    "gathered and concatenated": Case(
        mapped(
            lambda w, x: jnp.einsum("td,edf->tef", x, lax.all_gather(w, "x", axis=0)), P(None, "x"), P("x"), out=P("x")
        ),
        (8, 12),
        [X],
        "io",
    ),
    "gathered layer by layer": Case(
        mapped(
            lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ lax.all_gather(w, "x", tiled=True)), None), x, w)[0],
            P(None, "x"),
            P("x"),
            out=P("x"),
        ),
        (3, 8, 8),
        [X],
        "bio",
    ),
    "gathered outputs, concatenated in the middle": Case(
        mapped(
            lambda w, x: jnp.einsum("td,def->tef", x, lax.all_gather(w, "x", axis=1)), P(None, "x"), P("x"), out=P("x")
        ),
        (8, 12),
        [X],
        "io",
    ),
}


def gathered_along_both_axes(w: jax.Array, x: jax.Array) -> jax.Array:
    """Gathers rows along one axis of the mesh and columns along the other."""
    return x @ lax.all_gather(lax.all_gather(w, "x", axis=0, tiled=True), "y", axis=1, tiled=True)


def gathered_in_parts(w: jax.Array, x: jax.Array) -> jax.Array:
    """Gathers an axis that is sharded over all devices, one axis of the mesh at a time."""
    return x @ lax.all_gather(lax.all_gather(w, "y", axis=0, tiled=True), "x", axis=0, tiled=True)


def gathered_in_a_jit(w: jax.Array, x: jax.Array) -> jax.Array:
    return jax.checkpoint(jax.jit(gathered(0)))(w, x)


def gathered_by_layer(w: jax.Array, x: jax.Array) -> jax.Array:
    return lax.scan(lambda x, w: (gathered(0)(w, x), None), x, w)[0]


def gathered_and_concatenated(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ lax.all_gather(jnp.concatenate([w, 2 * w], axis=1), "x", axis=0, tiled=True)


def gathered_after_moves(w: jax.Array, x: jax.Array) -> jax.Array:
    """Sliced, reshaped, transposed, padded and scaled on each device, then gathered."""
    w = jnp.pad(w[:, 1:9].reshape(2, 2, 4).T / 2, ((1, 0), (0, 0), (0, 0)))
    return jnp.einsum("td,abd->tab", x, lax.all_gather(w, "x", axis=2, tiled=True))


def gathered_in_groups(w: jax.Array, x: jax.Array) -> jax.Array:
    return x[:, :4] @ lax.all_gather(w, "x", axis=0, tiled=True, axis_index_groups=[[0, 1], [2, 3]])


def unchecked(function: Callable[..., Any], *in_specs: P, out: P, kernel: Any = (8, 12), roles: str = "io") -> Case:
    return Case(mapped(function, *in_specs, out=out, check_vma=False), kernel, [X], roles)


UNCHECKED = {
    "inputs": unchecked(gathered(0), P("x"), P("x"), out=P("x")),
    "outputs": unchecked(gathered(1), P(None, "x"), P("x"), out=P("x")),
    "outputs, with sharded inputs": unchecked(
        lambda w, x: lax.psum(x @ lax.all_gather(w, "x", axis=1, tiled=True), "y"), P("y", "x"), P(None, "y"), out=P()
    ),
    "inputs and outputs": unchecked(gathered_along_both_axes, P("x", "y"), P("x"), out=P("x")),
    "inputs from all devices": unchecked(gathered(0, name=("x", "y")), P(("x", "y")), P("x"), out=P("x")),
    "inputs from all devices, in two steps": unchecked(gathered_in_parts, P(("x", "y")), P("x"), out=P("x")),
    "what all devices have": unchecked(
        lambda w, x: x @ lax.all_gather(w, "x", axis=0, tiled=True)[:8], P(), P("x"), out=P("x")
    ),
    "concatenated": unchecked(
        lambda w, x: jnp.einsum("td,edf->tef", x, lax.all_gather(w, "x", axis=0)), P(None, "x"), P("x"), out=P("x")
    ),
    "concatenated, then outputs": unchecked(
        lambda w, x: jnp.einsum(
            "td,edf->tef", x, lax.all_gather(lax.all_gather(w, "x", axis=0), "y", axis=2, tiled=True)
        ),
        P(None, ("x", "y")),
        P("x"),
        out=P("x"),
        kernel=(8, 16),
    ),
    "in a remat of a jit": unchecked(gathered_in_a_jit, P("x"), P("x"), out=P("x")),
    "layer by layer": unchecked(gathered_by_layer, P(None, "x"), P("x"), out=P("x"), kernel=(3, 8, 8), roles="bio"),
    "two kernels, concatenated": unchecked(gathered_and_concatenated, P("x"), P("x"), out=P("x")),
    "after moves": unchecked(gathered_after_moves, P("x"), P("x"), out=P("x")),
    "in groups of devices": unchecked(gathered_in_groups, P("x"), P(), out=P("x")),
}
SHARD_MAPS |= {f"unchecked, gathered {name}": case for name, case in UNCHECKED.items()}


@pytest.mark.parametrize("name", sweep_except([*SHARD_MAPS][::4], SHARD_MAPS))
def test_a_shard_map_matches_the_merged_kernel(name: str) -> None:
    assert_case(SHARD_MAPS[name])


@pytest.mark.parametrize("name", SHARD_MAPS)
def test_kernels_finds_the_role_of_each_axis(name: str) -> None:
    case = SHARD_MAPS[name]
    assert lj.kernels(case.apply, case.params, *case.arrays)["w"].axes == case.roles


def test_factors_on_an_explicit_mesh_keep_their_shardings() -> None:
    explicit = mesh(AxisType.Explicit)
    place = lambda x, spec: jax.device_put(x, NamedSharding(explicit, spec))  # noqa: E731

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return jax.shard_map(summed, mesh=explicit, in_specs=(P("x"), P(None, "x")), out_specs=P())(params["w"], x)

    with jax.set_mesh(explicit):
        params, x = {"w": place(normal(8, 12), P("x"))}, place(normal(*X, seed=1), P(None, "x"))
        assert_law(apply, params, adapted(params, {"w": "io"}), x)


def split_by_device(w: jax.Array, x: jax.Array) -> jax.Array:
    """Each device slices a replicated kernel."""
    first = lax.axis_index("x") * 3
    return x @ lax.dynamic_slice_in_dim(w, first, 3, axis=1)


def test_a_slice_by_device_index_matches_the_merged_kernel() -> None:
    assert_case(Case(mapped(split_by_device, P(), P("y"), out=P("y", "x")), (8, 12), [X], "io"))


# Shardings of a `jit`


def layers(w: jax.Array, x: jax.Array) -> jax.Array:
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def sharding(*spec: Any) -> NamedSharding:
    return NamedSharding(mesh(), P(*spec))


SHARDINGS = {
    "of the input": Case(
        lambda w, x: jax.jit(multiply, in_shardings=(sharding("x"), sharding()))(w, x), (8, 12), [X], "io"
    ),
    "of the output": Case(
        lambda w, x: jax.jit(multiply, in_shardings=(sharding(None, "y"), None))(w, x), (8, 12), [X], "io"
    ),
    "of both": Case(
        lambda w, x: jax.jit(multiply, in_shardings=(sharding("y", "x"), None), out_shardings=sharding(None, "x"))(
            w, x
        ),
        (8, 12),
        [X],
        "io",
    ),
    "of layers": Case(
        lambda w, x: jax.jit(
            lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0],
            in_shardings=(sharding("y", "x"), None),
        )(w, x),
        (2, 8, 8),
        [X],
        "bio",
    ),
    "of a kernel that is returned": Case(
        lambda w, x: x @ jax.jit(lambda w: w.T, out_shardings=sharding(None, "x"))(w), (12, 8), [X], "oi"
    ),
    "of a kernel that is returned with an array": Case(
        lambda w, x: multiply(*jax.jit(lambda w, x: (w, x + 1), out_shardings=(sharding("x"), None))(w, x)),
        (8, 12),
        [X],
        "io",
    ),
}


@pytest.mark.parametrize("name", SHARDINGS)
def test_a_jit_with_shardings_matches_the_merged_kernel(name: str) -> None:
    case = SHARDINGS[name]
    assert_case(case)
    assert lj.kernels(case.apply, case.params, *case.arrays)["w"].axes == case.roles


def jit_equation(case: Case) -> Any:
    jaxpr = jax.make_jaxpr(lj.lora(case.apply))(case.params, case.adapter, *case.arrays)
    return next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "jit")


def test_a_sharding_of_the_kernel_applies_to_the_factors() -> None:
    asked = {
        var.aval.shape: sharding.spec
        for var, sharding in zip(
            jit_equation(SHARDINGS["of layers"]).invars,
            jit_equation(SHARDINGS["of layers"]).params["in_shardings"],
            strict=True,
        )
        if isinstance(sharding, NamedSharding)
    }
    assert asked == {(2, 8, 8): P("y", "x"), (2, 8, 2): P("y", "x", None), (2, 2, 8): P("y", None, None)}


def test_a_kernel_that_a_jit_donates_is_kept() -> None:
    case = Case(lambda w, x: jax.jit(multiply, donate_argnums=(0, 1))(w, x + 1), (4, 4), [(4, 4)], "io")
    assert_case(case)
    assert jit_equation(case).params["donated_invars"] == (False, False, False, True)
    params, adapter = case.params, case.adapter
    for _ in range(2):
        lj.lora(case.apply)(params, adapter, *case.arrays).block_until_ready()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, adapter)))


# A `shard_map` around `lora`

NEED_ALL = {
    "i": [
        lj.DoRA(rank=2, alpha=3),
        lj.DeLoRA(rank=2),
        lj.VeRA(rank=3, seed=0),
        lj.MiSS(rank=3),
        lj.Rows(ids=[1]),
        many.Gate(),
    ],
    "o": [lj.DeLoRA(rank=2), lj.VeRA(rank=3, seed=0)],
    "": [lj.DoRA(rank=2, alpha=3), many.Gate()],
}


@pytest.mark.parametrize("role", NEED_ALL)
def test_a_variant_that_needs_all_of_a_kernel_refuses_a_shard(role: str) -> None:
    # Each shard had norms, row numbers or router weights of its own, so that the result was wrong.
    params, key = {"w": jnp.zeros((4, 8, 12))}, jax.random.key(0)

    def make(params: Any, variant: Any) -> Any:
        if not isinstance(variant, many.Gate):
            return lj.init(key, params, {"w": dataclasses.replace(variant, axes="bio")})
        return many.mixture({"one": make(params, lj.LoRA(rank=2, alpha=3))}, variant)

    def refused(variant: Any, sharded: str) -> bool:
        adapter = jax.eval_shape(functools.partial(make, variant=variant), params)
        along, layout = "bio".index(sharded), adapter["w"].variant.layout("bio")
        specs = {name: P(*("x" if axis == along else None for axis in axes)) for name, axes in layout.items()}
        kernel = P(*("x" if axis == along else None for axis in range(3)))
        in_specs = {"w": kernel}, {"w": lj.Adapter(adapter["w"].variant, "bio", **specs)}

        def apply(params: Any) -> jax.Array:
            return jnp.ones((params["w"].shape[0], 2, params["w"].shape[1])) @ params["w"]

        run = jax.shard_map(lj.lora(apply), mesh=mesh(), in_specs=in_specs, out_specs=P("x"))
        try:
            jax.eval_shape(run, params, adapter)
        except lj.UnsupportedError as error:
            assert "1 shard inside a `shard_map`.\n  'w', over ['x']: " in str(error)
            return True
        return False

    assert all(refused(variant, role or "b") == bool(role) for variant in NEED_ALL[role])


@pytest.mark.parametrize(
    ("variant", "axes"),
    [(lj.LoRA(rank=1, alpha=1), "bio"), (lj.MiSS(rank=2), "bio"), (lj.Full(), "")],
)
def test_some_layers_of_a_stack_refuse_a_shard_of_its_layers(variant: Any, axes: str) -> None:
    # The layers of each shard were numbered from 0, so that others were adapted.
    layers = lj.Layers(layers=(0,), variant=variant)
    shapes = layers.shapes((4, 6, 8), axes)
    adapter = {"w": lj.Adapter(layers, axes, **{name: jnp.ones(shape) for name, shape in shapes.items()})}

    def run(spec: P, of_arrays: P) -> Any:
        merge = lambda w, adapter: lj.merge({"w": w}, adapter)["w"]  # noqa: E731
        mapped = jax.shard_map(merge, mesh=mesh(), in_specs=(spec, of_arrays), out_specs=spec)
        return jax.eval_shape(mapped, jnp.zeros((4, 6, 8)), adapter)

    with pytest.raises(lj.UnsupportedError, match=r"1 shard inside a `shard_map`.\n  'w', over \['x'\]: Layers"):
        run(P("x"), P())
    assert run(P(), P()).shape == (4, 6, 8)
    if axes:  # along the outputs
        arrays = {name: P(*("x" if axis == 2 else None for axis in of)) for name, of in layers.layout(axes).items()}
        run(P(None, None, "x"), {"w": lj.Adapter(layers, axes, **arrays)})
    else:
        run(P(None, None, "x"), P(None, None, "x"))


# `vmap` with `spmd_axis_name`


def constrained(w: jax.Array, x: jax.Array) -> jax.Array:
    return lax.with_sharding_constraint(
        jnp.tanh(x @ lax.with_sharding_constraint(w, sharding("y"))), sharding(None, "y")
    )


SPMD = {
    "over activations": Case(
        lambda w, x: jax.vmap(constrained, (None, 0), spmd_axis_name="x")(w, x), (8, 12), [(4, 3, 8)], "io"
    ),
    "over experts": Case(lambda w, x: jax.vmap(constrained, spmd_axis_name="x")(w, x), (4, 8, 12), [(4, 3, 8)], "bio"),
    "over experts on axis 1": Case(
        lambda w, x: jax.vmap(constrained, (1, 0), spmd_axis_name="x")(w, x), (8, 4, 12), [(4, 3, 8)], "ibo"
    ),
    "over a shard_map": Case(
        lambda w, x: jax.vmap(
            mapped(lambda w, x: lax.psum(x @ w, "y"), P("y"), P(None, "y"), out=P()), spmd_axis_name="x"
        )(w, x),
        (4, 8, 12),
        [(4, 3, 8)],
        "bio",
    ),
}


@pytest.mark.parametrize("name", SPMD)
def test_a_vmap_over_devices_inside_the_model_matches_the_merged_kernel(name: str) -> None:
    case = SPMD[name]
    with jax.set_mesh(mesh()):
        assert_case(case)
    assert lj.kernels(case.apply, case.params, *case.arrays)["w"].axes == case.roles


@pytest.mark.parametrize("axes", [(None, 0), (0, None), (0, 0)], ids=["x", "adapters", "both"])
def test_a_vmap_over_devices_around_the_model_matches_the_merged_model(axes: Any) -> None:
    case = Case(constrained, (8, 12), [(4, 3, 8)], "io")
    adapter = case.adapter if axes[0] is None else jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), case.adapter)
    (x,) = case.arrays if axes[1] == 0 else (case.arrays[0][0],)

    def run(function: Any) -> Any:
        call = functools.partial(function, case.params)
        gradient = lambda adapter, x: jax.grad(lambda adapter: total(call(adapter, x)))(adapter)  # noqa: E731
        both = lambda adapter, x: (call(adapter, x), gradient(adapter, x))  # noqa: E731
        return jax.jit(jax.vmap(both, axes, spmd_axis_name="x"))(adapter, x)

    with jax.set_mesh(mesh()):
        assert_close(run(lj.lora(case.apply)), run(dense(case.apply)))


def test_each_shard_of_the_activation_has_its_own_dropout() -> None:
    params, x = {"w": normal(4, 5)}, jnp.ones((8, 4))
    adapter = {"w": lj.Adapter(lj.LoRA(rank=2, alpha=3, dropout=0.5), "io", **adapted(params, {"w": "io"})["w"].arrays)}

    def masks(x_spec: P, **options: Any) -> int:
        split = mapped(lambda w, x: x @ w, P(), x_spec, out=x_spec, **options)
        run = lj.lora(lambda params, x: split(params["w"], x))
        got = run(params, adapter, x, dropout_key=jax.random.key(0)) - run(params, {}, x)
        shards = got.reshape(4, 2, 5)
        return len({shard.tobytes() for shard in np.asarray(shards)})

    assert masks(P("x")) == 4
    assert masks(P("x"), check_vma=False) == 1


def test_a_gathered_kernel_keeps_its_gain() -> None:
    """DoRA has a gain per output: replicated if inputs are sharded, and sharded if outputs are."""
    params, x = {"w": normal(8, 12)}, normal(*X, seed=1)
    adapter = lj.init(jax.random.key(0), params, {"w": lj.DoRA(rank=2, alpha=3, axes="io")})
    adapter = jax.tree.map(lambda leaf: leaf + normal(*leaf.shape, seed=2, size=0.2), adapter)
    for name in ("inputs", "outputs", "inputs and outputs"):
        assert_law(UNCHECKED[name].apply, params, adapter, x)
