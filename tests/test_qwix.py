"""The arrays of Qwix: their names, shapes and axes as Qwix 0.1.8 makes them, and what is refused."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import bits

import lora_jax as lj
from lora_jax._core.uses import Kernel, Use
from lora_jax.qwix import from_qwix, to_qwix

Shape = tuple[int, ...]
SDS = jax.ShapeDtypeStruct
R = 3


def kernel(shape: Shape, axes: str | None, *primitives: str) -> Any:
    """What `kernels` returns for a leaf that the model uses in these operations."""
    uses = tuple(Use("w", primitive, "factored", None, 1, 0, "") for primitive in primitives or ("dot_general",))
    return Kernel(shape, jnp.float32, axes, uses, "the traced call does not use it")


def arrays(a: Shape, b: Shape, name: str = "w") -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        f"{name}_lora_{letter}": jnp.asarray(random.standard_normal(shape), jnp.float32)
        for letter, shape in (("a", a), ("b", b))
    }


# The shapes that Qwix 0.1.8 gives to `a` and `b`, and how the update follows from them, in einsum's letters. In groups,
# an axis of Qwix is the product of several.
LAYOUTS = {
    "dense": ((8, 6), "io", (8, R), (R, 6), "ir,ro->io"),
    "transposed": ((6, 8), "oi", (8, R), (R, 6), "ir,ro->oi"),
    "dot, query": ((8, 2, 4), "ioo", (8, R), (R, 8), "ir,r(no)->ino"),
    "dot, out": ((2, 4, 8), "iio", (8, R), (R, 8), "(ni)r,ro->nio"),
    "dot, batch": ((5, 8, 6), "bio", (5, 8, R), (5, R, 6), "bir,bro->bio"),
    "dot, batch inside": ((8, 5, 6), "ibo", (5, 8, R), (5, R, 6), "bir,bro->ibo"),
    "einsum, query": ((2, 8, 4), "oio", (8, R), (R, 2, 4), "ir,rno->nio"),
    "einsum, key and value": ((2, 5, 8, 4), "ooio", (8, R), (R, 2, 5, 4), "ir,rcno->cnio"),
    "einsum, out": ((2, 4, 8), "iio", (2, 4, R), (R, 8), "nir,ro->nio"),
    "einsum, batch": ((5, 8, 6), "bio", (5, 8, R), (R, 6), "bir,ro->bio"),
    "einsum, batch inside": ((8, 5, 6), "ibo", (8, 5, R), (R, 6), "ibr,ro->ibo"),
    "convolution": ((2, 5, 8, 6), "iiio", (2, 5, 8, R), (R, 6), "hwir,ro->hwio"),
    "dot, stack": ((5, 8, 2, 4), "bioo", (5, 8, R), (5, R, 8), "bir,br(no)->bino"),
    "dot, stack of MaxText": ((8, 5, 2, 4), "iboo", (8, 5, R), (R, 5, 8), "ibr,rb(no)->ibno"),
    "dot, stack of MaxText, out": ((2, 5, 4, 8), "ibio", (8, 5, R), (R, 5, 8), "(ni)br,rbo->nbio"),
    "dot, stack last": ((2, 4, 8, 5), "iiob", (8, R, 5), (R, 8, 5), "(ni)rb,rob->niob"),
    "einsum, stack": ((5, 2, 8, 4), "boio", (5, 8, R), (5, R, 2, 4), "bir,brno->bnio"),
    "einsum, stack of experts": ((7, 5, 8, 6), "bbio", (7, 5, 8, R), (7, R, 6), "leir,lro->leio"),
    "size 1": ((1, 8, 4), "bio", (8, R), (R, 1, 4), "ir,rno->nio"),
}


def expanded(array: Any, letters: str, sizes: dict[str, int]) -> Any:
    """Splits the axes in parentheses; returns the array and the letters without parentheses."""
    plain = letters.replace("(", "").replace(")", "")
    return np.reshape(array, [sizes[letter] for letter in plain]), plain


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_has_the_update_of_qwix(name: str) -> None:
    shape, axes, a, b, text = LAYOUTS[name]
    tree, kernels = {"layer": arrays(a, b)}, {"layer/w": kernel(shape, axes)}
    adapter = from_qwix(tree, kernels, alpha=6)
    assert adapter["layer/w"].variant == lj.LoRA(rank=R, alpha=6)
    sizes = dict(zip(text.split("->")[1], shape, strict=True)) | {"r": R}
    letters = text.split("->")[0].split(",")
    factors = [expanded(leaf, text, sizes) for leaf, text in zip(tree["layer"].values(), letters, strict=True)]
    plain = ",".join(letters for _, letters in factors) + "->" + text.split("->")[1]
    update = 2 * np.einsum(plain, *(array for array, _ in factors))
    merged = lj.merge({"layer": {"w": jnp.zeros(shape)}}, adapter)["layer"]["w"]
    np.testing.assert_allclose(merged, update, atol=1e-5)
    assert bits(to_qwix(adapter, jax.eval_shape(lambda: tree), kernels, alpha=6)) == bits(tree)


KERNELS = {"up/kernel": kernel((8, 6), "io"), "down/kernel": kernel((6, 8), "io"), "head": kernel((8, 9), None)}
TREE = {
    "up": arrays((8, 2), (2, 6), "kernel") | {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)},
    "down": arrays((6, 2), (2, 8), "kernel"),
}
SPEC = {"*/kernel": lj.LoRA(rank=2, alpha=4)}
PARAMS = {"up": {"kernel": jnp.ones((8, 6))}, "down": {"kernel": jnp.ones((6, 8))}}


def ours(spec: Any = SPEC) -> dict[str, lj.Adapter]:
    return lj.init(jax.random.key(0), PARAMS, spec)


def test_other_leaves_stay_and_the_arrays_get_the_dtypes_and_shardings_of_the_tree() -> None:
    mesh = jax.make_mesh((2,), ("x",))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    tree = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), TREE)
    tree["up"]["kernel_lora_a"] = jax.device_put(tree["up"]["kernel_lora_a"], sharding)
    got = to_qwix(ours(), tree, KERNELS, alpha=4)
    assert got["up"]["kernel"] is tree["up"]["kernel"]
    assert got["up"]["kernel_lora_a"].sharding == sharding
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), got) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), tree
    )


def test_boxes_and_states_and_checkpoints_of_states_are_read_and_written() -> None:
    adapter = from_qwix(TREE, KERNELS, alpha=4)
    boxed = jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), TREE)
    state = nnx.State({name: {at: nnx.LoRAParam(leaf) for at, leaf in layer.items()} for name, layer in TREE.items()})
    raw = jax.tree.map(lambda leaf: {"value": leaf}, TREE)  # as Orbax reads a state without a template
    for tree in (boxed, state, raw):
        assert bits(from_qwix(tree, KERNELS, alpha=4)) == bits(adapter)
        written = to_qwix(adapter, jax.tree.map(jnp.zeros_like, tree), KERNELS, alpha=4)
        assert jax.tree.structure(written) == jax.tree.structure(tree)
        assert bits(from_qwix(written, KERNELS, alpha=4)) == bits(adapter)


def test_shapes_suffice() -> None:
    adapter = jax.eval_shape(lambda tree: from_qwix(tree, KERNELS, alpha=4), TREE)
    assert adapter["down/kernel"].b.shape == (2, 8)
    written = jax.eval_shape(lambda adapter, tree: to_qwix(adapter, tree, KERNELS, alpha=4), adapter, TREE)
    assert jax.tree.map(jnp.shape, written) == jax.tree.map(jnp.shape, TREE)


def test_rules_have_alphas_of_their_own() -> None:
    adapter = from_qwix(TREE, KERNELS, alpha={"up/*": 8, "**": 2})
    assert [part.variant.alpha for _, part in sorted(adapter.items())] == [2, 8]
    assert bits(to_qwix(adapter, TREE, KERNELS, alpha={"up/*": 8, "**": 2})) == bits(TREE)


@pytest.mark.parametrize("variant", [lj.LoRA(rank=2, alpha=1), lj.RSLoRA(rank=2, alpha=4)])
def test_another_scale_is_multiplied_into_b_if_asked(variant: Any) -> None:
    adapter = jax.tree.map(jnp.ones_like, ours({"*/kernel": variant}))
    with pytest.raises(lj.AdapterError, match=r"'up/kernel': its scale is .*; that of the rule is 4/2"):
        to_qwix(adapter, TREE, KERNELS, alpha=4)
    folded = from_qwix(to_qwix(adapter, TREE, KERNELS, alpha=4, fold_scale=True), KERNELS, alpha=4)
    for path, part in folded.items():
        np.testing.assert_allclose(part.variant.scale * part.b, variant.scale * adapter[path].b, rtol=1e-6)
        np.testing.assert_array_equal(part.a, adapter[path].a)


def test_the_scale_of_rslora_is_that_of_a_rule() -> None:
    adapter = ours({"*/kernel": lj.RSLoRA(rank=2, alpha=4)})
    assert to_qwix(adapter, TREE, KERNELS, alpha=4 * 2**0.5)["up"]["kernel_lora_b"].shape == (2, 6)


# Refusals


def test_what_does_not_fit_when_read_is_in_one_error() -> None:
    tree = {
        "up": arrays((8, 2), (2, 7), "kernel"),
        "down": {"kernel_lora_b": jnp.ones((2, 8))},
        "head_lora_a": jnp.ones((8, 2)),
        "head_lora_b": jnp.ones((2, 9)),
        "other": arrays((8, 2), (2, 6), "kernel"),
        "table": arrays((8, 2), (2, 9), "embedding"),
    }
    kernels = KERNELS | {"table/embedding": kernel((9, 8), "oi", "dot_general", "gather")}
    with pytest.raises(lj.CheckpointError) as error:
        from_qwix(tree, kernels, alpha=4)
    lines = str(error.value).splitlines()
    assert lines[0] == "Expected LoRA of Qwix that fits `kernels`; 5 of 5 kernels do not."
    assert sorted(line.strip() for line in lines[1:-1]) == [
        "'down/kernel': it has `_lora_b`, and no `_lora_a`",
        "'head': its axes are not known: the traced call does not use it",
        "'other/kernel': it is not in `kernels`; the nearest are 'down/kernel', 'up/kernel', 'table/embedding'",
        "'table/embedding': the model also uses it in `gather`, where Qwix applies no LoRA",
        "'up/kernel': a kernel of shape (8, 6) with axes 'io' has a (8, 2) and b (2, 6); got a (8, 2) and b (2, 7)",
    ]
    assert lines[-1].startswith("  Trace the model that was trained, with the same tree")


def test_what_does_not_fit_when_written_is_in_one_error() -> None:
    spec = {"up/kernel": lj.DoRA(rank=2, alpha=4), "down/kernel": lj.LoRA(rank=1, alpha=2)}
    tree = {**TREE, "more": arrays((8, 2), (2, 6))}
    with pytest.raises(lj.AdapterError) as error:
        to_qwix(ours(spec), tree, KERNELS, alpha=4)
    lines = str(error.value).splitlines()
    assert lines[0] == "Expected an adapter that Qwix can apply in `tree`; got 3 differences."
    assert sorted(line.strip() for line in lines[1:4]) == [
        "'down/kernel': its rank is 1; that in `tree` is 2",
        "'more/w' has LoRA in `tree`, and none in the adapter",
        "'up/kernel': Qwix has no counterpart for DoRA(rank=2, alpha=4)",
    ]
    assert lines[4].startswith("  Write a LoraRule(module_path=..., rank=..., alpha=...) for each rank and scale")
    with pytest.raises(lj.AdapterError, match="'up/kernel': it has no LoRA in `tree`"):
        to_qwix(ours(), {"down": TREE["down"]}, KERNELS, alpha=4)
    with pytest.raises(lj.AdapterError, match="'up/kernel' is not in `kernels`"):
        to_qwix(ours(), TREE, {"down/kernel": KERNELS["down/kernel"]}, alpha=4)


def test_a_convolution_in_groups_is_refused() -> None:
    def apply(params: Any, x: Any) -> Any:
        return nn.Conv(6, (3,), feature_group_count=2).apply({"params": params}, x)

    params = {"kernel": jnp.ones((3, 4, 6)), "bias": jnp.ones(6)}
    kernels = lj.kernels(apply, params, SDS((2, 5, 8), jnp.float32))
    assert [use.groups for use in kernels["kernel"].uses] == [2]
    with pytest.raises(lj.CheckpointError, match="'kernel': it is the kernel of a convolution in groups, which Qwix's"):
        from_qwix(arrays((3, 4, 2), (2, 6), "kernel"), kernels, alpha=4)


def test_a_tree_without_lora_of_qwix_is_refused() -> None:
    with pytest.raises(lj.CheckpointError, match="no leaf has a name that ends in `_lora_a` or `_lora_b`"):
        from_qwix(PARAMS, KERNELS, alpha=4)


def test_an_alpha_that_is_missing_or_has_no_effect_is_refused() -> None:
    with pytest.raises(lj.CheckpointError, match="'down/kernel': no pattern of `alpha` matches it"):
        from_qwix(TREE, KERNELS, alpha={"up/*": 4})
    with pytest.raises(lj.SpecError, match="every pattern of `alpha` to match a kernel with LoRA; 'left/\\*' matches"):
        from_qwix(TREE, KERNELS, alpha={"left/*": 4})
    with pytest.raises(lj.SpecError, match="Expected a finite number for `alpha`; got 'four'"):
        to_qwix(ours(), TREE, KERNELS, alpha="four")  # type: ignore[arg-type]


def test_shapes_that_fit_in_two_ways_are_refused() -> None:
    kernels = {"w": kernel((4, 4, 6), "ibo")}
    with pytest.raises(lj.CheckpointError, match=r"'w': a \(4, 4, 4\) and b \(4, 4, 6\) fit a kernel .* in 2 ways"):
        from_qwix(arrays((4, 4, 4), (4, 4, 6)), kernels, alpha=4)


def test_experts_that_differ_where_qwix_shares_b_are_refused() -> None:
    kernels = {"w": kernel((5, 8, 6), "bio")}
    tree = arrays((5, 8, R), (R, 6))
    adapter = jax.tree.map(lambda leaf: jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape),
                           from_qwix(tree, kernels, alpha=6))  # fmt: skip
    with pytest.raises(lj.AdapterError, match="'w': Qwix has one `b` for all batch axes of an `einsum`, and those"):
        to_qwix(adapter, tree, kernels, alpha=6)
