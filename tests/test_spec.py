"""Which variant each leaf gets, and the text of every error a spec can be."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj

LORA = lj.LoRA(rank=2, alpha=4)
OTHER = lj.RSLoRA(rank=1, alpha=1)


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


PARAMS = {
    "encoder": {
        "layer_0": {
            "query": {"kernel": shape(8, 6), "bias": shape(6)},
            "value": {"kernel": shape(8, 6), "bias": shape(6)},
            "norm": {"scale": shape(8), "bias": shape(8)},
        }
    },
    "head": {"kernel": shape(8, 3)},
}
QUERY, VALUE, HEAD = "encoder/layer_0/query/kernel", "encoder/layer_0/value/kernel", "head/kernel"


def init(spec: Any, params: Any = PARAMS, **kwargs: Any) -> dict[str, lj.Adapter]:
    return lj.init(jax.random.key(0), params, spec, **kwargs)


def chosen(spec: Any) -> dict[str, Any]:
    return {path: part.variant for path, part in init(spec).items()}


def error(spec: Any, params: Any = PARAMS, **kwargs: Any) -> str:
    with pytest.raises(lj.SpecError) as caught:
        init(spec, params, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"**/kernel": LORA}, {QUERY: LORA, VALUE: LORA, HEAD: LORA}),
        ({"**/query/kernel": OTHER, "**/kernel": LORA}, {QUERY: OTHER, VALUE: LORA, HEAD: LORA}),
        ({"**/{query,value}/kernel": LORA}, {QUERY: LORA, VALUE: LORA}),
        ({"head/**": None, "**/kernel": LORA}, {QUERY: LORA, VALUE: LORA}),
        ({"**/bias": None, "**/scale": None, "**": LORA}, {QUERY: LORA, VALUE: LORA, HEAD: LORA}),
        ({"**/kernel": LORA, "**": None}, {QUERY: LORA, VALUE: LORA, HEAD: LORA}),
        ({re.compile(r".*/(query|value)/kernel"): LORA, "head/kernel": OTHER}, {QUERY: LORA, VALUE: LORA, HEAD: OTHER}),
        ({re.compile(r"head/k"): None, "**/kernel": LORA}, None),
    ],
    ids=str,
)
def test_the_first_pattern_that_matches_decides(spec: Any, expected: Any) -> None:
    if expected is None:  # a compiled expression that matches a part of a path only
        assert "'head/k' matches none of 7." in error(spec)
    else:
        assert chosen(spec) == expected


def test_a_leaf_that_no_rule_names_is_left_alone() -> None:
    assert list(init({"head/kernel": LORA})) == [HEAD]


def test_full_takes_vectors_and_scales() -> None:
    params = {"norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
    assert list(init({"norm/*": lj.Full()}, params)) == ["norm/bias", "norm/scale"]


def test_the_order_of_the_adapter_is_that_of_the_tree_and_not_of_the_spec() -> None:
    assert list(init({"head/**": OTHER, "**/kernel": LORA})) == [QUERY, VALUE, HEAD]


# Errors


def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_paths() -> None:
    assert error({"**/qurey/kernel": LORA}) == (
        "Expected every rule to match a leaf; '**/qurey/kernel' matches none of 7.\n"
        "  The nearest paths:\n"
        "  encoder/layer_0/query/kernel\n"
        "  encoder/layer_0/value/kernel\n"
        "  head/kernel\n"
        "  `lora_jax.kernels(apply, params, *args)` lists all, with their use."
    )


@pytest.mark.parametrize("rule", [LORA, lj.Full(), None], ids=str)
@pytest.mark.parametrize("pattern", ["**/qurey/kernel", re.compile("query/kernel")], ids=["glob", "expression"])
def test_every_rule_must_match_whatever_it_says(rule: Any, pattern: Any) -> None:
    text = pattern if isinstance(pattern, str) else pattern.pattern
    assert error({"head/kernel": LORA, pattern: rule}).startswith(
        f"Expected every rule to match a leaf; {text!r} matches none of 7.\n"
    )


def test_a_rule_after_which_nothing_is_left_is_an_error_that_names_the_earlier_ones() -> None:
    spec = {"head/*": None, "encoder/**/kernel": OTHER, "**/{query,value}/*": lj.Full(), re.compile(".*kernel"): LORA}
    assert error(spec) == (
        "Expected every rule to decide something; '.*kernel' can never act: earlier rules decide all 3 leaves that it "
        "matches.\n"
        "  The earlier rules: 'encoder/**/kernel', 'head/*'.\n"
        "  The first match counts: put the narrower rule first, or delete this one."
    )


def test_a_rule_may_act_on_a_part_of_what_it_matches() -> None:
    assert chosen({"**/query/kernel": LORA, "encoder/**/kernel": OTHER}) == {QUERY: LORA, VALUE: OTHER}


@pytest.mark.parametrize("value", [lj.LoRA, "LoRA", 8, {"rank": 8}, jnp.float32], ids=str)
def test_a_value_that_is_no_variant_is_an_error(value: Any) -> None:
    assert error({"**/kernel": value}) == (
        f"Expected a variant such as LoRA(rank=8, alpha=16), or None, for '**/kernel'; got {value!r}."
    )


@pytest.mark.parametrize("spec", [LORA, ["**/kernel"], None, "**/kernel"], ids=str)
def test_a_spec_that_is_no_mapping_is_an_error(spec: Any) -> None:
    assert error(spec) == f"Expected a spec, a mapping such as {{'**/kernel': LoRA(rank=8, alpha=16)}}; got {spec!r}."


@pytest.mark.parametrize("spec", [{}, {"**": None}], ids=str)
def test_a_spec_that_adapts_nothing_is_an_error(spec: Any) -> None:
    assert error(spec) == f"Expected a spec that adapts at least one leaf; got {spec!r}."


@pytest.mark.parametrize(
    ("pattern", "path", "sizes"),
    [
        ("encoder/layer_0/query/*", "encoder/layer_0/query/bias", (6,)),
        ("**/scale", "encoder/layer_0/norm/scale", (8,)),
        (re.compile(".*bias"), "encoder/layer_0/norm/bias", (8,)),
    ],
    ids=["bias", "norm scale", "norm bias"],
)
def test_a_vector_for_a_low_rank_variant_is_an_error_that_says_what_to_write(
    pattern: Any, path: str, sizes: tuple[int, ...]
) -> None:
    name = path.split("/")[-1]
    text = pattern if isinstance(pattern, str) else pattern.pattern
    assert error({pattern: LORA}) == (
        f"Expected a kernel for LoRA(rank=2, alpha=4); got a vector, {path!r} of shape {sizes}, by the rule {text!r}.\n"
        f"  End the pattern in `/kernel`, or put a rule for this leaf before it: '**/{name}': None to leave it alone, "
        "Full() to train it whole."
    )


@pytest.mark.parametrize("name", ["bias", "scale", "mean", "var"])
@pytest.mark.parametrize("sizes", [(12, 8), (2, 12, 8)], ids=str)
def test_a_stack_of_vectors_is_vectors_still(name: str, sizes: tuple[int, ...]) -> None:
    params = {"layers": {"kernel": shape(12, 8, 8), name: shape(*sizes)}}
    assert error({"layers/*": lj.LoRA(rank=2, alpha=4)}, params).startswith(
        f"Expected a kernel for LoRA(rank=2, alpha=4); got a vector, 'layers/{name}' of shape {sizes}, by the rule "
        "'layers/*'.\n"
    )


def test_axes_in_the_rule_make_a_kernel_of_any_matrix() -> None:
    adapter = init({"bias": lj.LoRA(rank=2, alpha=4, axes="io")}, {"bias": shape(12, 8)})
    assert adapter["bias"].a.shape == (12, 2)


@pytest.mark.parametrize("rank", [-1, 0, 4, 100])
def test_a_rank_out_of_range_is_an_error_with_the_range(rank: int) -> None:
    assert error({"head/kernel": lj.LoRA(rank=rank, alpha=4)}) == (
        f"At 'head/kernel': expected a rank in [1, 3] for shape (8, 3) with axes 'io'; got rank={rank}."
    )


@pytest.mark.parametrize(
    ("axes", "sizes", "most"),
    [
        ("io", (8, 3), 3),
        ("ioo", (4, 2, 8), 4),
        ("iio", (2, 8, 5), 5),
        ("bio", (100, 6, 7), 6),
        ("iiio", (3, 3, 2, 64), 18),
    ],
)
def test_the_rank_may_be_as_large_as_the_smaller_side_of_one_layer(
    axes: str, sizes: tuple[int, ...], most: int
) -> None:
    adapter = init({"k": lj.LoRA(rank=most, alpha=1, axes=axes)}, {"k": shape(*sizes)})
    assert adapter["k"].variant.rank == most
    assert error({"k": lj.LoRA(rank=most + 1, alpha=1, axes=axes)}, {"k": shape(*sizes)}) == (
        f"At 'k': expected a rank in [1, {most}] for shape {sizes} with axes {axes!r}; got rank={most + 1}."
    )


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.bool_, jnp.complex64])
@pytest.mark.parametrize("variant", [LORA, lj.Full()], ids=str)
def test_a_leaf_that_is_not_floating_point_is_an_error(dtype: Any, variant: Any) -> None:
    assert error({"k": variant}, {"k": shape(4, 4, dtype=dtype)}) == (
        f"Expected a floating-point leaf to adapt; got {jnp.dtype(dtype).name} at 'k' of shape (4, 4), by the rule 'k'."
    )


def test_a_random_key_is_not_a_leaf_to_adapt() -> None:
    assert error({"**": lj.Full()}, {"dropout": jax.random.key(0)}).startswith(
        "Expected a floating-point leaf to adapt; got key<fry> at 'dropout' of shape ()"
    )


def test_a_leaf_that_is_no_array_is_an_error() -> None:
    assert error({"**": lj.Full()}, {"temperature": 0.5, "kernel": jnp.ones((2, 2))}) == (
        "Expected an array to adapt; got 0.5 at 'temperature', by the rule '**'."
    )


def test_a_leaf_that_is_no_array_may_lie_beside_adapted_ones() -> None:
    params = {"temperature": 0.5, "name": "gpt", "kernel": np.ones((2, 2), np.float32)}
    assert list(init({"kernel": LORA}, params)) == ["kernel"]


def test_more_than_two_axes_without_roles_are_an_error_that_offers_both_ways_out() -> None:
    assert error({"**/kernel": lj.RSLoRA(rank=2, alpha=4)}, {"query": {"kernel": shape(8, 2, 4)}}) == (
        "Expected to know which axes of 'query/kernel', shape (8, 2, 4), are inputs, outputs or batch; a kernel of 3 "
        "axes does not say.\n"
        "  Let the model say: init(..., kernels=lora_jax.kernels(apply, params, *args)),\n"
        "  or say it in the spec: RSLoRA(..., axes=...), such as 'ioo' for a query kernel (d, heads, head_dim) or "
        "'bio' for a stack of layers."
    )


def test_both_ways_out_lead_out() -> None:
    params = {"query": {"kernel": shape(8, 2, 4)}}
    kernels = lj.kernels(lambda p, x: jnp.einsum("td,dhk->thk", x, p["query"]["kernel"]), params, shape(5, 8))
    traced = init({"**/kernel": LORA}, params, kernels=kernels)
    told = init({"**/kernel": lj.LoRA(rank=2, alpha=4, axes="ioo")}, params)
    assert traced["query/kernel"].axes == told["query/kernel"].axes == "ioo"
    assert jax.tree.structure(traced) == jax.tree.structure(told)


@pytest.mark.parametrize("axes", ["io", "iooo", "iox", "IOO", "", "i o"])
def test_axes_that_do_not_fit_the_shape_are_an_error(axes: str) -> None:
    assert error({"k": lj.LoRA(rank=2, alpha=4, axes=axes)}, {"k": shape(8, 2, 4)}) == (
        "Expected axes of one letter each (`b` batch, `i` input, `o` output) for the 3 axes of 'k', shape (8, 2, 4); "
        f"got axes={axes!r}."
    )


@pytest.mark.parametrize("axes", ["iii", "boo", "bii", "bbb"])
def test_axes_without_an_input_or_an_output_are_an_error(axes: str) -> None:
    assert error({"k": lj.LoRA(rank=2, alpha=4, axes=axes)}, {"k": shape(8, 2, 4)}) == (
        "At 'k': LoRA(rank=2, alpha=4) needs a kernel with input and output axes; got shape (8, 2, 4) with axes "
        f"{axes!r}."
    )


def test_kernels_traced_with_other_parameters_are_an_error() -> None:
    kernels = lj.kernels(lambda p, x: x @ p["k"], {"k": shape(8, 4)}, shape(5, 8))
    assert error({"k": LORA}, {"k": shape(12, 8, 4)}, kernels=kernels) == (
        "Expected `kernels` traced with these parameters; 'k' has shape (12, 8, 4), and had (8, 4) when traced."
    )


@pytest.mark.parametrize("kind", [lj.LoRAError, ValueError])
def test_a_spec_error_is_also_a_built_in_error(kind: type[Exception]) -> None:
    with pytest.raises(kind):
        init({})
