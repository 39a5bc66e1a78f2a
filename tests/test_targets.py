"""Targets: the kinds of leaves that tracing finds, and specs with targets as keys."""

from __future__ import annotations

import collections
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from helpers import assert_close, dense, trained
from jax import lax
from zoo import ZOO

import lora_jax as lj
from lora_jax import targets

LORA = lj.LoRA(rank=2, alpha=4)
ALL = [getattr(targets, name) for name in targets.__all__ if name != "Target"]


def kinds(apply: Any, params: Any, *args: Any, **options: Any) -> dict[str | None, set[str]]:
    """The paths of each kind."""
    found = collections.defaultdict(set)
    for path, kernel in lj.kernels(apply, params, *args, **options).items():
        found[kernel.kind].add(path.removeprefix("params/"))
    return dict(found)


# Models with names outside `ATTENTION_NAMES` and `HEAD_NAMES`.


class Layer(nn.Module):
    fused: bool = False

    def mixed(self, x: jax.Array) -> jax.Array:
        if not self.fused:
            return nn.MultiHeadDotProductAttention(num_heads=2, name="mix")(x)
        q, k, v = jnp.split(nn.Dense(24, name="fused")(x).reshape(*x.shape[:-1], 2, 12), 3, -1)
        return nn.Dense(8, name="out")(nn.dot_product_attention(q, k, v).reshape(x.shape))

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        x = x + self.mixed(nn.LayerNorm(name="before")(x))
        y = nn.RMSNorm(name="between")(x)
        gate, up = nn.Dense(12, use_bias=False, name="gate")(y), nn.Dense(12, name="up")(y)
        return x + nn.Dense(8, name="down")(nn.silu(gate) * up), None


class Decoder(nn.Module):
    how: str = "unrolled"
    fused: bool = False
    end: str = "untied"

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        words = nn.Embed(11, 8, name="words")
        x = words(ids)
        if self.how == "scanned":
            stack = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            x, _ = stack(self.fused, name="layers")(x, None)
        else:
            for number in range(2):
                x, _ = Layer(self.fused, name=f"layer_{number}")(x)
        x = nn.LayerNorm(name="last")(x)
        return nn.Dense(11, name="final")(x) if self.end == "untied" else words.attend(x) if self.end == "tied" else x


IDS = jnp.zeros((2, 5), jnp.int32)
ATTENTION = {f"mix/{name}" for name in ("query", "key", "value", "out")}
FUSED = {"fused", "out"}
MLP = {"gate", "up", "down"}


@pytest.mark.parametrize("fused", [False, True], ids=["query, key, value", "fused"])
@pytest.mark.parametrize("end", ["untied", "tied", "none"])
@pytest.mark.parametrize("how", ["unrolled", "scanned"])
def test_kinds_of_a_transformer_do_not_depend_on_names(how: str, end: str, fused: bool) -> None:
    model = Decoder(how, fused, end)
    params = jax.eval_shape(model.init, jax.random.key(0), IDS)
    layers = ["layers"] if how == "scanned" else ["layer_0", "layer_1"]

    def paths_in(modules: set[str], name: str) -> set[str]:
        return {f"{layer}/{module}/{name}" for layer in layers for module in modules}

    attention = FUSED if fused else ATTENTION
    expected = {
        "attention": paths_in(attention, "kernel"),
        "mlp": paths_in(MLP, "kernel"),
        "embedding": {"words/embedding"},
        "norm": paths_in({"before", "between"}, "scale") | paths_in({"before"}, "bias") | {"last/scale", "last/bias"},
        "bias": paths_in(attention | {"up", "down"}, "bias"),
    }
    if end == "untied":
        expected |= {"head": {"final/kernel"}, "bias": expected["bias"] | {"final/bias"}}
    assert kinds(model.apply, params, IDS) == expected


def test_kinds_of_an_nnx_transformer() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.words = nnx.Embed(11, 8, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.mix = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.up = nnx.Linear(8, 12, rngs=rngs)
            self.down = nnx.Linear(12, 8, rngs=rngs)
            self.final = nnx.Linear(8, 11, use_bias=False, rngs=rngs)

        def __call__(self, ids: jax.Array) -> jax.Array:
            x = self.words(ids)
            x = x + self.mix(self.norm(x))
            return self.final(x + self.down(nnx.gelu(self.up(x))))

    graph, params = nnx.split(Net(nnx.Rngs(0)))
    assert kinds(lambda params, ids: nnx.merge(graph, params)(ids), params, IDS) == {
        "attention": {f"{path}/kernel" for path in ATTENTION},
        "mlp": {"up/kernel", "down/kernel"},
        "head": {"final/kernel"},
        "embedding": {"words/embedding"},
        "norm": {"norm/scale", "norm/bias"},
        "bias": {f"{path}/bias" for path in ATTENTION | {"up", "down"}},
    }


@pytest.mark.parametrize("training", [True, False])
def test_kinds_of_a_convolutional_net_with_statistics(training: bool) -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.Conv(8, (3, 3), name="first")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not training, name="norm")(x))
            x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8, use_bias=False, name="depthwise")(x))
            return nn.Dense(3, name="last")(x.mean((1, 2)))

    x = jnp.ones((2, 6, 6, 3))
    variables = jax.eval_shape(Net().init, jax.random.key(0), x)
    statistics = {"batch_stats/norm/mean", "batch_stats/norm/var"}

    def apply(variables: Any, x: jax.Array) -> Any:
        return Net().apply(variables, x, mutable=["batch_stats"] if training else False)

    assert kinds(apply, variables, x) == {
        "convolution": {"first/kernel", "depthwise/kernel"},
        "norm": {"norm/scale", "norm/bias"},
        "bias": {"first/bias", "last/bias"},
        "head": {"last/kernel"},
        None: statistics,
    }


# Small functions

W = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
X = jnp.ones((3, 4))


def kind_of(apply: Any, params: Any, *args: Any) -> dict[str, str | None]:
    return {path: kernel.kind for path, kernel in lj.kernels(apply, params, *args).items()}


@pytest.mark.parametrize(
    ("apply", "expected"),
    {
        "the last of two": (lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], ("mlp", "head")),
        "a residual stream has no head": (lambda p, x: x + jnp.tanh(x @ p["a"]) @ p["b"], ("mlp", "mlp")),
        "the stream goes into a head": (lambda p, x: (x + x @ p["a"]) @ p["b"], ("mlp", "head")),
        "two results": (lambda p, x: (x @ p["a"], x @ p["b"]), ("mlp", "mlp")),
        "the loss of a head": (lambda p, x: jnp.mean(jax.nn.softmax(jnp.tanh(x @ p["a"]) @ p["b"])), ("mlp", "head")),
        "a hidden layer that is a result": (lambda p, x: ((h := jnp.tanh(x @ p["a"])), h @ p["b"]), ("mlp", "head")),
        "integers are no product": (lambda p, x: jnp.argmax(jnp.tanh(x @ p["a"]) @ p["b"], -1), ("mlp", "mlp")),
        "a recurrence": (
            lambda p, x: lax.scan(lambda h, x: (jnp.tanh(x @ p["a"] + h @ p["b"]),) * 2, jnp.zeros(4), x)[1],
            ("mlp", "mlp"),
        ),
        "in a branch": (
            lambda p, x: lax.cond(x[0, 0] > 0, lambda x: x @ p["a"], lambda x: x, x) @ p["b"],
            ("mlp", "head"),
        ),
        "scores and values": (
            lambda p, x: jax.nn.softmax(x @ p["a"] @ (x @ p["a"]).T) @ (x @ p["b"]),
            ("attention", "attention"),
        ),
        "linear attention": (lambda p, x: x @ p["a"] @ ((x @ p["a"]).T @ (x @ p["b"])), ("attention", "attention")),
        "only scores are not attention": (lambda p, x: (x @ p["a"]) @ (x @ p["b"]).T, ("mlp", "mlp")),
        "weights of a router are none": (
            lambda p, x: jnp.einsum("te,td->ed", jax.nn.softmax(x @ p["a"]), x @ p["b"]),
            ("mlp", "mlp"),
        ),
        "a one-hot product is a lookup": (
            lambda p, x: jax.nn.one_hot(jnp.argmax(x, -1), 4) @ p["a"] @ p["b"],
            ("embedding", "head"),
        ),
        "in a while loop": (
            lambda p, x: lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ p["a"]), x) @ p["b"],
            ("mlp", "head"),
        ),
    }.values(),
)
def test_kinds_of_linear_kernels(apply: Any, expected: tuple[str, str]) -> None:
    assert tuple(kind_of(apply, W, X).values()) == expected


def test_a_loss_has_the_head_of_its_model() -> None:
    def loss(p: Any, ids: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
        logits = jnp.tanh(p["table"][ids] @ p["up"]) @ p["out"]
        each = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
        return -(each * weights).sum() / weights.sum()

    params = {"table": jnp.ones((7, 4)), "up": jnp.ones((4, 8)), "out": jnp.ones((8, 7))}
    assert kind_of(loss, params, IDS, IDS, jnp.ones(IDS.shape)) == {"out": "head", "table": "embedding", "up": "mlp"}


@pytest.mark.parametrize(
    ("apply", "expected"),
    {
        "added": (lambda v, x: x + v, "bias"),
        "multiplied": (lambda v, x: x * v, "norm"),
        "one more than it is multiplied": (lambda v, x: x * (1 + v), "norm"),
        "subtracted": (lambda v, x: x - v, None),
        "after a root": (lambda v, x: x / jnp.sqrt(jnp.var(x)) + v, "norm"),
        "a root and something else": (lambda v, x: jnp.tanh(x / jnp.sqrt(jnp.var(x))) + v, "bias"),
        "the exponential": (lambda v, x: x * jnp.exp(v), None),
        "cast": (lambda v, x: x + v.astype(jnp.bfloat16), "bias"),
        "contracted": (lambda v, x: x @ v, None),
        "unused": (lambda v, x: x, None),
    }.values(),
)
def test_kinds_of_vectors(apply: Any, expected: str | None) -> None:
    assert kind_of(lambda p, x: apply(p["v"], x), {"v": jnp.ones(4)}, X) == {"v": expected}


def test_vectors_of_stacked_layers_are_not_kernels() -> None:
    params = {"w": jnp.ones((2, 4, 4)), "scale": jnp.ones((2, 4)), "shift": jnp.ones((2, 4)), "bias": jnp.ones((2, 4))}

    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        y = x * p["scale"] + p["shift"]
        return x + jnp.tanh(y @ p["w"] + p["bias"]), None

    assert kind_of(lambda p, x: lax.scan(layer, x, p)[0], params, X) == {
        "bias": "bias",
        "scale": "norm",
        "shift": "norm",
        "w": "mlp",
    }


def test_a_position_is_an_embedding_only_if_it_is_looked_up() -> None:
    params = {"at": jnp.ones((1, 3, 4)), "w": jnp.ones((4, 4))}
    x = jnp.ones((2, 3, 4))
    assert kind_of(lambda p, x: (x @ p["w"] + p["at"]).sum(), params, x)["at"] is None
    rows = jnp.array([2, 1, 0])
    assert kind_of(lambda p, x: (x @ p["w"] + p["at"][0, rows]).sum(), params, x)["at"] == "embedding"


def test_an_ambiguous_kernel_is_attention_by_its_name() -> None:
    """Only its path distinguishes it from the layer before."""
    params = {
        "attn": {"first": jnp.ones((4, 4)), "q": jnp.ones((4, 4)), "k": jnp.ones((4, 4))},
        "before": jnp.ones((4, 4)),
    }

    def apply(p: Any, x: jax.Array) -> jax.Array:
        x = jnp.tanh(x @ p["before"])
        q = jnp.tanh(x @ p["attn"]["first"]) @ p["attn"]["q"]
        return jax.nn.softmax(q @ (k := x @ p["attn"]["k"]).T) @ k

    assert kind_of(apply, params, X) == {
        "attn/first": "attention",
        "attn/k": "attention",
        "attn/q": "attention",
        "before": "mlp",
    }


def test_an_ambiguous_head_is_found_by_its_name() -> None:
    params = {"lm_head": jnp.ones((4, 4)), "router": jnp.ones((4, 4))}
    assert kind_of(lambda p, x: (x @ p["lm_head"], x @ p["router"]), params, X) == {"lm_head": "head", "router": "mlp"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp", {"mlp": {"Dense_0/kernel"}, "head": {"Dense_1/kernel"}, "bias": {"Dense_0/bias", "Dense_1/bias"}}),
        ("experts", {"mlp": {"up", "down", "router/kernel"}}),
        ("nnx_stateful", {
            "mlp": {"layer/linear/kernel"},
            "head": {"heads/kernel"},
            "norm": {"layer/norm/scale", "layer/norm/bias"},
            "bias": {"layer/linear/bias", "heads/bias"},
        }),
        ("nnx_scanned", {
            "mlp": {"layers/linear/kernel"},
            "norm": {"layers/norm/scale", "layers/norm/bias"},
            "bias": {"layers/linear/bias"},
        }),
        ("grouped_conv", {
            "convolution": {"depthwise/kernel", "grouped/kernel", "up/kernel"},
            "bias": {"depthwise/bias", "grouped/bias", "up/bias"},
        }),
        ("decoding", {
            "attention": {"query/kernel", "key/kernel", "value/kernel", "out/kernel"},
            "bias": {"query/bias", "key/bias", "value/bias", "out/bias"},
        }),
        ("plain_function", {"mlp": {"0/experts"}, "head": {"1/0"}, "bias": {"1/1"}}),
    ],
)  # fmt: skip
def test_kinds_of_models_of_the_zoo(name: str, expected: Any, key: jax.Array) -> None:
    model = ZOO[name](key, jnp.float32)
    assert kinds(model.apply, model.params, *model.args) == expected


def test_an_equinox_net_whose_lookup_is_batched(key: jax.Array) -> None:
    model = ZOO["equinox_net"](key, jnp.float32)
    assert kinds(model.apply, model.params, *model.args) == {
        "embedding": {"embedding/weight"},
        "mlp": {"cell/weight_ih", "cell/weight_hh", "head/layers/0/weight"},
        "head": {"head/layers/1/weight"},
        "bias": {"cell/bias", "cell/bias_n", "head/layers/0/bias", "head/layers/1/bias"},
    }


def test_one_row_is_a_lookup_and_one_layer_is_not() -> None:
    params = {"table": jnp.ones((7, 4)), "w": jnp.ones((3, 4, 4)), "b": jnp.ones((3, 4)), "out": jnp.ones((4, 5))}

    def apply(p: Any, token: jax.Array) -> jax.Array:
        def layer(number: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.tanh(x @ p["w"][number] + lax.dynamic_index_in_dim(p["b"], number, keepdims=False))

        return lax.fori_loop(0, 3, layer, p["table"][token]) @ p["out"]

    assert kind_of(apply, params, jnp.int32(2)) == {"b": "bias", "out": "head", "table": "embedding", "w": "mlp"}


def test_experts_that_are_looked_up_are_kernels() -> None:
    params = {"w": jnp.ones((2, 4, 4)), "out": jnp.ones((4, 5))}

    def apply(p: Any, x: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.einsum("td,tdf->tf", x, p["w"][ids]) @ p["out"]

    assert kind_of(apply, params, X, jnp.array([0, 1, 0])) == {"out": "head", "w": "mlp"}


def test_a_custom_kernel_that_gets_query_key_and_value_is_attention() -> None:
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    shape = jax.ShapeDtypeStruct((128, 1, 128), jnp.float32)
    params = {name: shape for name in ("q", "k", "v", "o")}

    def apply(p: Any, x: jax.Array) -> jax.Array:
        q, k, v = (jnp.einsum("btd,dhk->bhtk", x, p[name]) for name in "qkv")
        return x + jnp.einsum("bhtk,dhk->btd", flash_attention(q, k, v), p["o"])

    x = jax.ShapeDtypeStruct((1, 256, 128), jnp.float32)
    assert kind_of(apply, params, x) == dict.fromkeys("koqv", "attention")


# Specs


def test_a_target_can_be_a_key_and_the_first_match_decides(key: jax.Array) -> None:
    params = jax.jit(Decoder().init)(key, IDS)
    found = lj.kernels(Decoder().apply, params, IDS)
    other = lj.DoRA(rank=1, alpha=1)
    spec = {"**/layer_1/**": None, targets.mlp: other, targets.all_linear: LORA, targets.norms: lj.Full()}
    adapter = lj.init(key, params, spec, kernels=found)
    chosen = {path.removeprefix("params/"): part.variant for path, part in adapter.items()}
    assert chosen == {
        **{f"layer_0/{module}/kernel": other for module in MLP},
        **{f"layer_0/{module}/kernel": LORA for module in ATTENTION},
        **dict.fromkeys(["layer_0/before/scale", "layer_0/before/bias", "layer_0/between/scale"], lj.Full()),
        **dict.fromkeys(["last/scale", "last/bias"], lj.Full()),
    }
    values = trained(key, adapter)
    apply = lj.lora(Decoder().apply)
    assert_close(apply(params, values, IDS), dense(Decoder().apply)(params, values, IDS))


def test_plan_and_extract_take_targets_too() -> None:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ p["a"]) @ p["b"]

    mesh, spec = jax.sharding.Mesh(jax.devices()[:1], ("data",)), {targets.output_head: LORA}
    assert lj.plan(apply, W, spec, optax.sgd(0.1), mesh, X, full=False).lora.adapter == 4 * (4 * 2 + 2 * 4)
    after = jax.tree.map(lambda leaf: leaf + jnp.ones((4, 1)) @ jnp.ones((1, 4)), W)
    found, _ = lj.extract(W, after, {"a": lj.Full()} | spec, kernels=lj.kernels(apply, W, X))
    assert {path: part.variant for path, part in found.items()} == {"a": lj.Full(), "b": LORA}


def test_targets_are_values() -> None:
    assert len({*ALL, *ALL}) == len(ALL) == 8
    assert [repr(target) for target in ALL] == [f"targets.{target.name}" for target in ALL]
    for target in ALL:
        assert getattr(targets, target.name) is target


def test_a_target_that_matches_nothing_is_an_error_with_counts() -> None:
    found = lj.kernels(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], W, X)
    with pytest.raises(lj.SpecError) as caught:
        lj.init(jax.random.key(0), W, {targets.attention: LORA}, kernels=found)
    assert str(caught.value) == (
        "Expected every rule to match a leaf; targets.attention matches none of 2 leaves (1 mlp, 1 head).\n"
        "  `lora_jax.kernels(apply, params, *args)` shows the kind of each leaf; to select leaves by "
        "path, use a pattern."
    )


def test_a_target_without_kernels_is_an_error_with_advice() -> None:
    with pytest.raises(lj.SpecError) as caught:
        lj.init(jax.random.key(0), W, {targets.all_linear: LORA})
    assert str(caught.value) == (
        "Expected `kernels`, because targets.all_linear selects leaves by their use in the traced model; got none.\n"
        "  Pass kernels=lora_jax.kernels(apply, params, *args), or call lora_jax.adapt, which traces the model."
    )


def test_errors_name_the_target() -> None:
    found = lj.kernels(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], W, X)
    with pytest.raises(lj.SpecError, match=r"^Cannot adapt 'a' of shape \(4, 4\), by the rule targets.mlp: ") as caught:
        lj.init(jax.random.key(0), W, {targets.mlp: lj.LoRA(rank=9, alpha=4)}, kernels=found)
    assert "{targets.mlp: LoRA(rank=9, alpha=4, clip_rank=True)}" in str(caught.value)
    with pytest.raises(lj.SpecError, match=r"targets.mlp has none, because .*\n  The earlier rules: 'a'.\n"):
        lj.init(jax.random.key(0), W, {"a": LORA, targets.mlp: LORA}, kernels=found)
    with pytest.raises(lj.SpecError, match=r"or None, for targets.mlp; got 8"):
        lj.init(jax.random.key(0), W, {targets.mlp: 8}, kernels=found)
