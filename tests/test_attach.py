"""An adapter that does not belong to the parameters it is called with."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

import lora_jax as lj
from lora_jax._core import attach as _attach

LORA = lj.LoRA(rank=2, alpha=4)
X = jnp.ones((3, 8))
ORDER = "  The arguments come in this order: first `params`, then the adapter."
GIVE = "  Pass the tree that the adapter was initialized from (`variables` is not `variables['params']`)."


def stack(depth: int, width: int = 8) -> dict[str, Any]:
    """The stacked parameters of scanned layers."""
    return {"layers": {"kernel": jnp.ones((depth, width, width)), "bias": jnp.zeros((depth, width))}}


def unrolled(depth: int, width: int = 8) -> dict[str, Any]:
    return {f"layer_{number}": {"kernel": jnp.ones((width, width))} for number in range(depth)}


def apply(params: Any, x: jax.Array) -> jax.Array:
    """A model of any tree, so that only the adapter can be wrong."""
    for leaf in jax.tree.leaves(params):
        if leaf.ndim == 3:
            x, _ = jax.lax.scan(lambda x, kernel: (x[:, : kernel.shape[0]] @ kernel, None), x[:, : leaf.shape[1]], leaf)
        elif leaf.ndim == 2:
            x = x[:, : leaf.shape[0]] @ leaf[: x.shape[1]]
    return x


def init(params: Any, axes: str | None = None, variant: Any = lj.LoRA) -> dict[str, lj.Adapter]:
    return lj.init(jax.random.key(0), params, {"**/kernel": variant(rank=2, alpha=4, axes=axes)})


BASE = unrolled(2)
FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "lora": lambda params, adapter: lj.lora(apply)(params, adapter, X),
    "jit of lora": lambda params, adapter: jax.jit(lj.lora(apply))(params, adapter, X),
    "explain": lambda params, adapter: lj.explain(apply, params, adapter, X),
    "merge": lj.merge,
    "merge_report": lambda params, adapter: lj.merge_report(params, adapter, params),
}


def error(function: str, params: Any, adapter: Any) -> str:
    with pytest.raises(lj.AdapterError) as caught:
        FUNCTIONS[function](params, adapter)
    return str(caught.value)


@pytest.fixture(params=FUNCTIONS)
def function(request: pytest.FixtureRequest) -> str:
    return request.param


def test_an_unknown_path_is_reported_with_the_nearest_path(function: str) -> None:
    assert error(function, BASE, {"layr_1/kernel": init(BASE)["layer_1/kernel"]}) == (
        "Expected an adapter of `params`, with paths of its leaves and matching shapes; got 1 difference.\n"
        "  'layr_1/kernel' is not in `params`; the nearest are 'layer_1/kernel', 'layer_0/kernel'\n" + GIVE
    )


def test_variables_are_not_params(function: str) -> None:
    text = error(function, {"params": BASE}, init(BASE))
    assert (
        "  'layer_0/kernel' is not in `params`; the nearest are 'params/layer_0/kernel', 'params/layer_1/kernel'\n"
        in text
    )
    assert text.endswith(GIVE)


def test_another_width_is_reported_with_shapes(function: str) -> None:
    assert error(function, unrolled(1, width=4), init(unrolled(1))) == (
        "Expected an adapter of `params`, with paths of its leaves and matching shapes; got 1 difference.\n"
        "  'layer_0/kernel' has shape (4, 4), which needs a (4, 2), b (2, 4); the adapter has a (8, 2), b (2, 8)\n"
        + GIVE
    )


def test_a_transposed_kernel_is_reported_with_shapes(function: str) -> None:
    assert "  'kernel' has shape (4, 8), which needs a (4, 2), b (2, 8); the adapter has a (8, 2), b (2, 4)\n" in error(
        function, {"kernel": jnp.ones((4, 8))}, init({"kernel": jnp.ones((8, 4))})
    )


def test_another_depth_of_a_stack_is_reported_with_shapes(function: str) -> None:
    assert (
        "  'layers/kernel' has shape (6, 8, 8), which needs a (6, 8, 2), b (6, 2, 8); the adapter has a (4, 8, 2), "
        "b (4, 2, 8)\n" in error(function, stack(6), init(stack(4), axes="bio"))
    )


@pytest.mark.parametrize(
    ("variant", "axes", "arrays", "text"),
    [
        (lj.Rows(ids=(1, 9)), "io", {"rows": jnp.ones((2, 8))}, "the table has 8 rows, with axes 'io'; got ids=(1, 9)"),
        (
            lj.Layers(layers=(1, 4), variant=LORA),
            "bio",
            {"a": jnp.ones((2, 8, 2)), "b": jnp.ones((2, 2, 8))},
            "expected layers of a leaf of shape (3, 8, 8), axis 0; got Layers(variant=LoRA(rank=2, alpha=4), ",
        ),
        (
            lj.Layers(layers=(0,), variant=lj.Rows(ids=(9,))),
            "bio",
            {"rows": jnp.ones((1, 1, 8))},
            "the table has 8 rows, with axes 'bio'; got ids=(9,)",
        ),
    ],
)
def test_rows_and_layers_that_a_leaf_lacks_are_reported(
    function: str, variant: Any, axes: str, arrays: Any, text: str
) -> None:
    """The shapes of the arrays do not show them: they would add nothing."""
    params = {"leaf": jnp.ones((3, 8, 8) if "b" in axes else (8, 8))}
    assert f"at 'leaf', {text}" in error(function, params, {"leaf": lj.Adapter(variant, axes, **arrays)})


@pytest.mark.parametrize("swapped", ["leaf", "a"])
def test_another_byte_order_is_reported_also_after_a_program_was_compiled(function: str, swapped: str) -> None:
    """The compiled program would read the bytes in the wrong order."""
    arrays = {"leaf": np.ones((8, 8), np.float32), "a": np.ones((8, 2), np.float32), "b": np.ones((2, 8), np.float32)}

    def of(arrays: dict[str, Any]) -> tuple[Any, Any]:
        return {"leaf": arrays["leaf"]}, {"leaf": lj.Adapter(LORA, "io", a=arrays["a"], b=arrays["b"])}

    FUNCTIONS["merge"](*of(arrays))
    params, adapter = of(arrays | {swapped: arrays[swapped].astype(">f4")})
    if function == "jit of lora":  # JAX's own
        with pytest.raises(TypeError):
            FUNCTIONS[function](params, adapter)
    else:
        text = f"'leaf' has another byte order, {swapped!r} in >f4; use astype('float32')"
        assert text in error(function, params, adapter)


def test_the_adapter_of_a_deeper_model_has_unknown_paths(function: str) -> None:
    text = error(function, unrolled(4), init(unrolled(14)))
    assert "got 10 differences.\n  'layer_10/kernel' is not in `params`; the nearest are " in text
    assert text.count(" is not in `params`") == 8
    assert text.endswith("\n  … and 2 more\n" + GIVE)


def test_similar_paths_are_searched_only_for_paths_that_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(_attach, "nearest", lambda path, paths: calls.append(path) or [])
    error("merge", {"params": unrolled(40)}, init(unrolled(40)))
    assert len(calls) == 8


def test_the_adapter_of_a_scanned_model_does_not_fit_one_layer(function: str) -> None:
    adapter = {"layer_0/kernel": init(stack(4), axes="bio")["layers/kernel"]}
    assert "  'layer_0/kernel' has shape (8, 8); the adapter was made for axes 'bio'\n" in error(
        function, BASE, adapter
    )


def test_a_population_is_not_one_adapter(function: str) -> None:
    adapter = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), init(unrolled(1)))
    assert "the adapter has a (2, 8, 2), b (2, 2, 8)\n" in error(function, unrolled(1), adapter)


def test_a_full_leaf_of_another_shape_is_reported(function: str) -> None:
    adapter = lj.init(jax.random.key(0), {"kernel": jnp.ones((8, 3))}, {"kernel": lj.Full()})
    assert "  'kernel' has shape (8, 5), which needs value (8, 5); the adapter has value (8, 3)\n" in error(
        function, {"kernel": jnp.ones((8, 5))}, adapter
    )


def test_a_rank_that_differs_from_the_arrays_is_reported(function: str) -> None:
    part = lj.Adapter(lj.LoRA(rank=4, alpha=4), "io", a=jnp.ones((8, 2)), b=jnp.ones((2, 8)))
    assert "which needs a (8, 4), b (4, 8); the adapter has a (8, 2), b (2, 8)\n" in error(
        function, BASE, {"layer_0/kernel": part}
    )


def test_a_missing_array_is_reported(function: str) -> None:
    part = lj.Adapter(LORA, "io", a=jnp.ones((8, 2)))
    assert "which needs a (8, 2), b (2, 8); the adapter has a (8, 2)\n" in error(
        function, BASE, {"layer_0/kernel": part}
    )


# Values that are not adapters


def test_parameters_in_place_of_the_adapter_are_an_error(function: str) -> None:
    assert error(function, BASE, BASE) == (
        "Expected an adapter: a dict from paths to `Adapter`, as `init` returns; got dict at 'layer_0'.\n" + ORDER
    )


NO_ADAPTERS = {
    "an optimizer's state": (optax.adam(1e-3).init(init(BASE)), "tuple"),
    "None": (None, "NoneType"),
    "a list": ([init(BASE)], "list"),
    "the input": (X, "an array"),
    "one part": (init(BASE)["layer_0/kernel"], "Adapter"),
    "a tree with the adapter": ({"base": BASE, "adapter": init(BASE)}, "dict at 'base'"),
    "frozen parameters": (FrozenDict(BASE), "FrozenDict at 'layer_0'"),
}


@pytest.mark.parametrize("name", NO_ADAPTERS)
def test_a_value_that_is_not_an_adapter_is_an_error_with_its_type(name: str) -> None:
    adapter, got = NO_ADAPTERS[name]
    assert error("lora", BASE, adapter) == (
        f"Expected an adapter: a dict from paths to `Adapter`, as `init` returns; got {got}.\n" + ORDER
    )


def model(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["layer_0"]["kernel"]


def test_explain_reports_swapped_arguments_before_the_model_fails() -> None:
    with pytest.raises(lj.AdapterError) as caught:
        lj.explain(model, init(BASE), BASE, X)
    assert str(caught.value).endswith("got dict at 'layer_0'.\n" + ORDER)


def test_lora_reports_swapped_arguments_before_the_model_fails() -> None:
    with pytest.raises(lj.AdapterError) as caught:
        lj.lora(model)(init(BASE), BASE, X)
    assert str(caught.value).endswith("got dict at 'layer_0'.\n" + ORDER)


# Valid adapters


def test_an_empty_adapter_changes_nothing() -> None:
    np.testing.assert_array_equal(lj.lora(apply)(BASE, {}, X), apply(BASE, X))


@pytest.mark.parametrize("container", [dict, FrozenDict], ids=str)
def test_an_adapter_may_be_any_mapping(container: Any) -> None:
    adapter = container(init(BASE))
    np.testing.assert_array_equal(lj.lora(apply)(BASE, adapter, X), apply(BASE, X))


@pytest.mark.parametrize("kind", [lj.LoRAError, ValueError])
def test_an_adapter_error_is_also_a_built_in_error(kind: type[Exception]) -> None:
    with pytest.raises(kind):
        lj.merge(BASE, BASE)
