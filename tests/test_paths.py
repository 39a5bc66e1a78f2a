"""Paths of leaves in every container, and patterns that match them."""

import re
from typing import Any

import flax.linen as nn
import flax.struct
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from hypothesis import given

import lora_jax as lj
from lora_jax._core.paths import flatten, matcher, matches_any, nearest, pattern_text, unflatten

W = np.ones((2, 3), np.float32)


@flax.struct.dataclass
class Layer:
    kernel: Any
    bias: Any = None
    features: int = flax.struct.field(pytree_node=False, default=3)


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 2, use_bias=False, rngs=rngs)])


NNX_PATHS = ["embed/embedding", "layers/0/bias", "layers/0/kernel", "layers/1/kernel"]

TREES = {
    "a dict": ({"att": {"query": {"kernel": W, "bias": W}}}, ["att/query/bias", "att/query/kernel"]),
    "a FrozenDict": (FrozenDict({"att": {"kernel": W}}), ["att/kernel"]),
    "a list": ([{"kernel": W}, W], ["0/kernel", "1"]),
    "a tuple in a dict": ({"layers": (W, [W, W])}, ["layers/0", "layers/1/0", "layers/1/1"]),
    "integer keys": ({3: {"kernel": W}, 12: W}, ["3/kernel", "12"]),
    "a dataclass": ({"dense": Layer(W, W)}, ["dense/kernel", "dense/bias"]),
    "a dataclass with an empty field": ({"dense": Layer(W)}, ["dense/kernel"]),
    "None, which is no leaf": ({"dense": {"kernel": W, "bias": None}}, ["dense/kernel"]),
    "a bare array": (W, [""]),
    "Partitioned": ({"query": {"kernel": nn.Partitioned(W, ("x", None))}}, ["query/kernel"]),
    "LogicallyPartitioned": ({"kernel": nn.LogicallyPartitioned(W, ("embed", "mlp"))}, ["kernel"]),
    "an NNX variable": ({"query": {"kernel": nnx.Param(W)}}, ["query/kernel"]),
    "a box in a box": ({"kernel": nn.Partitioned(nn.Partitioned(W, ("x",)), ("y",))}, ["kernel"]),
    "a box that holds a tree of one": ({"p": nn.Partitioned({"w": W}, ("x",))}, ["p/w"]),
    "a box that holds a tree of two": ({"p": nn.Partitioned({"w": W, "v": W}, ("x",))}, ["p/v", "p/w"]),
    "a variable that holds a tree": ({"p": nnx.Param({"w": W, "v": W})}, ["p/v", "p/w"]),
    "a leaf named value": ({"p": {"value": W}}, ["p/value"]),
    "an nnx.State": (nnx.split(Model(nnx.Rngs(0)))[1], NNX_PATHS),
    "an nnx.Module": (Model(nnx.Rngs(0)), NNX_PATHS),
}


@pytest.mark.parametrize("name", TREES)
def test_a_path_joins_the_keys_without_boxes(name: str) -> None:
    tree, paths = TREES[name]
    assert list(flatten(tree)[0]) == paths


@pytest.mark.parametrize("name", TREES)
def test_unflatten_inverts_flatten(name: str) -> None:
    tree, _ = TREES[name]
    leaves, treedef = flatten(tree)
    rebuilt = unflatten(treedef, leaves)
    assert type(rebuilt) is type(tree)
    assert jax.tree.structure(rebuilt) == jax.tree.structure(tree)
    assert all(one is other for one, other in zip(jax.tree.leaves(rebuilt), jax.tree.leaves(tree), strict=True))


def test_a_linen_model_has_the_same_paths_boxed_and_unboxed() -> None:
    boxed = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "x")))
    plain = nn.Dense(3)
    trees = [jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2))) for model in (boxed, plain)]
    assert list(flatten(trees[0])[0]) == list(flatten(trees[1])[0]) == ["params/bias", "params/kernel"]


def test_two_leaves_of_one_path_are_an_error() -> None:
    with pytest.raises(lj.AdapterError) as caught:
        flatten({"a/b": W, "a": {"b": W}})
    assert str(caught.value) == (
        "Expected every leaf of the tree to have a different path; two leaves have the path 'a/b'.\n"
        "  Rename one of the keys."
    )


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("kernel", ["kernel"], ["a/kernel", "kernels", "kerne", ""]),
        ("*", ["kernel", "0"], ["a/kernel"]),
        ("*/kernel", ["a/kernel"], ["kernel", "a/b/kernel", "a/kernel/b"]),
        ("layer_*/kernel", ["layer_1/kernel", "layer_/kernel"], ["layer_1/a/kernel", "layer/kernel"]),
        ("a*c", ["abc", "ac"], ["a/c", "abcd"]),
        ("**", ["", "a", "a/b/c"], []),
        ("**/kernel", ["kernel", "a/kernel", "a/b/kernel"], ["mykernel", "a/mykernel", "kernel/a"]),
        ("a/**", ["a", "a/b", "a/b/c"], ["ab", "b/a", "ab/c"]),
        ("a/**/b", ["a/b", "a/x/b", "a/x/y/b"], ["ab", "axb", "a/xb", "a/b/c"]),
        ("**/a/**", ["a", "x/a", "x/a/b", "a/b"], ["xa", "x/ab"]),
        ("**/a/**/b", ["a/b", "x/a/y/b"], ["x/b", "xa/b"]),
        ("{query,value}/kernel", ["query/kernel", "value/kernel"], ["key/kernel", "query,value/kernel"]),
        ("{a,{b,c}d}/k", ["a/k", "bd/k", "cd/k"], ["b/k", "ad/k", "d/k"]),
        ("{a,b}{0,1}", ["a0", "b1"], ["a", "ab", "0a"]),
        ("{,x}a", ["a", "xa"], ["x", ",a"]),
        ("{**/a,b}/k", ["a/k", "x/a/k", "b/k"], ["x/b/k"]),
        ("{a/**,b}", ["a", "a/x", "a/x/y", "b"], ["b/x", "ab"]),
        ("{a/*/c,b}", ["a/x/c", "b"], ["a/c", "a/x/y/c"]),
        ("a,b", ["a,b"], ["a", "b"]),
        ("a.b", ["a.b"], ["axb"]),
        ("a+[0]", ["a+[0]"], ["aa0", "a0"]),
        ("(a|b)", ["(a|b)"], ["a", "b"]),
        ("^a$", ["^a$"], ["a"]),
        ("a?", ["a?"], ["a", "ab", ""]),
        (r"a\d", [r"a\d"], ["a1"]),
        (re.compile("a|b"), ["a", "b"], ["ab", "xa"]),
        (re.compile(r"layer_\d+/.*kernel"), ["layer_12/query/kernel"], ["layer_x/kernel", "a/layer_1/kernel"]),
        (re.compile("KERNEL", re.IGNORECASE), ["kernel"], ["kernels"]),
    ],
    ids=lambda value: pattern_text(value) if isinstance(value, str | re.Pattern) else "",
)
def test_a_pattern_matches_whole_paths(pattern: Any, matching: list[str], other: list[str]) -> None:
    expression = matcher(pattern)
    assert [path for path in (*matching, *other) if expression.fullmatch(path)] == matching


SEGMENT = st.text("abk.+[](){},*?\\|^$ é", min_size=1, max_size=5)
LITERAL = st.text("abk.+[]()?\\|^$, é", min_size=1, max_size=5)


@given(st.lists(LITERAL, min_size=1, max_size=4))
def test_a_path_without_stars_and_braces_matches_only_itself(segments: list[str]) -> None:
    path = "/".join(segments)
    assert matcher(path).fullmatch(path)
    assert not matcher(path).fullmatch(path + "a")


@given(st.lists(SEGMENT, max_size=4), LITERAL)
def test_two_stars_and_a_slash_match_any_number_of_segments(before: list[str], last: str) -> None:
    assert matcher(f"**/{last}").fullmatch("/".join([*before, last]))
    assert not matcher(f"**/{last}").fullmatch("/".join([*before, f"x{last}"]))


@given(SEGMENT, SEGMENT)
def test_one_star_matches_one_segment(one: str, other: str) -> None:
    assert matcher("*/*").fullmatch(f"{one}/{other}")
    assert not matcher("*").fullmatch(f"{one}/{other}")


@pytest.mark.parametrize("pattern", ["{a", "a}", "}a{", "{{a}", "{a}}", "**/{query,value/kernel", "}{"])
def test_unbalanced_braces_are_an_error(pattern: str) -> None:
    with pytest.raises(lj.SpecError) as caught:
        matcher(pattern)
    assert str(caught.value) == f"Expected a pattern with balanced braces; got {pattern!r}."


def test_a_path_matches_any_of_several_patterns() -> None:
    assert matches_any("a/kernel", ["b/*", re.compile("a/.*")])
    assert not matches_any("a/kernel", ["b/*", "kernel"])
    assert not matches_any("a/kernel", [])


LAYERS = [f"layers_{layer}/{name}/kernel" for layer in range(12) for name in ("q_proj", "mlp/up", "norm")]


@pytest.mark.parametrize(
    ("pattern", "first"),
    [
        ("**/q_prj/kernel", "layers_0/q_proj/kernel"),
        ("layers_11/q_prj/kernel", "layers_11/q_proj/kernel"),
        ("**/mlp/upp/kernel", "layers_0/mlp/up/kernel"),
        (re.compile("layers_3/nrm/kernel"), "layers_3/norm/kernel"),
    ],
    ids=pattern_text,
)
def test_the_nearest_path_is_the_intended_one(pattern: Any, first: str) -> None:
    found = nearest(pattern, LAYERS)
    assert found[0] == first
    assert len(found) == 3


def test_no_path_is_near_without_paths() -> None:
    assert nearest("**/kernel", []) == []
