"""The table of `explain`: rows, totals and text."""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.testing import flops

LORA = lj.LoRA(rank=2, alpha=4)
factored = functools.partial(lj.explain, form="factored")  # other forms are cheaper for kernels this small


class Small(nn.Module):
    """An embedding, two layers, a head, and a layer that no call uses."""

    def setup(self) -> None:
        self.embed = nn.Embed(32, 8)
        self.up = nn.Dense(16)
        self.down = nn.Dense(8)
        self.head = nn.Dense(4)
        self.spare = nn.Dense(4)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.down(nn.relu(self.up(self.embed(tokens))))
        return self.head(x)

    def everything(self, tokens: jax.Array) -> Any:
        return self(tokens), self.spare(self.embed(tokens))


TOKENS = jnp.zeros((2, 3), jnp.int32)
VARIABLES = Small().init(jax.random.key(0), TOKENS, method="everything")
SPEC = {
    "**/embed/*": lj.LoRA(rank=2, alpha=3),
    "**/up/kernel": LORA,
    "**/down/kernel": lj.RSLoRA(rank=4, alpha=4),
    "**/head/*": lj.Full(),
    "**/spare/kernel": LORA,
}
ADAPTER = lj.init(jax.random.key(0), VARIABLES, SPEC)

# A Dense layer for n tokens: x·A, the scale, (x·A)·B, and the sum with the base.


def dense(n: int, d_in: int, d_out: int, rank: int) -> int:
    return 2 * n * d_in * rank + 2 * n * rank * d_out + n * rank + n * d_out


def lookup(n: int, d_out: int, rank: int) -> int:
    return 2 * n * rank * d_out + n * rank + n * d_out


def explain(**kwargs: Any) -> Any:
    return factored(Small().apply, VARIABLES, ADAPTER, TOKENS, **kwargs)


TABLE = """\
path                    shape  axes  kind       variant  rank  scale  used                     trainable  of base  FLOPs
──────────────────────  ─────  ────  ─────────  ───────  ────  ─────  ───────────────────────  ─────────  ───────  ─────
params/down/kernel      16×8   io    mlp        RSLoRA      4      2  factored dot_general ×1         96  15.789%  1,224
params/embed/embedding  32×8   io    embedding  LoRA        2    1.5  factored gather ×1              80  13.158%    252
params/head/bias        4      -     bias       Full        -      -  whole add ×1                     4   0.658%      0
params/head/kernel      8×4    -     head       Full        -      -  whole dot_general ×1            32   5.263%      0
params/spare/kernel     8×4    io    -          LoRA        2      2  never used                      24   3.947%      0
params/up/kernel        8×16   io    mlp        LoRA        2      2  factored dot_general ×1         48   7.895%    684

trainable: 284 parameters, 46.711% of the base's 608
memory:    adapter 1.1 kB, optimizer 2.3 kB (two moments, as for Adam)
forward:   2,160 FLOPs added, 58.06% of the base's 3,720"""


def test_flops_of_a_variant_before_the_uses_are_counted() -> None:
    params, x = {"w": jnp.ones((64, 48))}, jnp.ones((2, 64))
    rows = {}
    for variant in (lj.LoRA(rank=2, alpha=4), lj.DoRA(rank=2, alpha=4)):
        adapter = lj.init(jax.random.key(0), params, {"w": variant})
        rows[type(variant)] = lj.explain(lambda p, x: x @ p["w"], params, adapter, x, form="factored").rows[0]
    more = rows[lj.DoRA].flops - rows[lj.LoRA].flops
    norms = 2 * 64 * 48 * (2 + 1)  # ‖W0‖² and W0ᵀA; other terms have the size of the factors
    assert norms < more < 1.3 * norms


def test_the_table_has_this_text() -> None:
    assert str(explain()) == TABLE


def test_a_row_describes_a_low_rank_leaf() -> None:
    rows = {row.path: row for row in explain().rows}
    down = rows["params/down/kernel"]
    assert list(rows) == list(ADAPTER)
    assert (down.shape, down.axes, down.variant, down.rank, down.scale) == ((16, 8), "io", "RSLoRA", 4, 2.0)
    assert (down.used, down.parameters) == ("factored dot_general ×1", 16 * 4 + 4 * 8)
    assert down.flops == dense(6, 16, 8, 4)
    assert rows["params/up/kernel"].flops == dense(6, 8, 16, 2)
    assert rows["params/embed/embedding"].flops == lookup(6, 8, 2)


def test_a_row_describes_a_full_leaf() -> None:
    rows = {row.path: row for row in explain().rows}
    kernel, bias = rows["params/head/kernel"], rows["params/head/bias"]
    assert (kernel.axes, kernel.variant, kernel.rank, kernel.scale) == ("", "Full", None, None)
    assert (kernel.used, kernel.parameters, kernel.flops) == ("whole dot_general ×1", 32, 0)
    assert (bias.shape, bias.used, bias.parameters) == ((4,), "whole add ×1", 4)


def test_totals_are_sums_of_the_rows() -> None:
    found = explain()
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(ADAPTER))
    assert found.flops == sum(row.flops for row in found.rows)
    assert found.base_parameters == sum(leaf.size for leaf in jax.tree.leaves(VARIABLES))
    assert found.base_flops == flops(Small().apply, VARIABLES, TOKENS)
    assert found.adapter_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(ADAPTER))


def test_extra_flops_match_the_adapted_model() -> None:
    adapter = {path: part for path, part in ADAPTER.items() if not isinstance(part.variant, lj.Full)}
    found = factored(Small().apply, VARIABLES, adapter, TOKENS)
    adapted = flops(lj.lora(Small().apply, form="factored"), VARIABLES, adapter, TOKENS)
    assert found.base_flops + found.flops == adapted


def test_the_notebook_table_matches_the_text() -> None:
    html = explain()._repr_html_()
    html = re.sub(r' style="[^"]*"', "", html)
    assert html.startswith("<div><table><thead><tr><th>path</th><th>shape</th><th>axes</th>")
    assert html.count("<tr>") == 7
    assert (
        "<tr><td>params/up/kernel</td><td>8×16</td><td>io</td><td>mlp</td><td>LoRA</td><td>2</td><td>2</td>"
        "<td>factored dot_general ×1</td><td>48</td><td>7.895%</td><td>684</td></tr>" in html
    )
    assert html.endswith("<br>forward:   2,160 FLOPs added, 58.06% of the base&#x27;s 3,720</p>")


def test_the_notebook_table_escapes_paths() -> None:
    params = {"<script>": jnp.ones((4, 4))}
    adapter = lj.init(jax.random.key(0), params, {"*": LORA})
    html = factored(lambda p, x: x @ p["<script>"], params, adapter, jnp.ones((1, 4)))._repr_html_()
    assert "<script>" not in html
    assert ">&lt;script&gt;</td>" in html


# Uses


def test_unused_leaves_are_an_error_if_strict() -> None:
    with pytest.raises(lj.AdapterError) as caught:
        explain(strict=True)
    assert str(caught.value) == (
        "Expected the function to use every leaf of the adapter; it never uses 1 of 6.\n  params/spare/kernel\n"
        "  Remove them from the spec, or check that this is the function that is trained."
    )


def test_an_unused_full_leaf_is_an_error_if_strict() -> None:
    params = {"kernel": jnp.ones((4, 4)), "unused": jnp.ones(4)}
    adapter = lj.init(jax.random.key(0), params, {"unused": lj.Full(), "kernel": LORA})
    found = factored(lambda p, x: x @ p["kernel"], params, adapter, jnp.ones((1, 4)))
    assert {row.path: row.used for row in found.rows}["unused"] == "never used"
    with pytest.raises(lj.AdapterError, match="never uses 1 of 2"):
        factored(lambda p, x: x @ p["kernel"], params, adapter, jnp.ones((1, 4)), strict=True)


def test_kwargs_are_passed_to_the_model() -> None:
    found = explain(strict=True, kwargs={"method": "everything"})
    assert {row.path: row.used for row in found.rows}["params/spare/kernel"] == "factored dot_general ×1"


KERNEL = {"kernel": jnp.ones((8, 6))}
PART = lj.init(jax.random.key(0), KERNEL, {"kernel": LORA})


def only_row(apply: Any, *args: Any, **kwargs: Any) -> Any:
    (row,) = factored(apply, KERNEL, PART, *args, **kwargs).rows
    return row


def test_uses_of_one_kind_are_counted_together() -> None:
    def apply(params: Any, x: jax.Array) -> Any:
        y = x @ params["kernel"]
        return x @ params["kernel"], y @ params["kernel"].T

    row = only_row(apply, jnp.ones((5, 8)))
    assert row.used == "factored dot_general ×3"
    assert row.flops == 2 * dense(5, 8, 6, 2) + dense(5, 6, 8, 2)


def test_uses_of_several_kinds_are_listed() -> None:
    def apply(params: Any, x: jax.Array) -> Any:
        return x @ params["kernel"], jnp.tanh(params["kernel"]), params["kernel"][jnp.array([1, 2])]

    assert only_row(apply, jnp.ones((5, 8)), materialize=["*"]).used == (
        "factored dot_general ×1, materialized tanh ×1, factored gather ×1"
    )


def test_a_use_that_needs_the_materialized_kernel_is_refused_unless_listed() -> None:
    def apply(params: Any, x: jax.Array) -> jax.Array:
        return x @ jnp.tanh(params["kernel"])

    refused = factored(apply, KERNEL, PART, jnp.ones((5, 8)))
    assert refused.rows[0].used == "refused tanh ×1"
    assert str(refused).endswith(
        "refused:   `lora` raises an error for 1 leaves; to materialize them there: materialize=['kernel']"
    )
    with pytest.raises(lj.UnsupportedError, match="passes it to `tanh`"):
        factored(apply, KERNEL, PART, jnp.ones((5, 8)), strict=True)
    assert only_row(apply, jnp.ones((5, 8)), materialize=["kernel"]).used == "materialized tanh ×1"


def test_flops_of_materializing_a_kernel_are_counted() -> None:
    row = only_row(lambda params, x: x @ jnp.tanh(params["kernel"]), jnp.ones((5, 8)), materialize=["kernel"])
    assert row.flops >= 2 * 8 * 6 * 2 + 8 * 6  # A·B, and the sum with W0


def loop(params: Any, x: jax.Array, *, length: int, repeats: int = 1) -> jax.Array:
    def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ params["kernel"] @ params["kernel"].T), None

    def outer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.lax.scan(body, x, length=length)

    return jax.lax.scan(outer, x, length=repeats)[0]


@pytest.mark.parametrize(("length", "repeats"), [(1, 1), (7, 1), (7, 3)])
def test_a_loop_multiplies_uses_and_flops(length: int, repeats: int) -> None:
    row = only_row(loop, jnp.ones((5, 8)), kwargs={"length": length, "repeats": repeats})
    assert row.used == f"factored dot_general ×{2 * length * repeats}"
    assert row.flops == length * repeats * (dense(5, 8, 6, 2) + dense(5, 6, 8, 2))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return nn.gelu(nn.Dense(16, name="dense")(x)), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = nn.remat(Block, prevent_cse=False)
        layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=12)
        return layers(name="layers")(x, None)[0]


def test_a_scanned_stack_counts_every_layer() -> None:
    x = jax.ShapeDtypeStruct((3, 5, 16), jnp.float32)
    params = jax.eval_shape(Stack().init, jax.random.key(0), x)
    kernels = lj.kernels(Stack().apply, params, x)
    adapter = lj.init(jax.random.key(0), params, {"**/kernel": lj.LoRA(rank=4, alpha=4)}, kernels=kernels)
    (row,) = factored(Stack().apply, params, adapter, x).rows
    assert (row.path, row.shape, row.axes) == ("params/layers/dense/kernel", (12, 16, 16), "bio")
    assert row.used == "factored dot_general ×12"
    assert row.parameters == 12 * (16 * 4 + 4 * 16)
    assert row.flops == 12 * dense(15, 16, 16, 4)


def test_flops_of_a_convolution_include_the_window() -> None:
    model = nn.Conv(8, (3, 3), use_bias=False)
    x = jnp.ones((2, 10, 10, 4))
    params = model.init(jax.random.key(0), x)
    kernels = lj.kernels(model.apply, params, x)
    adapter = lj.init(jax.random.key(0), params, {"**/kernel": lj.LoRA(rank=2, alpha=4)}, kernels=kernels)
    (row,) = factored(model.apply, params, adapter, x).rows
    positions = 2 * 10 * 10
    assert row.used == "factored conv_general_dilated ×1"
    assert row.flops == dense(positions, 3 * 3 * 4, 8, 2)


# Shapes only


def shapes(tree: Any) -> Any:
    return jax.eval_shape(lambda: tree)


@pytest.mark.parametrize("abstract", ["params", "adapter", "arguments", "all"])
def test_shapes_are_enough(abstract: str) -> None:
    def taken(name: str, tree: Any) -> Any:
        return shapes(tree) if abstract in (name, "all") else tree

    given = taken("params", VARIABLES), taken("adapter", ADAPTER), taken("arguments", TOKENS)
    assert str(factored(Small().apply, *given)) == TABLE


def test_nothing_is_evaluated() -> None:
    def apply(params: Any, x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: pytest.fail("the model was run"))
        return x @ params["kernel"]

    only_row(apply, jnp.ones((5, 8)))
    jax.effects_barrier()


def test_a_model_with_unknown_flops_is_explained() -> None:
    def apply(params: Any, x: jax.Array) -> jax.Array:
        return jnp.fft.fft(x @ params["kernel"])

    found = factored(apply, KERNEL, PART, jnp.ones((5, 8)))
    assert found.base_flops is None
    assert found.rows[0].flops == dense(5, 8, 6, 2)
    assert str(found).endswith(f"\nforward:   {dense(5, 8, 6, 2):,} FLOPs added, the base's are unknown")


def test_a_model_without_flops_is_explained() -> None:
    adapter = lj.init(jax.random.key(0), KERNEL, {"kernel": lj.Full()})
    found = factored(lambda params, x: params["kernel"][x], KERNEL, adapter, jnp.array([1, 2]))
    assert (found.base_flops, found.flops) == (0, 0)
    assert str(found).endswith("forward:   0 FLOPs added, 0.00% of the base's 0")


def test_leaves_that_are_not_arrays_are_not_counted() -> None:
    params = KERNEL | {"temperature": 2.0, "name": "small"}
    found = factored(lambda p, x: x @ p["kernel"] / p["temperature"], params, PART, jnp.ones((5, 8)))
    assert found.base_parameters == 48


# Memory


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_adapter_bytes_depend_on_the_dtype(param_dtype: Any) -> None:
    adapter = lj.init(jax.random.key(0), KERNEL, {"kernel": LORA}, param_dtype=param_dtype)
    found = factored(lambda p, x: x @ p["kernel"], KERNEL, adapter, jnp.ones((5, 8)))
    assert found.adapter_bytes == 28 * jnp.dtype(param_dtype).itemsize
    assert (found.optimizer_bytes, found.optimizer) == (2 * found.adapter_bytes, "two moments, as for Adam")


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (optax.adam(1e-3), 2 * 1136 + 4),  # two moments, and the count of steps
        (optax.sgd(1e-3), 0),
        (optax.sgd(1e-3, momentum=0.9), 1136),
        (optax.adam(1e-3, mu_dtype=jnp.bfloat16), 1136 + 1136 // 2 + 4),
        (optax.adafactor(1e-3, min_dim_size_to_factor=4), None),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.0, 1e-3, 10))), None),
        (optax.MultiSteps(optax.adam(1e-3), 4).gradient_transformation(), None),
    ],
    ids=["adam", "sgd", "momentum", "narrow adam", "adafactor", "chain", "MultiSteps"],
)
def test_optimizer_bytes_match_the_state(tx: Any, expected: int | None) -> None:
    found = explain(tx=tx)
    assert found.optimizer_bytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tx.init(ADAPTER)))
    assert expected in (None, found.optimizer_bytes)
    assert found.optimizer == "the state of `tx`"
    assert f"optimizer {found.optimizer_bytes} B (" in str(found) or " kB (the state of `tx`)" in str(found)


@pytest.mark.parametrize(
    "call",
    [lambda query, kernel: query @ kernel, lambda query, kernel: (kernel.T @ query.T).T],
    ids=["left", "right"],
)
def test_a_full_leaf_may_be_multiplied_with_an_adapted_kernel(call: Any) -> None:
    params = {"kernel": jnp.ones((8, 6)), "query": jnp.ones((3, 8))}
    spec = {"kernel": lj.LoRA(rank=2, alpha=4), "query": lj.Full()}
    adapter = lj.init(jax.random.key(0), params, spec)
    apply = lambda params: call(params["query"], params["kernel"])  # noqa: E731
    used = {row.path: row.used for row in factored(apply, params, adapter).rows}
    assert used == {"kernel": "factored dot_general ×1", "query": "whole dot_general ×1"}
    assert {path: kernel.axes for path, kernel in lj.kernels(apply, params).items()} == {"kernel": "io", "query": "oi"}


def test_a_full_image_may_be_convolved_with_an_adapted_kernel() -> None:
    params = {"kernel": jnp.ones((3, 3, 2, 4)), "image": jnp.ones((1, 5, 5, 2))}
    spec = {"kernel": lj.LoRA(rank=2, alpha=4, axes="iiio"), "image": lj.Full()}
    adapter = lj.init(jax.random.key(0), params, spec)

    def apply(params: Any) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            params["image"], params["kernel"], (1, 1), "SAME", dimension_numbers=numbers
        )

    used = {row.path: row.used for row in factored(apply, params, adapter).rows}
    name = "conv_general_dilated ×1"
    assert used == {"kernel": f"factored {name}", "image": f"whole {name}"}


# The kind of a leaf, and axes that differ from the model's


def test_a_row_shows_the_kind_that_kernels_finds() -> None:
    found = lj.kernels(Small().apply, VARIABLES, TOKENS)
    assert {row.path: row.kind for row in explain().rows} == {path: found[path].kind for path in ADAPTER}


TURNED = lj.init(jax.random.key(0), KERNEL, {"kernel": lj.LoRA(rank=2, alpha=4, axes="oi")})


def test_axes_that_differ_from_the_model_are_noted() -> None:
    found = factored(lambda p, x: x @ p["kernel"], KERNEL, TURNED, jnp.ones((5, 8)))
    assert (found.rows[0].axes, found.rows[0].traced) == ("oi", "io")
    assert " oi, traced io " in str(found)


def test_axes_that_differ_from_the_model_are_an_error_if_strict() -> None:
    with pytest.raises(lj.AdapterError) as caught:
        factored(lambda p, x: x @ p["kernel"], KERNEL, TURNED, jnp.ones((5, 8)), strict=True)
    assert str(caught.value) == (
        "Expected the roles of the adapter's axes to be those of the traced model; 1 of 1 leaves differ.\n"
        "  'kernel' has 'oi', the model uses it as 'io'\n"
        "  Make the adapter with init(..., kernels=lora_jax.kernels(apply, params, *args)), without `axes=`."
    )


def test_a_batch_axis_adapted_as_an_input_is_noted() -> None:
    params = {"w": jnp.ones((3, 4, 4))}
    adapter = lj.init(jax.random.key(0), params, {"w": lj.LoRA(rank=2, alpha=4, axes="iio")})

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    assert factored(apply, params, adapter, jnp.ones((2, 4))).rows[0].traced == "bio"


def test_a_tied_head_is_not_a_mismatch() -> None:
    def apply(params: Any, ids: jax.Array) -> jax.Array:
        return jnp.tanh(params["kernel"][ids]) @ params["kernel"].T

    (row,) = factored(apply, KERNEL, PART, jnp.zeros(3, jnp.int32), strict=True).rows
    assert (row.axes, row.traced, row.kind) == ("io", "", "embedding")


def test_an_axis_of_size_one_is_not_a_mismatch() -> None:
    params = {"w": jnp.ones((1, 1, 6))}
    adapter = lj.init(jax.random.key(0), params, {"w": lj.LoRA(rank=1, alpha=1, axes="oio")})
    (row,) = factored(lambda p, x: jnp.einsum("ti,bio->to", x, p["w"]), params, adapter, jnp.ones((3, 1))).rows
    assert row.traced == ""


def test_equal_leaves_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    params = {f"layer_{number}": jnp.ones((4, 4)) for number in range(6)} | {"last": jnp.ones((4, 3))}
    adapter = lj.init(jax.random.key(0), params, {"*": lj.DoRA(rank=2, alpha=4)})

    def apply(params: Any, x: jax.Array) -> jax.Array:
        for number in range(6):
            x = jnp.tanh(x @ params[f"layer_{number}"])
        return x @ params["last"]

    traced, make_jaxpr = [], jax.make_jaxpr
    monkeypatch.setattr(jax, "make_jaxpr", lambda *args: traced.append(1) or make_jaxpr(*args))
    rows = factored(apply, params, adapter, jnp.ones((2, 4))).rows
    assert len(traced) == 1 + 2  # the model, and one leaf of each shape
    assert len({row.flops for row in rows}) == 2


# Arguments of the model


@pytest.mark.parametrize("name", ["kernels", "explain", "plan", "adapt"])
def test_a_model_keyword_outside_kwargs_is_an_error_with_advice(name: str) -> None:
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    function, args, options = {
        "kernels": (lj.kernels, (KERNEL,), {}),
        "explain": (lj.explain, (KERNEL, PART), {}),
        "plan": (lj.plan, (KERNEL, {"kernel": LORA}, optax.sgd(0.1), mesh), {}),
        "adapt": (lj.adapt, (KERNEL, {"kernel": LORA}), {"key": jax.random.key(0)}),
    }[name]
    with pytest.raises(TypeError) as caught:
        function(lambda p, x, train, size: x @ p["kernel"], *args, jnp.ones((5, 8)), train=True, size=3, **options)
    assert str(caught.value) == (
        f"{name}() got unexpected keyword arguments: 'train', 'size'.\n"
        f"  Pass the model's keyword arguments as one mapping: {name}(..., kwargs={{'train': ..., 'size': ...}})."
    )


def test_a_model_may_have_arguments_of_any_name() -> None:
    seen = []

    def apply(variables: Any, x: jax.Array, **given: Any) -> jax.Array:
        seen.append(given)
        return x @ variables["kernel"]

    names = ("apply", "params", "adapter", "abstract_params", "spec", "tx", "mesh", "loss", "form", "strict", "key")
    given = {name: "a model argument" for name in (*names, "dense", "kwargs", "shardings", "full", "param_dtype")}
    x, spec, mesh = jnp.ones((5, 8)), {"kernel": LORA}, jax.sharding.Mesh(jax.devices()[:1], ("data",))
    lj.kernels(apply, KERNEL, x, kwargs=given)
    lj.explain(apply, KERNEL, PART, x, kwargs=given)
    lj.adapt(apply, KERNEL, spec, x, key=jax.random.key(0), kwargs=given)
    count = len(seen)
    assert seen == [given] * count and count == 3
    lj.plan(apply, KERNEL, spec, optax.sgd(0.1), mesh, x, kwargs=given, full=False, loss=lambda y, *_, **__: y.sum())
    assert seen[3:] == [given] * (len(seen) - 3) and len(seen) > 3


METHODS = {
    "AdaLoRA": lj.AdaLoRA(rank=2, alpha=4),
    "DeLoRA": lj.DeLoRA(rank=2),
    "DoRA": lj.DoRA(rank=2, alpha=4),
    "IA3": lj.IA3(),
    "LoRA-XS": lj.LoRAXS(rank=2, alpha=4),
    "MiSS": lj.MiSS(rank=2),
    "QA-LoRA": lj.QALoRA(rank=2, alpha=4, group=2),
    "Rows": lj.Rows(ids=[1]),
    "VeRA": lj.VeRA(rank=2, seed=0),
} | {
    f"Layers of {name}": lj.Layers(layers=[1], variant=variant)
    for name, variant in {"LoRA": LORA, "MiSS": lj.MiSS(rank=2)}.items()
}


@pytest.mark.parametrize("name", METHODS)
def test_shapes_of_an_adapter_suffice(name: str) -> None:
    # Was an AttributeError: the arrays of the variant were computed, and not only their shapes.
    def apply(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]

    params, x, spec = {"w": jnp.ones((2, 4, 4))}, jnp.ones((3, 4)), {"w": METHODS[name]}
    kernels = lj.kernels(apply, params, x)
    shapes = jax.eval_shape(lambda key, params: lj.init(key, params, spec, kernels=kernels), jax.random.key(0), params)
    adapter = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), shapes)
    got = factored(apply, jax.eval_shape(lambda: params), shapes, x)
    assert got == factored(apply, params, adapter, x)
    assert got.rows[0].used == "factored dot_general ×2"


def test_a_numpy_base_in_float64_counts_as_jax_converts_it() -> None:
    # Was a warning of JAX 0.12, which is an error here.
    def apply(params: Any, x: Any) -> Any:
        return x @ params["kernel"]

    params, x = {"kernel": np.ones((4, 3))}, jnp.ones((2, 4))
    adapter = lj.init(jax.random.key(0), params, {"kernel": LORA})
    assert factored(apply, params, adapter, x) == factored(apply, jax.tree.map(jnp.asarray, params), adapter, x)
