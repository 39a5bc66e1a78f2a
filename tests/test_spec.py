"""Which variant each leaf gets, and the texts of all errors of specs."""

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
    if expected is None:  # a compiled expression that matches only a part of a path
        assert "'head/k' matches none of 7." in error(spec)
    else:
        assert chosen(spec) == expected


def test_a_leaf_that_matches_no_rule_is_frozen() -> None:
    assert list(init({"head/kernel": LORA})) == [HEAD]


def test_full_adapts_vectors_and_scales() -> None:
    params = {"norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
    assert list(init({"norm/*": lj.Full()}, params)) == ["norm/bias", "norm/scale"]


def test_the_adapter_has_the_order_of_the_tree_and_not_of_the_spec() -> None:
    assert list(init({"head/**": OTHER, "**/kernel": LORA})) == [QUERY, VALUE, HEAD]


# Errors


def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_paths() -> None:
    assert error({"**/qurey/kernel": LORA}) == (
        "Expected every rule to match a leaf; '**/qurey/kernel' matches none of 7.\n"
        "  The nearest paths:\n"
        "  encoder/layer_0/query/kernel\n"
        "  encoder/layer_0/value/kernel\n"
        "  head/kernel\n"
        "  `lora_jax.kernels(apply, params, *args)` lists all leaves and their uses."
    )


@pytest.mark.parametrize(
    ("pattern", "similar", "count"),
    [
        ("query/kernel", "**/query/kernel", "1 path"),
        ("query", "**/query/kernel", "1 path"),
        ("**/norm", "**/norm/**", "2 paths"),
        ("layer_0", "**/layer_0/**", "6 paths"),
        ("encoder.layer_0.query", "**/encoder/layer_0/query/kernel", "1 path"),
        ("head.kernel", "head/kernel", "1 path"),
        ("{query,value}", "**/{query,value}/kernel", "2 paths"),
    ],
)
def test_a_pattern_for_a_part_of_a_path_is_an_error_with_one_that_matches(
    pattern: str, similar: str, count: str
) -> None:
    text = f"matches none of 7.\n  A pattern is for a whole path, with slashes: {similar!r} matches {count}.\n"
    assert text in error({pattern: LORA})
    arrays = jax.tree.map(lambda leaf: np.zeros(leaf.shape), PARAMS)
    assert len(init({similar: lj.Full()}, arrays)) == int(count.split()[0])


def test_a_regular_expression_as_a_string_is_an_error_that_says_so() -> None:
    text = "A string is a glob; for a regular expression, compile it: re.compile('.*/(query|value)/kernel').\n"
    assert text in error({".*/(query|value)/kernel": LORA})
    assert "The nearest paths" in error({"*(query": LORA})  # neither


@pytest.mark.parametrize("rule", [LORA, lj.Full(), None], ids=str)
@pytest.mark.parametrize("pattern", ["**/qurey/kernel", re.compile("query/kernel")], ids=["glob", "expression"])
def test_every_rule_must_match_a_leaf(rule: Any, pattern: Any) -> None:
    text = pattern if isinstance(pattern, str) else pattern.pattern
    assert error({"head/kernel": LORA, pattern: rule}).startswith(
        f"Expected every rule to match a leaf; {text!r} matches none of 7.\n"
    )


def test_a_rule_without_remaining_leaves_is_an_error_with_the_earlier_rules() -> None:
    spec = {"head/*": None, "encoder/**/kernel": OTHER, "**/{query,value}/*": lj.Full(), re.compile(".*kernel"): LORA}
    assert error(spec) == (
        "Expected every rule to have an effect; '.*kernel' has none, because earlier rules match all 3 leaves that it "
        "matches.\n"
        "  The earlier rules: 'encoder/**/kernel', 'head/*'.\n"
        "  The first match decides: put the more specific rule first, or delete this one."
    )


def test_a_rule_without_its_only_leaf_is_an_error() -> None:
    assert "'head/kernel' has none, because earlier rules match the only leaf that it matches.\n" in error(
        {"**/kernel": LORA, "head/kernel": OTHER}
    )


def test_a_rule_may_apply_to_some_of_its_matches() -> None:
    assert chosen({"**/query/kernel": LORA, "encoder/**/kernel": OTHER}) == {QUERY: LORA, VALUE: OTHER}


@pytest.mark.parametrize("value", [lj.LoRA, "LoRA", 8, {"rank": 8}, jnp.float32], ids=str)
def test_a_value_that_is_not_a_variant_is_an_error(value: Any) -> None:
    assert error({"**/kernel": value}) == (
        f"Expected a variant such as LoRA(rank=8, alpha=16), or None, for '**/kernel'; got {value!r}."
    )


@pytest.mark.parametrize("spec", [LORA, ["**/kernel"], None, "**/kernel"], ids=str)
def test_a_spec_that_is_not_a_mapping_is_an_error(spec: Any) -> None:
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
def test_a_vector_under_a_low_rank_variant_is_an_error_with_advice(
    pattern: Any, path: str, sizes: tuple[int, ...]
) -> None:
    name = path.split("/")[-1]
    pattern_text = pattern if isinstance(pattern, str) else pattern.pattern
    text = error({pattern: LORA})
    assert (
        f"{path!r} of shape {sizes}, by the rule {pattern_text!r}: it is a vector, and LoRA(rank=2, alpha=4) is for "
        "kernels"
    ) in text
    assert text.endswith(
        f"\n  End the pattern in `/kernel`, or put a rule before it: {{'**/{name}': None}} to leave it frozen, "
        "Full() to train all of it."
    )


@pytest.mark.parametrize("name", ["bias", "scale", "mean", "var"])
@pytest.mark.parametrize("sizes", [(12, 8), (2, 12, 8)], ids=str)
def test_a_stack_of_vectors_is_not_a_matrix(name: str, sizes: tuple[int, ...]) -> None:
    params = {"layers": {"kernel": shape(12, 8, 8), name: shape(*sizes)}}
    text = error({"layers/*": lj.LoRA(rank=2, alpha=4)}, params)
    assert f"'layers/{name}' of shape {sizes}, by the rule 'layers/*': it is a vector" in text


def test_axes_in_the_rule_make_any_matrix_a_kernel() -> None:
    adapter = init({"bias": lj.LoRA(rank=2, alpha=4, axes="io")}, {"bias": shape(12, 8)})
    assert adapter["bias"].a.shape == (12, 2)


@pytest.mark.parametrize("rank", [4, 100])
def test_a_rank_that_is_too_large_is_an_error_with_suggested_rules(rank: int) -> None:
    assert error({"head/kernel": lj.LoRA(rank=rank, alpha=4)}) == (
        "Cannot adapt 'head/kernel' of shape (8, 3), by the rule 'head/kernel': "
        f"rank={rank} is too large; with axes 'io' it can be at most 3.\n"
        "  Reduce the rank to what each kernel allows: "
        f"{{'head/kernel': LoRA(rank={rank}, alpha=4, clip_rank=True)}},\n"
        "  or put more specific rules first: {'head/kernel': LoRA(rank=3, alpha=4)}."
    )


def test_one_error_lists_all_leaves_that_cannot_be_adapted() -> None:
    params = PARAMS | {
        "step": shape(dtype=jnp.int32),
        "text": "gpt",
        "gate": {"kernel": shape(8, 1)},
        "w": shape(2, 3, 4),
    }
    text = error({"**/norm/*": None, "**": lj.DoRA(rank=4, alpha=8)}, params)
    assert text == (
        "Cannot adapt 7 of the 9 leaves that the spec matches:\n"
        "  'encoder/layer_0/query/bias' of shape (6,), by the rule '**': it is a vector, and DoRA(rank=4, alpha=8) "
        "is for kernels\n"
        "  'encoder/layer_0/value/bias' of shape (6,), by the rule '**': it is a vector, and DoRA(rank=4, alpha=8) "
        "is for kernels\n"
        "  'gate/kernel' of shape (8, 1), by the rule '**': rank=4 is too large; with axes 'io' it can be at most 1\n"
        "  'head/kernel' of shape (8, 3), by the rule '**': rank=4 is too large; with axes 'io' it can be at most 3\n"
        "  'step' of shape (), by the rule '**': it is not floating-point, but int32\n"
        "  'text', by the rule '**': it is not an array, but 'gpt'\n"
        "  'w' of shape (2, 3, 4), by the rule '**': which of its 3 axes are inputs, outputs or batch is not known\n"
        "  End the pattern in `/kernel`, or put a rule before it: {'**/bias': None} to leave it frozen, Full() to "
        "train all of it.\n"
        "  Put a rule before it that leaves it frozen: {'step': None}.\n"
        "  Put a rule before it that leaves it frozen: {'text': None}.\n"
        "  Read the axes from the model: init(..., kernels=lora_jax.kernels(apply, params, *args)),\n"
        "  or write them in the spec: DoRA(..., axes=...), such as 'ioo' for a query kernel (d, heads, head_dim) or "
        "'bio' for a stack of layers.\n"
        "  Reduce the rank to what each kernel allows: {'**': DoRA(rank=4, alpha=8, clip_rank=True)},\n"
        "  or put more specific rules first: {'gate/kernel': DoRA(rank=1, alpha=8), "
        "'head/kernel': DoRA(rank=3, alpha=8)}."
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
    assert error({"k": lj.LoRA(rank=most + 1, alpha=1, axes=axes)}, {"k": shape(*sizes)}).startswith(
        f"Cannot adapt 'k' of shape {sizes}, by the rule 'k': rank={most + 1} is too large; with axes {axes!r} it can "
        f"be at most {most}.\n"
        f"  Reduce the rank to what each kernel allows: {{'k': LoRA(rank={most + 1}, alpha=1, clip_rank=True, "
        f"axes={axes!r})}},\n"
    )


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.bool_, jnp.complex64])
@pytest.mark.parametrize("variant", [LORA, lj.Full()], ids=str)
def test_a_leaf_that_is_not_floating_point_is_an_error(dtype: Any, variant: Any) -> None:
    assert error({"k": variant}, {"k": shape(4, 4, dtype=dtype)}) == (
        f"Cannot adapt 'k' of shape (4, 4), by the rule 'k': it is not floating-point, but {jnp.dtype(dtype).name}.\n"
        "  Put a rule before it that leaves it frozen: {'k': None}."
    )


def test_a_random_key_cannot_be_adapted() -> None:
    assert error({"**": lj.Full()}, {"dropout": jax.random.key(0)}).startswith(
        "Cannot adapt 'dropout' of shape (), by the rule '**': it is not floating-point, but key<fry>.\n"
    )


def test_a_leaf_that_is_not_an_array_is_an_error() -> None:
    assert error({"**": lj.Full()}, {"temperature": 0.5, "kernel": jnp.ones((2, 2))}) == (
        "Cannot adapt 'temperature', by the rule '**': it is not an array, but 0.5.\n"
        "  Put a rule before it that leaves it frozen: {'temperature': None}."
    )


def test_a_frozen_leaf_may_be_something_other_than_an_array() -> None:
    params = {"temperature": 0.5, "name": "gpt", "kernel": np.ones((2, 2), np.float32)}
    assert list(init({"kernel": LORA}, params)) == ["kernel"]


def test_more_than_two_axes_without_roles_are_an_error_with_two_remedies() -> None:
    assert error({"**/kernel": lj.RSLoRA(rank=2, alpha=4)}, {"query": {"kernel": shape(8, 2, 4)}}) == (
        "Cannot adapt 'query/kernel' of shape (8, 2, 4), by the rule '**/kernel': which of its 3 axes are inputs, "
        "outputs or batch is not known.\n"
        "  Read the axes from the model: init(..., kernels=lora_jax.kernels(apply, params, *args)),\n"
        "  or write them in the spec: RSLoRA(..., axes=...), such as 'ioo' for a query kernel (d, heads, head_dim) or "
        "'bio' for a stack of layers."
    )


def test_both_remedies_work() -> None:
    params = {"query": {"kernel": shape(8, 2, 4)}}
    kernels = lj.kernels(lambda p, x: jnp.einsum("td,dhk->thk", x, p["query"]["kernel"]), params, shape(5, 8))
    traced = init({"**/kernel": LORA}, params, kernels=kernels)
    stated = init({"**/kernel": lj.LoRA(rank=2, alpha=4, axes="ioo")}, params)
    assert traced["query/kernel"].axes == stated["query/kernel"].axes == "ioo"
    assert jax.tree.structure(traced) == jax.tree.structure(stated)


@pytest.mark.parametrize("axes", ["io", "iooo", "iox", "IOO", "", "i o"])
def test_axes_that_do_not_fit_the_shape_are_an_error(axes: str) -> None:
    assert error({"k": lj.LoRA(rank=2, alpha=4, axes=axes)}, {"k": shape(8, 2, 4)}) == (
        "Cannot adapt 'k' of shape (8, 2, 4), by the rule 'k': expected a letter for each of its 3 axes (`b` batch, "
        f"`i` input, `o` output); got axes={axes!r}."
    )


@pytest.mark.parametrize("axes", ["iii", "boo", "bii", "bbb"])
def test_axes_without_an_input_or_an_output_are_an_error(axes: str) -> None:
    assert error({"k": lj.LoRA(rank=2, alpha=4, axes=axes)}, {"k": shape(8, 2, 4)}) == (
        "Cannot adapt 'k' of shape (8, 2, 4), by the rule 'k': LoRA needs input and output axes; the kernel's are "
        f"{axes!r}."
    )


def test_kernels_traced_with_other_parameters_are_an_error() -> None:
    kernels = lj.kernels(lambda p, x: x @ p["k"], {"k": shape(8, 4)}, shape(5, 8))
    text = error({"*": LORA}, {"k": shape(12, 8, 4), "other": shape(8, 4)}, kernels=kernels)
    assert text == (
        "Cannot adapt 2 of the 2 leaves that the spec matches:\n"
        "  'k' of shape (12, 8, 4), by the rule '*': it had shape (8, 4) when `kernels` was traced\n"
        "  'other' of shape (8, 4), by the rule '*': it is not in `kernels`\n"
        "  Trace with the parameters that `init` gets, or write the axes in the spec: LoRA(..., axes=...)."
    )


CANNOT_TELL = {
    "never used": (lambda w, x: x, "the traced call does not use it", ""),
    "opaque use": (
        lambda w, x: x @ jnp.exp(w),
        "`exp` reads the whole array first, at {line}",
        " Then `lora` must be allowed to materialize it: lora(apply, materialize=['w']).",
    ),
}


@pytest.mark.parametrize("name", CANNOT_TELL)
def test_roles_that_tracing_cannot_find_are_an_error_with_the_reason(name: str) -> None:
    call, reason, more = CANNOT_TELL[name]
    kernels = lj.kernels(lambda params, x: call(params["w"], x), {"w": shape(4, 4)}, shape(5, 4))
    code = call.__code__
    found = re.sub(
        rf"{re.escape(__file__)}:{code.co_firstlineno}:\d+ \([^)]*\)",
        "{line}",
        error({"w": LORA}, {"w": shape(4, 4)}, kernels=kernels),
    )
    assert found == (
        "Cannot adapt 'w' of shape (4, 4), by the rule 'w': the traced model does not determine which of its axes are "
        f"inputs and outputs: {reason}.\n"
        f"  Leave it out of the spec ({{'w': None}}), or write the axes there: LoRA(..., axes=...).{more}"
    )
    assert init({"w": lj.LoRA(rank=2, alpha=4, axes="oi")}, {"w": shape(4, 4)}, kernels=kernels)["w"].axes == "oi"


@pytest.mark.parametrize("kind", [lj.LoRAError, ValueError])
def test_a_spec_error_is_also_a_built_in_error(kind: type[Exception]) -> None:
    with pytest.raises(kind):
        init({})


# A spec made from kernels


def stacked(params: Any, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        y = jnp.einsum("td,dhk->thk", x * p["scale"], p["query"]) + p["bias"]
        return x + jnp.einsum("thk,hkd->td", jnp.tanh(y), p["out"]), None

    return jax.lax.scan(layer, x, params["layers"])[0] @ params["head"]


STACKED = {
    "layers": {"query": shape(3, 8, 2, 4), "bias": shape(3, 2, 4), "scale": shape(3, 8), "out": shape(3, 2, 4, 8)},
    "head": shape(8, 5),
}
FOUND = lj.kernels(stacked, STACKED, shape(6, 8))
RULES = {
    "**/out": lj.DoRA(rank=16, alpha=1, clip_rank=True),
    lj.targets.all_linear: LORA,
    lj.targets.norms: lj.Full(),
    "head": None,
}


def test_a_spec_made_from_kernels_has_exact_paths_and_axes() -> None:
    expanded = lj.spec(FOUND, RULES)
    assert expanded == {
        "layers/out": lj.DoRA(rank=8, alpha=1, axes="biio"),
        "layers/query": lj.LoRA(rank=2, alpha=4, axes="bioo"),
        "layers/scale": lj.Full(),
    }
    assert repr(expanded) == (
        "{'layers/out': DoRA(rank=8, alpha=1, axes='biio'), 'layers/query': LoRA(rank=2, alpha=4, axes='bioo'), "
        "'layers/scale': Full()}"
    )


def test_a_spec_prints_as_an_expression() -> None:
    expanded = lj.spec(FOUND, RULES)
    assert eval(repr(expanded), vars(lj)) == expanded


def test_a_spec_made_from_kernels_gives_the_same_adapter() -> None:
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), STACKED)
    one, other = init(lj.spec(FOUND, RULES), params), init(RULES, params, kernels=FOUND)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


def test_axes_of_a_variant_override_those_of_kernels() -> None:
    assert lj.spec(FOUND, {"head": lj.LoRA(rank=2, alpha=4, axes="oi")})["head"].axes == "oi"


def test_a_spec_made_from_kernels_raises_the_errors_of_init() -> None:
    with pytest.raises(lj.SpecError, match=r"^Cannot adapt 'layers/scale' of shape \(3, 8\), by the rule '\*\*/scale'"):
        lj.spec(FOUND, {"**/scale": LORA})
