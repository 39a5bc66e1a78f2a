"""Models of Qwix compute the same as ours, with an adapter moved in either direction. `make test-models` runs this."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, bits, trained
from zoo.model import framework

import lora_jax as lj

pytestmark = pytest.mark.sweep

RANK, ALPHA = 3, 6.0
X = jax.random.normal(jax.random.key(7), (2, 5, 8))


def provider(**rule: Any) -> Any:
    return framework("qwix").LoraProvider(module_path=".*", rank=RANK, alpha=ALPHA, **rule)


def randomized(tree: Any) -> Any:
    """The tree with random values in Qwix's arrays, of which `b` is zero at first."""
    random = np.random.default_rng(0)

    def value(keys: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(keys)
        return jnp.asarray(0.3 * random.standard_normal(leaf.shape), leaf.dtype) if "_lora_" in name else leaf

    return jax.tree_util.tree_map_with_path(value, tree)


def in_qwix(tree: Any) -> list[Any]:
    """The bits of Qwix's arrays."""
    return [leaf for leaf in bits(tree) if "_lora_" in str(leaf)]


def check_laws(
    apply: Any, params: Any, args: Any, tree: Any, qwix_apply: Callable[[Any], Any], *, fresh: bool = True
) -> dict[str, lj.Adapter]:
    """Compares a model with Qwix's, for the arrays in `tree` and for an adapter of ours.

    Args:
      apply: the model, without Qwix.
      params: its parameters.
      args: its other arguments.
      tree: the parameters of Qwix's model.
      qwix_apply: Qwix's model, as a function of its parameters.
      fresh: whether every adapter of ours has a counterpart.
    """
    tree = randomized(tree)
    kernels = lj.kernels(apply, params, *args)
    adapter = lj.qwix.from_qwix(tree, kernels, alpha=ALPHA)
    expected = qwix_apply(tree)
    assert_close(lj.lora(apply)(params, adapter, *args), expected)
    assert_close(apply(lj.merge(lj.quant.dequantize(params), adapter), *args), expected)
    blank = jax.tree.map(jnp.zeros_like, tree)
    assert in_qwix(lj.qwix.to_qwix(adapter, blank, kernels, alpha=ALPHA)) == in_qwix(tree)
    if fresh:
        ours = trained(jax.random.key(3), adapter)
        assert_close(qwix_apply(lj.qwix.to_qwix(ours, tree, kernels, alpha=ALPHA)), lj.lora(apply)(params, ours, *args))
    return adapter


# Linen


class Attention(nn.Module):
    """`DenseGeneral` with one and two axes, and `Dense`."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        return nn.Dense(4, name="head")(nn.relu(nn.Dense(8, name="square")(x)))


class Convolutions(nn.Module):
    """One and two dimensions, strided and dilated."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Conv(6, (3,), strides=2, name="one")(x))
        return nn.Conv(4, (2, 3), kernel_dilation=2, name="two")(x[..., None])


class Head(nn.Module):
    """A table as the head. Qwix finds the transposed table under `jit` only."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Embed(11, 8, name="table").attend(x)


class Tied(Head):
    """A table that is also looked up, where Qwix has no LoRA."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        table = nn.Embed(11, 8, name="table")
        return table.attend(x + table(jnp.arange(5)))


class Block(nn.Module):
    """A layer for a scan."""

    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        x = x + nn.DenseGeneral(8, axis=(-2, -1), name="out")(nn.DenseGeneral((2, 3), name="in")(x))
        return nn.relu(x), None


class Stack(nn.Module):
    """A scanned stack with its axis at a given place, and stacks of stacks."""

    axis: int
    depth: int = 1

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        block: Any = Block
        for length in (3, 2)[: self.depth]:
            block = nn.scan(block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=length)
        return block(name="layers")(x, None)[0]


LINEN = {
    "attention": Attention(),
    "convolutions": Convolutions(),
    "head": Head(),
    "stack": Stack(0),
    "stack-1": Stack(1),
    "stack-last": Stack(-1),
    "stacks": Stack(0, depth=2),
}


def check_linen(model: nn.Module, *, quantized: bool = False, **rule: Any) -> Any:
    wrapped = framework("qwix").apply_lora_to_model(model, provider(**rule))
    keys = {"params": jax.random.key(1)}

    def apply(params: Any, x: Any) -> Any:
        return model.apply({"params": params}, x)

    @jax.jit
    def with_arrays(params: Any) -> Any:  # the arrays of Qwix beside the kernels that there are
        return wrapped.apply({"params": params}, X, mutable=["params"], rngs=keys)[1]["params"]

    if quantized:
        tree = wrapped.init(keys, X)["params"]
        params = lj.quant.from_qwix(tree)
    else:
        params = model.init(keys, X)["params"]
        tree = with_arrays(params)
    return check_laws(apply, params, (X,), tree, jax.jit(lambda tree: wrapped.apply({"params": tree}, X)))


@pytest.mark.parametrize("name", LINEN)
def test_a_linen_model_computes_the_same_in_both_directions(name: str) -> None:
    adapter = check_linen(LINEN[name])
    assert len(adapter) == {"attention": 6, "head": 1}.get(name, 2)


def test_a_tied_head_is_refused() -> None:
    with pytest.raises(lj.CheckpointError, match="'table/embedding': the model also uses it in `gather`, where Qwix"):
        check_linen(Tied())


@pytest.mark.parametrize("rule", [{"weight_qtype": "nf4", "tile_size": 4}, {"weight_qtype": "int8"}], ids=str)
def test_a_quantized_linen_model_computes_the_same(rule: dict[str, Any]) -> None:
    check_linen(Attention(), quantized=True, **rule)


# NNX


class Layers(nnx.Module):
    """Layers of every kind, with einsums as Tunix writes them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.query = nnx.Einsum("BTD,NDH->BTNH", (2, 8, 4), rngs=rngs)
        self.key_value = nnx.Einsum("BSD,CKDH->CBSKH", (2, 2, 8, 4), rngs=rngs)
        self.out = nnx.Einsum("BTNH,NHD->BTD", (2, 4, 8), rngs=rngs)
        self.up = nnx.LinearGeneral(8, (2, 3), rngs=rngs)
        self.down = nnx.LinearGeneral((2, 3), 8, axis=(-2, -1), rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.head = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        key, value = self.key_value(x)
        x = x + self.out(self.query(x) * jax.nn.softmax(key) + value)
        return self.head(self.conv(x + self.down(nnx.relu(self.up(x)))))


def check_nnx(
    net: Any,
    args: Any,
    *,
    wrap: Callable[..., Any] | None = None,
    output: Callable[[Any], Any] = lambda y: y,
    fresh: bool = True,
    **keywords: Any,
) -> Any:
    if wrap is None:
        wrapped = framework("qwix").apply_lora_to_model(net, provider(), *args, **keywords, rngs=nnx.Rngs(1))
    else:
        wrapped = wrap(net)
    call, params, rest = lj.nnx.functional(net)

    def apply(params: Any, *args: Any) -> Any:
        return output(call(params, rest, *args, **keywords)[0])

    def qwix_apply(state: Any) -> Any:
        nnx.update(wrapped, state)
        return output(wrapped(*args, **keywords))

    return check_laws(apply, params, args, nnx.state(wrapped, nnx.LoRAParam), qwix_apply, fresh=fresh)


def test_an_nnx_module_computes_the_same_in_both_directions() -> None:
    adapter = check_nnx(Layers(nnx.Rngs(0)), (X,))
    assert {path: part.axes for path, part in adapter.items()} == {
        "query/kernel": "oio",
        "key_value/kernel": "ooio",
        "out/kernel": "iio",
        "up/kernel": "ioo",
        "down/kernel": "iio",
        "conv/kernel": "iio",
        "head/kernel": "io",
    }


class Experts(nnx.Module):
    """An einsum whose kernel has a batch axis, along which Qwix shares `b`."""

    def __init__(self, text: str, shape: tuple[int, ...], rngs: nnx.Rngs) -> None:
        self.text, self.w = text, nnx.Param(jax.random.normal(rngs.params(), shape))

    def __call__(self, x: Any) -> Any:
        return jnp.einsum(self.text, x, self.w[...])


@pytest.mark.parametrize(("text", "shape"), [("btd,tdf->btf", (5, 8, 6)), ("btd,dtf->btf", (8, 5, 6))])
def test_a_shared_b_is_repeated(text: str, shape: tuple[int, ...]) -> None:
    adapter = check_nnx(Experts(text, shape, nnx.Rngs(0)), (X,), fresh=False)
    assert adapter["w"].b.shape == (5, RANK, 6)


# Tunix and MaxText

IDS = jnp.arange(10).reshape(2, 5)
POSITIONS = jnp.broadcast_to(jnp.arange(5), (2, 5))
MASK = jnp.broadcast_to(jnp.tril(jnp.ones((5, 5), bool)), (2, 5, 5))
SIZES = {"num_layers": 1, "embed_dim": 16, "hidden_dim": 24, "num_heads": 4, "head_dim": 6, "num_kv_heads": 2}


def test_the_llama_of_tunix_computes_the_same_in_both_directions() -> None:
    llama = framework("tunix.models.llama3.model")
    net = llama.Llama3(llama.ModelConfig(**SIZES, vocab_size=31, rope_theta=10_000, norm_eps=1e-5), rngs=nnx.Rngs(0))
    adapter = check_nnx(net, (IDS, POSITIONS, None, MASK), output=lambda y: y[0])
    assert {path.split("/")[-2]: (part.axes, part.b.shape) for path, part in adapter.items()} == {
        "q_proj": ("ioo", (RANK, 4, 6)),
        "k_proj": ("ioo", (RANK, 2, 6)),
        "v_proj": ("ioo", (RANK, 2, 6)),
        "o_proj": ("iio", (RANK, 16)),
        "gate_proj": ("io", (RANK, 24)),
        "up_proj": ("io", (RANK, 24)),
        "down_proj": ("io", (RANK, 16)),
        "lm_head": ("io", (RANK, 31)),
    }


def test_the_gemma_of_tunix_computes_the_same_in_both_directions() -> None:
    gemma = framework("tunix.models.gemma3.model")
    config = gemma.ModelConfig(**SIZES, num_embed=31, sliding_window_size=4, param_dtype=jnp.float32)
    adapter = check_nnx(gemma.Gemma3(config, rngs=nnx.Rngs(0)), (IDS, POSITIONS, None, MASK), output=lambda y: y[0])
    attention = {path.split("/")[-2]: part.axes for path, part in adapter.items() if "einsum" in path}
    assert attention == {"q_einsum": "oio", "kv_einsum": "ooio", "attn_vec_einsum": "iio"}


def test_the_scanned_layers_of_maxtext_compute_the_same_in_both_directions() -> None:
    maxtext = framework("maxtext")
    sizes = {"base_emb_dim": 16, "base_num_query_heads": 4, "base_num_kv_heads": 2, "head_dim": 6, "base_mlp_dim": 24}
    config = maxtext.pyconfig.initialize(
        run_name="lora", base_output_directory="out", enable_checkpointing=False, dtype="float32",
        attention="dot_product", skip_jax_distributed_system=True, base_num_decoder_layers=5, vocab_size=32,
        max_target_length=5, lora={"enable_lora": True, "lora_rank": RANK, "lora_alpha": ALPHA}, **sizes,
    )  # fmt: skip
    mesh = maxtext.maxtext_utils.get_mesh_from_config(config, jax.devices()[:1])
    net = maxtext.Transformer(config, mesh, None, rngs=nnx.Rngs(0))
    lora_utils = framework("maxtext.utils.lora_utils")
    adapter = check_nnx(
        net, (IDS, POSITIONS), wrap=lambda net: lora_utils.apply_lora_to_model(net, mesh, config), enable_dropout=False
    )
    shapes = {path.split("layers/")[1]: (part.axes, part.b.shape) for path, part in adapter.items()}
    assert len(shapes) == 7
    assert shapes["self_attention/query/kernel"] == ("iboo", (5, RANK, 4, 6))
    assert shapes["self_attention/out/kernel"] == ("ibio", (5, RANK, 16))
