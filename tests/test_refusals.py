"""Uses without a low-rank rule: errors with primitive, path and line, or materialized kernels where allowed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dense
from jax import lax
from jax.sharding import AxisType, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from law import Case, adapted, assert_law, normal
from zoo.model import framework

import lora_jax as lj
from lora_jax._transform import registry as _registry
from lora_jax.testing import shapes_made

X = (3, 4)
NO_RULE = "it has no low-rank rule"
CUSTOM = "it is defined for arrays, and has no low-rank rule"


class Refusal(NamedTuple):
    """A use of a kernel that is refused, with the primitive and reason in the error."""

    case: Case
    primitive: str
    reason: str


def matrix(call: Callable[..., Any], primitive: str, reason: str = NO_RULE, *, args: Any = (X,)) -> Refusal:
    return Refusal(Case(call, (4, 4), args, None, "io"), primitive, reason)


@jax.custom_vjp
def scaled(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


scaled.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (3 * kept[1].T @ g, g @ kept[0].T))


@jax.custom_jvp
def rounded(w: jax.Array) -> jax.Array:
    return jnp.round(w * 8) / 8


rounded.defjvps(lambda g, out, w: 2 * g)


ON_DEVICES = {"mesh": jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))}
OTHER_FACTOR = "it is gathered from devices on which the other factor differs, or may differ without `check_vma=True`"
GROUPED = {"dimension_numbers": ("NCH", "OIH", "NCH"), "batch_group_count": 2}
REFUSALS = {
    "a sum with a number": matrix(lambda w, x: x @ (w + 1), "add"),
    "a product with an array": matrix(
        lambda w, x: x @ (w * (x.T @ x)), "mul", "a product with an array that varies along inputs and outputs"
    ),
    "a product with every example": matrix(
        lambda w, x: (x[:, :, None] * w).sum(1), "mul", "a product with an array that varies along inputs and outputs"
    ),
    "a square": matrix(lambda w, x: x @ (w * w), "mul", "a product with an array that varies along inputs and outputs"),
    "a product with a column of itself": matrix(
        lambda w, x: x @ (w * w[:, :1]), "mul", "a product of two kernels, element by element"
    ),
    "a reciprocal": matrix(lambda w, x: x @ (1 / w), "div", "the kernel is the divisor"),
    "concatenated kernels of different roles": matrix(
        lambda w, x: x @ jnp.hstack([w, w.T]),
        "concatenate",
        "a concatenation of kernels with the axes 'io' and 'oi'",
    ),
    "a mask": matrix(lambda w, x: x @ lax.select(x.T @ x > 0, w, w.T), "select_n"),
    "a norm": matrix(lambda w, x: x * (w**2).sum(), "integer_pow"),
    "a sum": matrix(lambda w, x: x * w.sum(), "reduce_sum"),
    "a softmax": matrix(lambda w, x: x @ jnp.exp(w), "exp"),
    "an activation": matrix(lambda w, x: x @ jax.nn.relu(w), "custom_jvp_call", CUSTOM),
    "custom_vjp": matrix(lambda w, x: scaled(w, x), "custom_vjp_call", CUSTOM),
    "custom_jvp": matrix(lambda w, x: x @ rounded(w), "custom_jvp_call", CUSTOM),
    "a merge of input and output": matrix(
        lambda w, x: x @ w.reshape(8, 2)[:4],
        "reshape",
        "a reshape from (4, 4) to (8, 2) merges axes with the roles 'io'",
    ),
    "a cast to integers": matrix(lambda w, x: x @ (w.astype(jnp.int8) + 0.5), "convert_element_type", "a cast to int8"),
    "a convolution in groups of the batch": Refusal(
        Case(lambda w, x: lax.conv_general_dilated(x, w, (1,), "SAME", **GROUPED), (4, 3, 3), [(2, 3, 5)], None, "oii"),
        "conv_general_dilated",
        "a convolution with batch groups",
    ),
    "a ragged product over the kernel": Refusal(
        Case(lambda w, x, sizes: lax.ragged_dot(w, x, sizes), (4, 3), [(2, 3, 5), [1, 3]], None, "io"),
        "ragged_dot_general",
        "the adapted kernel is divided into groups",
    ),
    "a ragged product with groups per batch": Refusal(
        Case(
            lambda w, x, sizes: jax.vmap(lax.ragged_dot)(x, w, sizes),
            (2, 2, 4, 5),
            [(2, *X), [[1, 2]] * 2],
            None,
            "ibio",
        ),
        "ragged_dot_general",
        "groups per batch element and the axes 'bbio'; the adapter has 'ibio'",
    ),
    "a convolution of the kernel": Refusal(
        Case(lambda w, x: lax.conv(w, x, (1,), "SAME"), (2, 3, 5), [(4, 3, 3)], None, "oii"),
        "conv_general_dilated",
        "the adapted kernel is the input of the convolution",
    ),
    "a convolution along other axes": Refusal(
        Case(lambda w, x: lax.conv(x, w, (1,), "SAME"), (4, 3, 2), [(2, 3, 5)], "oii", "ooi"),
        "conv_general_dilated",
        "the convolution has the axes 'oii', the adapter 'ooi'",
    ),
    "a loop that changes it": matrix(
        lambda w, x: lax.fori_loop(0, 2, lambda _, wx: (wx[0].T, wx[1] @ wx[0]), (w, x))[1],
        "scan",
        "the carry of a loop, which changes it",
    ),
    "a loop that swaps it": matrix(
        lambda w, x: lax.fori_loop(0, 3, lambda _, c: (c[1], c[0], c[2] @ c[0]), (w, jnp.eye(4), x))[2],
        "scan",
        "the carry of a loop, which changes it",
    ),
    "a branch that returns it": matrix(
        lambda w, x: x @ lax.cond(x[0, 0] > 0, lambda: w, lambda: w.T), "cond", "a branch returns the kernel itself"
    ),
    "a branch per example": matrix(
        lambda w, x: jax.vmap(lambda x: lax.cond(x[0] > 0, lambda: x @ w, lambda: x))(x), "select_n"
    ),
    "a jit with a sharding that names no axes": matrix(
        lambda w, x: jax.jit(lambda w: x @ w, in_shardings=SingleDeviceSharding(jax.devices()[0]))(w),
        "jit",
        "a sharding of the kernel that does not name its axes",
    ),
    "a shard_map that returns it": matrix(
        lambda w, x: x @ jax.shard_map(lambda w: w.T, in_specs=P("x"), out_specs=P(None, "x"), **ON_DEVICES)(w),
        "shard_map",
        "a shard_map returns the kernel",
    ),
    "a kernel gathered from different columns on each device, unchecked": matrix(
        lambda w, x: jax.shard_map(
            lambda w: x[0, 0] * lax.all_gather(w, "x", axis=0, tiled=True)[None],
            in_specs=P(None, "x"),
            out_specs=P("x"),
            check_vma=False,
            **ON_DEVICES,
        )(w),
        "all_gather",
        OTHER_FACTOR,
    ),
    "a kernel gathered after each device selected different columns, unchecked": matrix(
        lambda w, x: jax.shard_map(
            lambda w: lax.all_gather(
                lax.dynamic_slice_in_dim(w, lax.axis_index("x") * 2, 2, axis=1), "x", axis=0, tiled=True
            )[None],
            in_specs=P("x"),
            out_specs=P("x"),
            check_vma=False,
            **ON_DEVICES,
        )(w),
        "all_gather",
        OTHER_FACTOR,
    ),
    "a kernel gathered after each device scaled the columns, unchecked": matrix(
        lambda w, x: jax.shard_map(
            lambda w: lax.all_gather(w * (lax.axis_index("x") + jnp.arange(4.0)), "x", axis=0, tiled=True)[None],
            in_specs=P("x"),
            out_specs=P("x"),
            check_vma=False,
            **ON_DEVICES,
        )(w),
        "all_gather",
        OTHER_FACTOR,
    ),
    "experts gathered after each device selected different ones, unchecked": Refusal(
        Case(
            lambda w, x: jax.shard_map(
                lambda w: lax.all_gather(w[lax.axis_index("x") + jnp.arange(1)], "x", axis=1, tiled=True)[None],
                in_specs=P(),
                out_specs=P("x"),
                check_vma=False,
                **ON_DEVICES,
            )(w),
            (4, 4, 4),
            [X],
            None,
            "bio",
        ),
        "all_gather",
        OTHER_FACTOR,
    ),
    "a kernel gathered from different columns on each device": matrix(
        lambda w, x: jax.shard_map(
            lambda w: x[0, 0] * lax.all_gather(w, "x", axis=0, tiled=True)[None],
            in_specs=P(None, "x"),
            out_specs=P("x"),
            **ON_DEVICES,
        )(w),
        "all_gather",
        OTHER_FACTOR,
    ),
    "in a scan": Refusal(
        Case(lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ (w + 1)), None), x, w)[0], (2, 4, 4), [X], None, "bio"),
        "add",
        NO_RULE,
    ),
    "in a remat in a jit": matrix(lambda w, x: jax.jit(jax.checkpoint(lambda w, x: x @ (w + 1)))(w, x), "add"),
    "in a branch": matrix(lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ (w + 1), lambda: x), "add"),
}


ALL_DERIVATIVES = ".\n  For all custom derivatives: lora(apply, custom_derivatives='materialize')"


def message(refusal: Refusal, line: str) -> str:
    return (
        f"Cannot apply LoRA to 'w': the model passes it to `{refusal.primitive}`: {refusal.reason}.\n"
        f"  at {line}\n"
        "  Leave it out of the spec, or materialize it there: lora(apply, materialize=['w'])"
        f"{ALL_DERIVATIVES if refusal.primitive.startswith('custom_') else ''}."
    )


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_names_primitive_path_line_and_remedy(name: str) -> None:
    refusal = REFUSALS[name]
    case = refusal.case
    lines, first = inspect.getsourcelines(case.call)
    with pytest.raises(lj.UnsupportedError) as error:
        lj.lora(case.apply)(case.params, case.adapter, *case.arrays)
    at = re.search(rf"^  at ({re.escape(__file__)}:(\d+):\d+ \(\S*<lambda>\S*\))$", str(error.value), re.MULTILINE)
    assert at is not None, error.value
    assert str(error.value) == message(refusal, at[1])
    assert first <= int(at[2]) < first + len(lines)


@pytest.mark.parametrize("name", REFUSALS)
def test_a_kernel_listed_in_materialize_matches_the_merged_kernel(name: str) -> None:
    case = REFUSALS[name].case
    assert_law(case.apply, case.params, case.adapter, *case.arrays, materialize=["w"])


@pytest.mark.parametrize("name", REFUSALS)
def test_explain_shows_where_a_kernel_is_materialized(name: str) -> None:
    case, primitive, _ = REFUSALS[name]
    used = lj.explain(case.apply, case.params, case.adapter, *case.arrays, materialize=["w"]).rows[0].used
    assert f"materialized {primitive} ×" in used


def test_a_kernel_that_is_returned_is_refused() -> None:
    case = Case(lambda w, x: (x @ w, w), (4, 5), [X], "io")
    with pytest.raises(lj.UnsupportedError) as error:
        lj.lora(case.apply)(case.params, case.adapter, *case.arrays)
    refusal = Refusal(case, "return", "the function returns the kernel itself")
    assert str(error.value) == message(refusal, "the result of `apply`")
    assert_law(case.apply, case.params, case.adapter, *case.arrays, materialize=["w"])


FUNCTIONS: dict[str, Callable[[jax.Array], Any]] = {
    "jnp.clip": lambda w: jnp.clip(w, 0, 1),
    "jnp.linalg.norm": lambda w: jnp.linalg.norm(w),
    "jnp.linalg.solve": lambda w: jnp.linalg.solve(w, w),
    "jnp.where": lambda w: jnp.where(jnp.eye(4) > 0, w, 0),
    "jnp.var": lambda w: jnp.var(w, 0),
    "jnp.tril": lambda w: jnp.tril(w),
    "jax.checkpoint of jnp.sin": lambda w: jax.checkpoint(jnp.sin)(w),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_use_inside_a_jax_function_has_the_line_of_the_call(name: str) -> None:
    call = FUNCTIONS[name]
    found = lj.kernels(lambda params: call(params["w"]), {"w": normal(4, 4)})
    assert found["w"].uses[0].line.startswith(f"{__file__}:{call.__code__.co_firstlineno}:")


def test_unused_values_are_not_refused() -> None:
    def model(w: jax.Array, x: jax.Array) -> jax.Array:
        _ = jnp.sum(w * w) + 1  # a norm that would be logged
        return x @ w

    case = Case(model, (4, 5), [X], "io")
    args = (case.params, case.adapter, *case.arrays)
    np.testing.assert_allclose(lj.lora(case.apply)(*args), dense(case.apply)(*args), rtol=1e-4)
    assert [use.primitive for use in lj.kernels(case.apply, case.params, *case.arrays)["w"].uses] == ["dot_general"]


def test_a_refusal_in_a_numpy_function_names_the_line_of_the_call() -> None:
    case = Case(lambda w, x: x @ np.round(w), (4, 5), [X], "io")
    with pytest.raises(lj.UnsupportedError, match=rf"\n  at {re.escape(__file__)}:"):
        lj.lora(case.apply)(case.params, case.adapter, *case.arrays)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_refusal_inside_a_jax_function_names_the_line_of_the_call(name: str) -> None:
    call = FUNCTIONS[name]
    params = {"w": normal(4, 4)}
    with pytest.raises(lj.UnsupportedError, match=rf"\n  at {re.escape(__file__)}:{call.__code__.co_firstlineno}:"):
        lj.lora(lambda params: call(params["w"]))(params, adapted(params, {"w": "io"}))


def test_a_refusal_in_a_layer_of_linen_names_the_model_s_line_and_the_kernel_s_path() -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.Dense(4)(x)
            return nn.Conv(4, (3,), mask=jnp.ones((3, 4, 4)), name="masked")(x)  # refused here

    x = normal(2, 5, 4, seed=1)
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), jax.eval_shape(Model().init, jax.random.key(0), x))
    adapter = adapted(params, {"params/masked/kernel": "iio"})
    with pytest.raises(lj.UnsupportedError) as error:
        lj.lora(Model().apply)(params, adapter, x)
    lines, first = inspect.getsourcelines(Model.__call__)
    line = first + next(number for number, text in enumerate(lines) if "# refused here" in text)
    assert "'params/masked/kernel'" in str(error.value)
    assert re.search(rf"\n  at {re.escape(__file__)}:{line}:\d+ \(\S*Model.__call__\)\n", str(error.value))


def haiku_layer() -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    hk = framework("haiku")

    def model(x: jax.Array) -> jax.Array:
        return hk.Conv1D(4, 3, mask=np.ones((3, 4, 4)))(x)

    net = hk.without_apply_rng(hk.transform(model))
    return model, net.apply, jax.eval_shape(net.init, jax.random.key(0), normal(2, 5, 4))


def equinox_layer() -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    eqx = framework("equinox")
    layer = eqx.filter_eval_shape(lambda key: eqx.nn.WeightNorm(eqx.nn.Linear(4, 4, key=key)), jax.random.key(0))
    params, static = eqx.partition(layer, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(jax.vmap(eqx.combine(params, static)))(x)

    return apply, apply, params


@pytest.mark.parametrize(
    ("make", "path", "axes"), [(haiku_layer, "conv1_d/w", "iio"), (equinox_layer, "layer/weight", "oi")]
)
def test_a_refusal_in_a_layer_of_another_framework_names_the_model_s_line(make: Any, path: str, axes: str) -> None:
    model, apply, shapes = make()
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), shapes)
    line = model.__code__.co_firstlineno + 1
    with pytest.raises(lj.UnsupportedError, match=rf"{path!r}(.|\n)*\n  at {re.escape(__file__)}:{line}:"):
        lj.lora(apply)(params, adapted(params, {path: axes}), normal(2, 5, 4))


@jax.custom_vjp
def product(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


def many_refused(params: Any, x: jax.Array) -> jax.Array:
    x = jax.jit(lambda x, w: product(x, w))(x, params["a"])
    x = lax.scan(lambda x, w: (product(x, w), None), x, params["stack"])[0]
    return product(x @ params["fine"] @ jnp.sin(params["b"]), params["a"])


MANY = {"a": normal(4, 4), "b": normal(4, 4, seed=1), "fine": normal(4, 4, seed=2), "stack": normal(2, 4, 4, seed=3)}
MANY_ADAPTED = adapted(MANY, {"a": "io", "b": "io", "fine": "io", "stack": "bio"})


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_one_error_lists_all_refused_kernels(jit: bool) -> None:
    function = lj.lora(many_refused)
    with pytest.raises(lj.UnsupportedError) as error:
        (jax.jit(function) if jit else function)(MANY, MANY_ADAPTED, normal(3, 4))
    text = str(error.value)
    assert text.startswith(
        "Cannot apply LoRA to 3 kernels:\n"
        "  'a', passed to `custom_vjp_call`: it is defined for arrays, and has no low-rank rule.\n"
        f"    at {__file__}:"
    )
    assert "\n  'stack', passed to `custom_vjp_call`: " in text
    assert f"\n  'b', passed to `sin`: {NO_RULE}.\n    at {__file__}:" in text
    assert text.endswith(
        "\n  Leave them out of the spec, or materialize them there: lora(apply, materialize=['a', 'stack', 'b'])"
        f"{ALL_DERIVATIVES}."
    )
    assert_law(many_refused, MANY, MANY_ADAPTED, normal(3, 4), materialize=["a", "stack", "b"])


def test_explain_shows_refused_kernels_as_rows() -> None:
    table = lj.explain(many_refused, MANY, MANY_ADAPTED, normal(3, 4), form="factored")
    assert {row.path: row.used for row in table.rows} == {
        "a": "refused custom_vjp_call ×2",
        "b": "refused sin ×1",
        "fine": "factored dot_general ×1",
        "stack": "refused custom_vjp_call ×2",
    }
    assert "`lora` raises an error for 3 leaves; to materialize them there: materialize=['a', 'stack', 'b']" in str(
        table
    )
    with pytest.raises(lj.UnsupportedError, match="to 3 kernels:"):
        lj.explain(many_refused, MANY, MANY_ADAPTED, normal(3, 4), strict=True)


def test_listing_refusals_evaluates_nothing() -> None:
    ran: list[int] = []

    def model(params: Any, x: jax.Array) -> jax.Array:
        x = product(x, params["a"])
        jax.debug.callback(lambda: ran.append(1))
        return product(x, params["b"])

    params = {path: MANY[path] for path in ("a", "b")}
    with pytest.raises(lj.UnsupportedError, match="to 2 kernels:"):
        lj.lora(model)(params, adapted(params, {"a": "io", "b": "io"}), normal(3, 4))
    jax.effects_barrier()
    assert ran == []


def test_a_refusal_is_an_error_of_the_library_and_of_python() -> None:
    assert issubclass(lj.UnsupportedError, lj.LoRAError)
    assert issubclass(lj.UnsupportedError, NotImplementedError)


def test_a_refusal_needs_shapes_only() -> None:
    case = REFUSALS["a sum with a number"].case
    shapes = jax.eval_shape(lambda: (case.params, case.adapter, *case.arrays))
    with pytest.raises(lj.UnsupportedError):
        jax.eval_shape(lj.lora(case.apply), *shapes)


# What `materialize` allows


def two_kernels(params: Any, x: jax.Array) -> jax.Array:
    return x @ (params["block"]["one"] + 2) @ (params["block"]["two"] + 2)


PARAMS = {"block": {"one": normal(4, 5), "two": normal(5, 6, seed=1)}}


@pytest.mark.parametrize(
    "materialize",
    [
        ["block/one", "block/two"],
        ["block/*"],
        ["**"],
        ["block/{one,two}"],
        [re.compile("block/.*")],
        ("**/one", "**/t*"),
    ],
    ids=str,
)
def test_materialize_accepts_patterns(materialize: Any) -> None:
    adapter = adapted(PARAMS, {"block/one": "io", "block/two": "io"})
    assert_law(two_kernels, PARAMS, adapter, normal(*X, seed=2), materialize=materialize)


def test_only_listed_kernels_are_materialized() -> None:
    adapter = adapted(PARAMS, {"block/one": "io", "block/two": "io"})
    with pytest.raises(lj.UnsupportedError, match="to 'block/two'"):
        lj.lora(two_kernels, materialize=["block/one"])(PARAMS, adapter, normal(*X, seed=2))


def test_a_listed_kernel_stays_factored_where_possible() -> None:
    case = Case(lambda w, x: x @ w, (7, 5), [(3, 7)], "io")
    adapted = lj.lora(case.apply, materialize=["w"], form="factored")
    assert (7, 5) not in shapes_made(adapted, case.params, case.adapter, *case.arrays)


def test_explain_lists_every_use_of_a_kernel() -> None:
    case = Case(lambda w, x: (x @ w, w.sum()), (7, 5), [(3, 7)], "io")
    used = lj.explain(case.apply, case.params, case.adapter, *case.arrays, materialize=["w"]).rows[0].used
    assert used == "factored dot_general ×1, materialized reduce_sum ×1"


def test_a_kernel_materialized_in_a_scan_is_counted_for_every_iteration() -> None:
    case = REFUSALS["in a scan"].case
    row = lj.explain(case.apply, case.params, case.adapter, *case.arrays, materialize=["w"]).rows[0]
    assert row.used == "materialized add ×2"


# What `kernels` reports


def test_kernels_reports_an_opaque_use_with_its_primitive_and_line() -> None:
    call = lambda w: jnp.exp(w)  # noqa: E731
    (use,) = lj.kernels(lambda params: call(params["w"]), {"w": normal(4, 4)})["w"].uses
    assert (use.kind, use.primitive, use.axes, use.times) == ("opaque", "exp", None, 1)
    assert use.line.startswith(f"{__file__}:{call.__code__.co_firstlineno}:")


def test_kernels_finds_the_roles_of_a_kernel_with_an_opaque_use() -> None:
    found = lj.kernels(lambda params, x: x @ params["w"] + (params["w"] ** 2).sum(), {"w": normal(4, 5)}, normal(*X))
    assert found["w"].axes == "io"
    assert [use.kind for use in found["w"].uses] == ["factored", "opaque"]


def test_kernels_finds_no_roles_of_a_leaf_that_is_not_contracted() -> None:
    params = {
        "w": normal(4, 5),
        "bias": normal(5),
        "steps": jnp.int32(1),
        "flags": jnp.ones(3, bool),
        "unused": normal(2),
    }

    def model(params: Any, x: jax.Array) -> Any:
        return x @ params["w"] + params["bias"], params["steps"] + 1, ~params["flags"]

    found = lj.kernels(model, params, normal(*X))
    assert {path: kernel.axes for path, kernel in found.items()} == {
        "w": "io",
        "bias": None,
        "steps": None,
        "flags": None,
        "unused": None,
    }
    assert found["unused"].uses == ()


INTEGERS: dict[str, tuple[Callable[[jax.Array, jax.Array], jax.Array], str]] = {
    "an offset": (lambda n, x: x[jnp.arange(2) + n], "add"),
    "an index": (lambda n, x: x.at[n[None]].get(mode="clip", wrap_negative_indices=False), "gather"),
    "a start": (lambda n, x: lax.dynamic_slice(x, (n, n), (1, 1), allow_negative_indices=False), "dynamic_slice"),
    "a branch": (lambda n, x: lax.switch(n, [lambda: x, lambda: -x]), "clamp"),
    "a number of iterations": (lambda n, x: lax.fori_loop(0, n, lambda _, x: x + 1, x), "lt"),
    "a seed": (lambda n, x: x + jax.random.normal(jax.random.key(n), x.shape), "random_seed"),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_kernels_follows_an_integer_leaf_to_its_use(name: str) -> None:
    call, primitive = INTEGERS[name]
    found = lj.kernels(lambda params, x: call(params["n"], x), {"n": jnp.int32(1)}, normal(*X))
    assert {(use.kind, use.primitive) for use in found["n"].uses} == {("opaque", primitive)}


@pytest.mark.parametrize("name", _registry.RULES)
def test_a_rule_names_every_parameter_so_that_a_new_one_is_an_error(name: str) -> None:
    _, rule = _registry.RULES[name]
    kinds = {parameter.kind for parameter in inspect.signature(rule).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds


def test_all_custom_derivatives_are_allowed_at_once(key: jax.Array) -> None:
    apply = lambda params, x: product(product(x, params["a"]), params["fine"]) @ params["b"]  # noqa: E731
    with pytest.raises(lj.UnsupportedError, match="custom_derivatives='materialize'"):
        lj.lora(apply)(MANY, MANY_ADAPTED, normal(3, 4))
    run = lj.lora(apply, custom_derivatives="materialize", form="factored")
    expected = apply(lj.merge(MANY, MANY_ADAPTED), normal(3, 4))
    np.testing.assert_allclose(run(MANY, MANY_ADAPTED, normal(3, 4)), expected, rtol=1e-4)


def test_allowing_custom_derivatives_allows_nothing_else() -> None:
    with pytest.raises(lj.UnsupportedError, match=r"'b'.*`sin`") as error:
        lj.lora(many_refused, custom_derivatives="materialize")(MANY, MANY_ADAPTED, normal(3, 4))
    assert "'a'" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"custom_derivatives": True}, "Expected `custom_derivatives` to be 'refuse' or 'materialize'; got True."),
        ({"materialize": "**"}, "Expected a list of patterns for `materialize`; got '\\*\\*'."),
    ],
)
def test_invalid_options_are_errors_when_the_function_is_made(options: Any, text: str) -> None:
    with pytest.raises(lj.SpecError, match=text):
        lj.lora(many_refused, **options)


def test_a_model_parameter_named_like_a_keyword_of_lora_is_an_error() -> None:
    with pytest.raises(lj.SpecError, match="to have no parameter named 'dropout_key'"):
        lj.lora(lambda params, x, dropout_key=None: x @ params["w"])
