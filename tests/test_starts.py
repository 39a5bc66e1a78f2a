"""Initializations keep the function of the model for all axes of kernels, and match their definitions."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import sweep_except, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from law import assert_close, normal

import lora_jax as lj
from lora_jax import many, optim, quant, starts

LORA, RSLORA = lj.LoRA(rank=2, alpha=3), lj.RSLoRA(rank=2, alpha=1)

# The shape and variant of a kernel of each layout.
KERNELS: dict[str, tuple[tuple[int, ...], Any]] = {
    "dense": ((6, 5), LORA),
    "query": ((6, 2, 4), lj.RSLoRA(rank=2, alpha=1, axes="ioo")),
    "out": ((2, 3, 6), lj.LoRA(rank=2, alpha=3, axes="iio")),
    "conv": ((3, 2, 2, 5), lj.LoRA(rank=2, alpha=2, axes="iiio")),
    "grouped": ((3, 2, 6), lj.LoRA(rank=2, alpha=1, axes="iio")),
    "stack": ((3, 6, 6), lj.LoRA(rank=2, alpha=3, axes="bio")),
    "stack along 1": ((6, 3, 6), lj.RSLoRA(rank=2, alpha=2, axes="ibo")),
    "experts": ((3, 6, 5), lj.LoRA(rank=2, alpha=3, axes="bio")),
    "transposed": ((5, 6), lj.LoRA(rank=2, alpha=3, axes="oi")),
    "embedding": ((9, 6), LORA),
    "some layers": ((6, 3, 6), lj.Layers(layers=[0, 2], variant=lj.RSLoRA(rank=2, alpha=2, axes="ibo"))),
}
STRIDES = (2, 1)


def params_of(dtype: Any = jnp.float32) -> Any:
    params = {name: normal(*shape, seed=n, size=0.5) for n, (name, (shape, _)) in enumerate(KERNELS.items())}
    return jax.tree.map(lambda w: jnp.asarray(w, dtype), params) | {"bias": jnp.ones(5, dtype)}


PARAMS = params_of()
SPEC: Any = {name: variant for name, (_, variant) in KERNELS.items()} | {"bias": lj.Full()}
BATCH = {
    "tokens": normal(7, 6, seed=20) + 0.5,
    "image": normal(2, 5, 4, 2, seed=21),
    "signal": normal(2, 7, 4, seed=22),
    "experts": normal(3, 4, 6, seed=23),
    "ids": jnp.array([1, 8, 1, 0]),
}


def layers(w: jax.Array, x: jax.Array) -> jax.Array:
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def model(params: Any, batch: Any) -> dict[str, jax.Array]:
    x = batch["tokens"]
    image, signal = ("NHWC", "HWIO", "NHWC"), ("NHC", "HIO", "NHC")
    return {
        "dense": x @ params["dense"] + params["bias"],
        "query": jnp.einsum("td,dhk->thk", x, params["query"]),
        "out": jnp.einsum("thk,hkd->td", x.reshape(-1, 2, 3), params["out"]),
        "conv": lax.conv_general_dilated(batch["image"], params["conv"], STRIDES, "SAME", dimension_numbers=image),
        "grouped": lax.conv_general_dilated(
            batch["signal"], params["grouped"], (1,), "VALID", dimension_numbers=signal, feature_group_count=2
        ),
        "stack": layers(params["stack"], x),
        "stack along 1": layers(jnp.moveaxis(params["stack along 1"], 1, 0), x),
        "some layers": layers(jnp.moveaxis(params["some layers"], 1, 0), x),
        "experts": jnp.einsum("etd,edf->etf", batch["experts"], params["experts"]),
        "transposed": x @ params["transposed"].T,
        "embedding": params["embedding"][batch["ids"]],
    }


def loss(params: Any, batch: Any) -> jax.Array:
    return sum((jnp.sum(jnp.sin(y.astype(jnp.float32)) ** 2) for y in model(params, batch).values()), jnp.float32(0))


@functools.cache
def adapter_of() -> Any:
    return jax.jit(lambda key: lj.init(key, PARAMS, SPEC))(jax.random.key(0))


def seen_by(params: Any, adapter: Any, batch: Any) -> Any:
    return starts.activations(model, params, {path: adapter[path] for path in adapter if path != "embedding"}, batch)


def by_activations(function: Callable[..., Any], params: Any, adapter: Any) -> Any:
    """Embeddings keep their initialization, because lookups have no activations."""
    seen = seen_by(params, adapter, BATCH)
    params, new = function(params, {path: part for path, part in adapter.items() if path != "embedding"}, seen)
    return params, adapter | new


STARTS: dict[str, Callable[[Any, Any], Any]] = {
    "gaussian": lambda params, adapter: starts.gaussian(jax.random.key(1), params, adapter),
    "kaiming": lambda params, adapter: starts.kaiming(jax.random.key(1), params, adapter),
    "orthogonal": lambda params, adapter: starts.orthogonal(jax.random.key(1), params, adapter),
    "eva": functools.partial(by_activations, starts.eva),
    "corda": functools.partial(by_activations, starts.corda),
    "mica": starts.mica,
    "pissa": starts.pissa,
    "randomized pissa": lambda params, ad: starts.pissa(params, ad, niter=4, key=jax.random.key(1)),
    "olora": starts.olora,
    "lora_ga": lambda params, ad: starts.lora_ga(params, ad, starts.gradients(loss, params, ad, BATCH)),
}
MOVING = ["pissa", "randomized pissa", "olora", "lora_ga"]


@functools.cache
def started(name: str) -> Any:
    return jax.jit(STARTS[name])(PARAMS, adapter_of())


def matrices(array: Any, layout: str) -> np.ndarray:
    """A kernel, `(layers, in, out)`, of the layers that are adapted."""
    axes = adapter_of()[layout].axes
    array = np.asarray(array, np.float64)
    if layout == "some layers":
        array = array[:, [0, 2]]
    order = [axis for role in "bio" for axis, letter in enumerate(axes) if letter == role]
    sizes = [math.prod(array.shape[axis] for axis, letter in enumerate(axes) if letter == role) for role in "bio"]
    return array.transpose(order).reshape(sizes)


def factors(part: Any) -> tuple[np.ndarray, np.ndarray]:
    """`a` and `b`, `(layers, in, rank)` and `(layers, rank, out)`."""
    rank, layers = part.variant.rank, math.prod(part.a.shape[: part.axes.count("b")])
    a, b = np.asarray(part.a, np.float64), np.asarray(part.b, np.float64)
    return a.reshape(layers, -1, rank), b.reshape(layers, rank, -1)


def assert_near(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-6))


# All initializations


@functools.cache
def adapted() -> Any:
    return jax.jit(lj.lora(model, form="factored"))


@functools.cache
def base() -> Any:
    return jax.jit(model)


@functools.cache
def outputs(name: str) -> tuple[Any, Any]:
    params, adapter = started(name)
    return adapted()(params, adapter, BATCH), base()(PARAMS, BATCH)


@pytest.mark.parametrize("layout", KERNELS)
@pytest.mark.parametrize("start", sweep_except(["orthogonal", "eva", "pissa", "lora_ga"], STARTS))
def test_every_initialization_keeps_the_model(start: str, layout: str) -> None:
    got, expected = outputs(start)
    assert_close(got[layout], expected[layout])


@pytest.mark.parametrize("start", sweep_except([name for name in STARTS if name not in ("corda", "mica")], STARTS))
def test_an_initialization_changes_only_adapted_kernels_of_the_base(start: str) -> None:
    params, adapter = started(start)
    for path, leaf in PARAMS.items():
        moves = (start in MOVING and path in KERNELS) or (start == "corda" and path in MET)
        assert np.array_equal(leaf, params[path]) != moves, path
    assert adapter["bias"] is not None and np.array_equal(adapter["bias"].value, PARAMS["bias"])
    assert {path: part.variant for path, part in adapter.items()} == {
        path: part.variant for path, part in adapter_of().items()
    }
    changed = [path for path in KERNELS if not np.array_equal(adapter[path].a, adapter_of()[path].a)]
    assert changed == [path for path in KERNELS if (start, path) not in (("eva", "embedding"), ("corda", "embedding"))]


@pytest.mark.parametrize("start", MOVING)
@pytest.mark.parametrize("layout", ["dense", "stack along 1"])
def test_a_bfloat16_base_differs_by_one_rounding_of_the_residual(start: str, layout: str) -> None:
    params = {layout: PARAMS[layout].astype(jnp.bfloat16)}
    adapter = {layout: adapter_of()[layout]}
    function = STARTS[start]
    if start == "lora_ga":
        gradient = {layout: normal(*params[layout].shape, seed=3, dtype=jnp.bfloat16)}
        function = functools.partial(starts.lora_ga, gradient=gradient)
    moved, adapter = function(params, adapter)
    residue = moved[layout]
    assert residue.dtype == jnp.bfloat16 and adapter[layout].a.dtype == jnp.float32
    a, b = factors(adapter[layout])
    error = matrices(residue, layout) + adapter[layout].variant.scale * a @ b - matrices(params[layout], layout)
    assert (np.abs(error) <= 2**-8 * np.abs(matrices(residue, layout)) + 1e-6).all()
    assert np.abs(error).max() > 1e-5  # otherwise the test would be trivial


def test_the_base_of_layers_without_an_adapter_is_unchanged() -> None:
    moved, _ = started("pissa")
    unchanged = [np.array_equal(moved["some layers"][:, n], PARAMS["some layers"][:, n]) for n in range(3)]
    assert unchanged == [False, True, False]


def test_an_initialization_keeps_dtypes_and_its_arguments() -> None:
    params = {"dense": np.asarray(PARAMS["dense"]), "bias": [np.ones(5)]}
    adapter = lj.init(jax.random.key(0), params, {"dense": LORA}, param_dtype=jnp.bfloat16)
    before = jax.tree.map(np.array, (adapter, params))
    moved, new = starts.pissa(params, adapter)
    assert isinstance(moved["dense"], np.ndarray) and moved["bias"][0] is params["bias"][0]
    assert new["dense"].a.dtype == new["dense"].b.dtype == jnp.bfloat16
    assert_near(lj.merge(moved, new)["dense"], params["dense"])  # the residual is computed from the stored factors
    jax.tree.map(np.testing.assert_array_equal, before, (adapter, params))


@pytest.mark.parametrize("start", ["pissa", "olora", "mica"])
def test_a_numpy_base_in_float64_stays_so(start: str) -> None:
    # Was a warning of JAX.
    w = np.random.default_rng(0).normal(size=(6, 5))
    params = {"w": w}
    moved, adapter = getattr(starts, start)(params, lj.init(jax.random.key(0), params, {"w": LORA}))
    assert isinstance(moved["w"], np.ndarray) and moved["w"].dtype == np.float64
    a, b = (np.asarray(array, np.float64) for array in (adapter["w"].a, adapter["w"].b))
    np.testing.assert_allclose(moved["w"] + 1.5 * a @ b, w, rtol=1e-12, atol=1e-12)


def test_an_initialization_under_jit_is_the_same() -> None:
    eager = starts.pissa(PARAMS, {"dense": adapter_of()["dense"]})
    assert_near(eager.params["dense"], started("pissa").params["dense"])
    same, _ = starts.gaussian(jax.random.key(1), PARAMS, adapter_of())
    assert same is PARAMS


def test_random_values_of_a_path_do_not_depend_on_other_paths() -> None:
    for name in ("gaussian", "kaiming", "orthogonal", "randomized pissa"):
        _, single = STARTS[name](PARAMS, {"dense": adapter_of()["dense"]})
        assert_near(single["dense"].a, started(name).adapter["dense"].a)
    adapter = started("gaussian").adapter
    assert not np.array_equal(adapter["stack"].a[0], adapter["stack"].a[1])
    assert not np.array_equal(adapter["stack"].a, adapter["experts"].a)


# Which variants

KINDS: dict[str, Any] = {
    "LoRA": lj.LoRA(rank=2, alpha=2),
    "RSLoRA": lj.RSLoRA(rank=2, alpha=2),
    "DoRA": lj.DoRA(rank=2, alpha=2),
    "ALoRA": lj.ALoRA(rank=2, alpha=2, invocation=[1]),
    "AdaLoRA": lj.AdaLoRA(rank=2, alpha=2),
    "VeRA": lj.VeRA(rank=2, seed=0),
    "LoRAXS": lj.LoRAXS(rank=2, alpha=2),
    "DeLoRA": lj.DeLoRA(rank=2),
    "MiSS": lj.MiSS(rank=2),
    "QALoRA": lj.QALoRA(rank=2, alpha=2, group=2),
    "Full": lj.Full(),
    "Rows": lj.Rows(ids=[1]),
    "LoRABias": lj.LoRABias(scale=2),
    "IA3": lj.IA3(),
}


@functools.cache
def kinds() -> tuple[Any, Any]:
    """Parameters with a kernel for each variant, and their adapter."""
    params = {name: normal(4, 4, seed=n) for n, name in enumerate(KINDS)} | {"Layers": normal(2, 4, 4, seed=20)}
    spec = KINDS | {"Layers": lj.Layers(layers=[1], variant=lj.LoRA(rank=2, alpha=2, axes="bio"))}
    shapes = jax.eval_shape(lambda params: lj.init(jax.random.key(0), params, spec), params)
    adapter = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    merged = many.mixture({"one": {"LoRA": adapter["LoRA"]}, "other": {"LoRA": adapter["LoRA"]}}, many.Constant())
    return params | {"many.mixture": params["LoRA"]}, adapter | {"many.mixture": merged["LoRA"]}


def run(start: str, params: Any, adapter: Any) -> Any:
    key = jax.random.key(1)
    if start in ("gaussian", "kaiming", "orthogonal"):
        return getattr(starts, start)(key, params, adapter)
    if start in ("eva", "corda"):
        sums = starts.Activations(jnp.eye(4)[None], jnp.ones((1, 4)), jnp.ones(1))
        return getattr(starts, start)(params, adapter, dict.fromkeys(adapter, sums))
    if start in ("loftq", "qpissa"):
        formats = {path: quant.Int8(axes="bio" if path == "Layers" else "io") for path in adapter if path != "Full"}
        return getattr(starts, start)(params, adapter, formats)
    return getattr(starts, start)(params, adapter, *([params] if start == "lora_ga" else []))


def traced(start: str, params: Any, adapter: Any) -> Any:
    """The initialized adapter, in which arrays have shapes only, and unchanged leaves are the same objects."""
    new: dict[str, Any] = {}
    jax.eval_shape(lambda params: new.update(run(start, params, adapter).adapter), params)
    return new


def table_of_variants() -> dict[tuple[str, str], str]:
    """What `docs/starts.md` says about each variant, by initialization."""
    page = Path(__file__).parents[1].joinpath("docs/starts.md").read_text()
    header, _, *lines = [
        [re.findall(r"`([\w.]+)`", cell) or [cell.strip()] for cell in line.strip("|").split("|")]
        for line in page.split("## Which variants")[1].split("\n\n")[1].splitlines()
    ]
    return {
        (start, kind): cell[0].split(":")[0]
        for kinds, *cells in lines
        for column, cell in zip(header[1:], cells, strict=True)
        for start in column
        for kind in kinds
    }


def test_variants_are_initialized_unchanged_or_refused_as_the_table_says() -> None:
    (params, adapter), table = kinds(), table_of_variants()
    functions = {name for name in starts.__all__ if name.islower()} - {"activations", "gradients", "as_plain"}
    assert set(table) == {(start, kind) for start in functions for kind in adapter}
    table |= {(start, "Layers"): table[start, "LoRA"] for start in functions}  # that of the layers
    for start in functions:
        taken = {kind: part for kind, part in adapter.items() if table[start, kind] != "error"}
        new = traced(start, params, taken)
        for kind, part in taken.items():
            assert (new[kind] is part) == (table[start, kind] == "unchanged"), (start, kind)
            assert new[kind].variant == part.variant
        for kind in adapter.keys() - taken:
            with pytest.raises((lj.AdapterError, lj.SpecError), match=f"{kind}|has a diagonal".replace("many.", "")):
                traced(start, params, {kind: adapter[kind], "LoRA": adapter["LoRA"]})


def test_what_no_initialization_takes_is_an_error() -> None:
    params, adapter = kinds()
    vera, full = ({kind: adapter[kind]} for kind in ("VeRA", "Full"))
    inner = {"Layers": lj.Layers(layers=[0], variant=lj.MiSS(rank=2, axes="bio"))}
    text = (
        "Expected variants whose factors an initialization can set, such as LoRA, RSLoRA, DoRA, or Layers around one "
    )
    expect(
        lj.AdapterError,
        f"{text}of them; 1 of 2 have other arrays.\n  'VeRA': VeRA",
        lambda: starts.pissa(params, vera | full),
    )
    expect(lj.AdapterError, "{path: part for path, part in adapter.items() if …}", lambda: starts.mica(params, vera))
    miss = lj.init(jax.random.key(0), params, inner)
    expect(lj.AdapterError, "'Layers': Layers(variant=MiSS(rank=2), layers=(0,))", lambda: starts.olora(params, miss))
    for call in (starts.pissa, starts.mica, lambda params, adapter: starts.eva(params, adapter, {})):
        expect(lj.AdapterError, "or Layers around one of them; got Full.", functools.partial(call, params, full))
    expect(lj.AdapterError, "got an empty adapter", lambda: starts.olora(params, {}))
    expect(lj.AdapterError, "'VeRA': VeRA", lambda: starts.gradients(lambda p: p["VeRA"].sum(), params, vera))


def test_as_plain_returns_other_variants_of_an_unchanged_base() -> None:
    params, adapter = kinds()
    vera = {"VeRA": adapter["VeRA"]}
    moved, new = starts.pissa(params, {"Layers": adapter["Layers"]})
    plain = starts.as_plain(params, vera | new, moved, vera | new)
    assert plain["VeRA"] is adapter["VeRA"] and plain["Layers"].variant.variant.rank == 4


# Single initializations


def test_gaussian_and_kaiming_have_their_distributions() -> None:
    params = {"w": jnp.zeros((3, 400, 60))}
    adapter = lj.init(jax.random.key(0), params, {"w": lj.LoRA(rank=8, alpha=16, axes="bio")})
    gaussian = starts.gaussian(jax.random.key(5), params, adapter).adapter["w"]
    assert float(gaussian.a.std()) == pytest.approx(1 / 8, rel=0.05)
    assert float(gaussian.a.mean()) == pytest.approx(0, abs=0.01)
    assert float(jnp.abs(gaussian.a).max()) > 3 / 8  # a uniform distribution has none
    kaiming = starts.kaiming(jax.random.key(0), params, adapter).adapter["w"]
    assert np.array_equal(kaiming.a, adapter["w"].a)
    again = starts.kaiming(jax.random.key(1), params, adapter).adapter["w"]
    assert not np.array_equal(kaiming.a, again.a)
    assert float(jnp.abs(again.a).max()) == pytest.approx(1 / 20, rel=0.01)
    assert not gaussian.b.any() and not again.b.any()


@pytest.mark.parametrize("layout", KERNELS)
def test_orthogonal_factors_have_a_zero_product_and_nonzero_gradients(layout: str) -> None:
    part = started("orthogonal").adapter[layout]
    a, b = factors(part)
    assert np.abs(a @ b).max() <= 1e-7 and np.abs(a).max() > 0.01 and np.abs(b).max() > 0.01


@pytest.mark.parametrize("layout", KERNELS)
def test_pissa_uses_the_best_approximation_of_the_rank(layout: str) -> None:
    w = matrices(PARAMS[layout], layout)
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    best = u[:, :, :2] * s[:, None, :2] @ vt[:, :2]
    for name, tolerance in (("pissa", 1e-5), ("randomized pissa", 1e-3)):
        params, adapter = started(name)
        a, b = factors(adapter[layout])
        assert_near(adapter[layout].variant.scale * a @ b, best, tolerance)
        assert_near(matrices(params[layout], layout), w - best, tolerance)
        assert_near(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=2))  # √(S/s) for both factors


def test_randomized_pissa_improves_with_iterations() -> None:
    spectrum = jnp.arange(1, 61) ** -0.5
    q1, q2 = (jnp.linalg.qr(normal(60, 60, seed=seed))[0] for seed in (1, 2))
    params = {"w": q1 * spectrum @ q2}
    adapter = lj.init(jax.random.key(0), params, {"w": lj.LoRA(rank=4, alpha=4)})
    best = float(jnp.linalg.norm(spectrum[4:]))
    residues = [
        float(jnp.linalg.norm(starts.pissa(params, adapter, niter=niter, key=jax.random.key(0)).params["w"]))
        for niter in (0, 8)
    ]
    assert best * 1.001 < residues[0] and residues[1] < best * 1.001


@pytest.mark.parametrize("layout", KERNELS)
def test_olora_uses_the_qr_decomposition(layout: str) -> None:
    a, b = factors(started("olora").adapter[layout])
    assert_near(b @ b.transpose(0, 2, 1), np.broadcast_to(np.eye(2), (len(b), 2, 2)))
    w = matrices(PARAMS[layout], layout)
    q = np.linalg.qr(w.transpose(0, 2, 1))[0][:, :, :2]  # of the full kernel
    assert_near(a @ b, w @ q @ q.transpose(0, 2, 1))
    assert_near((a @ b)[:, :2], w[:, :2])


@functools.cache
def gradient_of() -> Any:
    return jax.jit(lambda params, ad: starts.gradients(loss, params, ad, BATCH))(PARAMS, adapter_of())


def test_gradients_match_the_adapted_kernels() -> None:
    expected = jax.jit(jax.grad(loss))(PARAMS, BATCH)
    assert_close(gradient_of(), {path: expected[path] for path in KERNELS})


@pytest.mark.parametrize("layout", KERNELS)
def test_the_first_step_after_lora_ga_follows_the_gradient(layout: str) -> None:
    _, adapter = started("lora_ga")
    part = adapter[layout]
    a, b = factors(part)
    g, s, rate = matrices(gradient_of()[layout], layout), part.variant.scale, 1e-4
    # One gradient step on both factors.
    a_new, b_new = a - rate * s * g @ b.transpose(0, 2, 1), b - rate * s * a.transpose(0, 2, 1) @ g
    step = s * (a_new @ b_new - a @ b)
    u, singular, vt = np.linalg.svd(g, full_matrices=False)
    nearest = u[:, :, :4] * singular[:, None, :4] @ vt[:, :4]
    c = b.shape[-1] ** 0.25 / math.sqrt(16)
    assert_near(step, -rate * s**2 * c**2 * nearest, 1e-3)


def test_lora_ga_does_not_depend_on_the_size_of_the_gradient() -> None:
    part, gradient = {"dense": adapter_of()["dense"]}, gradient_of()["dense"]
    one, other = (starts.lora_ga(PARAMS, part, {"dense": c * gradient}).adapter["dense"] for c in (1, 1000))
    for x, y in zip(factors(one), factors(other), strict=True):
        assert_near(np.abs(x), np.abs(y), 1e-4)
    wider = starts.lora_ga(PARAMS, part, {"dense": gradient}, gamma=4).adapter["dense"]
    assert_near(np.abs(wider.a), 2 * np.abs(one.a), 1e-4)


def test_every_choice_of_lora_ga_takes_the_same_first_step_up_to_its_scale() -> None:
    part, gradient, key = {"dense": adapter_of()["dense"]}, {"dense": gradient_of()["dense"]}, jax.random.key(1)
    w, g, s = np.asarray(PARAMS["dense"]), np.asarray(gradient["dense"], np.float64), LORA.scale
    u, singular, vt = np.linalg.svd(g)
    nearest = u[:, :4] * singular[:4] @ vt[:4]
    sizes = {
        "stable": 5**0.25 / 4,
        "unit": 1.0,
        "gd": 1 / s,
        "weight_svd": np.sqrt(np.linalg.svd(w, compute_uv=False)[:2] / s).mean(),
    }
    columns: dict[str, Any] = {"ArB2r": [0, 1], "A2rBr": [2, 3], "ArBr": [1, 3]}
    choices: list[dict[str, Any]] = [{"direction": direction} for direction in columns]
    choices += [{"scale": scale} for scale in sizes] + [{"direction": "random", "key": key, "scale": "unit"}]
    for choice in choices:
        moved, new = starts.lora_ga(PARAMS, part, gradient, **choice)
        ((a,), (b,)), c = factors(new["dense"]), sizes[choice.get("scale", "stable")]
        assert_near(-rate_of_change(a, b, g), c**2 * nearest, 1e-4)
        assert_near(np.asarray(moved["dense"]) + s * a @ b, w)
        direction = choice.get("direction", "ArB2r")
        if direction in columns:
            assert_near(np.abs(u[:, columns[direction]].T @ a), c * np.eye(2), 1e-4)


def rate_of_change(a: np.ndarray, b: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The derivative of `a·b` in a step of gradient descent, without the scale."""
    return -(g @ b.T @ b + a @ a.T @ g)


def test_random_directions_of_lora_ga_depend_on_the_key_and_the_path() -> None:
    params = {name: PARAMS["dense"] for name in "vw"}
    adapter = lj.init(jax.random.key(0), params, {"*": LORA})

    def run(seed: int) -> Any:
        return starts.lora_ga(params, adapter, params, direction="random", key=jax.random.key(seed)).adapter

    one, other = run(0), run(1)
    assert np.array_equal(run(0)["w"].a, one["w"].a)
    assert not np.array_equal(one["w"].a, other["w"].a) and not np.array_equal(one["w"].a, one["v"].a)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_splits_the_kernel_along_the_covariance_of_its_inputs(mode: Any) -> None:
    layouts = ("query", "stack along 1")
    moved, new = starts.corda(PARAMS, {path: adapter_of()[path] for path in layouts}, seen(), mode=mode, damping=0.02)
    for layout in layouts:
        x, w, (a, b) = inputs()[layout], matrices(PARAMS[layout], layout), factors(new[layout])
        c = x.transpose(0, 2, 1) @ x
        c = c / c.trace(axis1=1, axis2=2)[:, None, None] * 6 + 0.02 * np.eye(6)
        assert_near(matrices(moved[layout], layout) + new[layout].variant.scale * a @ b, w)
        s = np.linalg.svd(c @ w, compute_uv=False)
        taken, kept = (s[:, :2], s[:, 2:]) if mode == "ipm" else (s[:, -2:], s[:, :-2])
        assert_near(np.linalg.svd(c @ a @ b, compute_uv=False)[:, :2] * new[layout].variant.scale, taken, 1e-4)
        left = np.linalg.svd(c @ matrices(moved[layout], layout), compute_uv=False)
        assert_near(left[:, : kept.shape[1]], kept, 1e-4)
        assert_near(np.square(b).sum(2), taken / new[layout].variant.scale, 1e-4)  # √(S/s) for b


def test_corda_does_not_depend_on_the_size_of_the_activations() -> None:
    part, statistics = {"dense": adapter_of()["dense"]}, seen()["dense"]
    larger = {"dense": dataclasses.replace(statistics, gram=100 * statistics.gram)}
    one, other = (starts.corda(PARAMS, part, sums) for sums in (seen(), larger))
    assert_near(np.abs(one.adapter["dense"].a), np.abs(other.adapter["dense"].a), 1e-4)
    assert_near(one.params["dense"], other.params["dense"], 1e-4)


def test_mica_freezes_the_outputs_to_which_the_kernel_contributes_least() -> None:
    adapter = {path: adapter_of()[path] for path in ("stack along 1", "bias")}
    base, new = starts.mica(PARAMS, adapter)
    assert base is PARAMS and new["bias"] is adapter["bias"]
    w, (a, b) = matrices(PARAMS["stack along 1"], "stack along 1"), factors(new["stack along 1"])
    assert not a.any()
    assert_near(b @ b.transpose(0, 2, 1), np.broadcast_to(np.eye(2), (3, 2, 2)))
    smallest = np.linalg.svd(w, compute_uv=False)[:, -2:]
    assert_near(np.linalg.norm(w @ b.transpose(0, 2, 1), axis=1), smallest, 1e-4)
    tx = optax.transforms.selective_transform(optax.sgd(0.1), freeze_mask=optim.select("b")(new))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, new), tx.init(new), new)
    after = optax.apply_updates(new, updates)
    changed = [not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(new), strict=True)]
    assert changed == jax.tree.leaves(jax.tree.map(lambda mask: not mask, optim.select("b")(new)))


def test_bfloat16_gradients_are_added_in_float32() -> None:
    params = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    adapter = lj.init(jax.random.key(0), params, {"w": lj.LoRA(rank=1, alpha=1)})
    found = starts.gradients(lambda p, x: jnp.sum(x @ p["w"]), params, adapter, jnp.ones((1, 2), jnp.bfloat16))
    assert found["w"].dtype == jnp.float32


# Activations


def windows(x: np.ndarray, size: tuple[int, ...], strides: tuple[int, ...], padding: Any) -> np.ndarray:
    """All windows of an image, `(rows, …size, channels)`."""
    x = np.pad(x, [(0, 0), *padding, (0, 0)])
    places = [range(0, n - k + 1, stride) for n, k, stride in zip(x.shape[1:-1], size, strides, strict=True)]
    found = []
    for place in np.stack(np.meshgrid(*places, indexing="ij"), -1).reshape(-1, len(size)):
        found.append(x[(slice(None), *(slice(at, at + k) for at, k in zip(place, size, strict=True)))])
    return np.concatenate(found)


@functools.cache
def inputs() -> dict[str, np.ndarray]:
    """The activations of each kernel, `(layers, rows, in)`, computed by hand."""
    batch = {name: np.asarray(x, np.float64) for name, x in BATCH.items()}
    x = batch["tokens"]
    stacks = {}
    for name, axis in {"stack": 0, "stack along 1": 1, "some layers": 1}.items():
        met = [x]
        for w in np.moveaxis(np.asarray(PARAMS[name], np.float64), axis, 0)[:-1]:
            met.append(np.tanh(met[-1] @ w))
        stacks[name] = np.stack(met)
    stacks["some layers"] = stacks["some layers"][[0, 2]]
    pads = lax.padtype_to_pads((5, 4), (3, 2), STRIDES, "SAME")
    groups = [windows(batch["signal"][..., 2 * g : 2 * g + 2], (3,), (1,), [(0, 0)]).reshape(-1, 6) for g in (0, 1)]
    return stacks | {
        "dense": x[None],
        "query": x[None],
        "out": x[None],
        "conv": windows(batch["image"], (3, 2), STRIDES, pads).reshape(1, -1, 12),
        "grouped": np.concatenate(groups)[None],
        "experts": batch["experts"],
        "transposed": x[None],
    }


@functools.cache
def seen() -> Any:
    return jax.jit(seen_by)(PARAMS, adapter_of(), BATCH)


MET = [layout for layout in KERNELS if layout != "embedding"]


@pytest.mark.parametrize("layout", MET)
def test_activations_match_the_inputs_of_the_kernel(layout: str) -> None:
    x, statistics = inputs()[layout], seen()[layout]
    assert_near(statistics.gram, x.transpose(0, 2, 1) @ x)
    assert_near(statistics.total, x.sum(1))
    assert_near(statistics.count, np.full(len(x), x.shape[1]))


@pytest.mark.parametrize("layout", MET)
def test_eva_uses_the_directions_that_explain_most(layout: str) -> None:
    x, (a, b) = inputs()[layout], factors(started("eva")[1][layout])
    _, s, vt = np.linalg.svd(x - x.mean(1, keepdims=True), full_matrices=False)
    assert_near(a @ a.transpose(0, 2, 1), vt[:, :2].transpose(0, 2, 1) @ vt[:, :2], 1e-3)  # the same subspace
    captured = np.square((x - x.mean(1, keepdims=True)) @ a).sum(1)
    assert_near(captured, np.square(s[:, :2]))
    assert not b.any()


def one_kernel(apply: Callable[..., Any], w: Any, *args: Any, axes: str | None = None, **options: Any) -> Any:
    """The activations of a function of one kernel or, with options, `a` from `eva`."""
    params = {"w": w}
    adapter = lj.init(jax.random.key(0), params, {"w": lj.LoRA(rank=1, alpha=1, axes=axes)})
    run = jax.jit(lambda params, *args: starts.activations(lambda p, *xs: apply(p["w"], *xs), params, adapter, *args))
    statistics = run(params, *args)
    return starts.eva(params, adapter, statistics, **options).adapter["w"].a if options else statistics["w"]


X, W = normal(5, 4, seed=1) + 1.0, normal(4, 4, seed=2)
XX = np.asarray(X).T @ np.asarray(X)
Y = np.tanh(np.asarray(X) @ np.asarray(W))
MASK = jnp.array([1.0, 0.0, 0.0, 1.0])


def test_eva_without_centering_uses_the_uncentered_directions() -> None:
    a = one_kernel(lambda w, x: x @ w, W, X, centered=False)
    assert_near(np.abs(a[:, 0]), np.abs(np.linalg.svd(np.asarray(X))[2][0]), 1e-4)


def test_eva_whitens_by_the_root_of_the_singular_values() -> None:
    x = inputs()["dense"][0] - inputs()["dense"].mean(1)
    part, (_, s, vt) = {"dense": adapter_of()["dense"]}, np.linalg.svd(x)
    a = starts.eva(PARAMS, part, seen(), whiten=True).adapter["dense"].a
    assert_near(np.abs(a), np.abs(vt[:2].T) / np.sqrt(s[:2]), 1e-3)
    flat = starts.Activations(jnp.diag(jnp.eye(6)[0] * 4)[None], jnp.zeros((1, 6)), jnp.ones(1))
    a = starts.eva(PARAMS, part, {"dense": flat}, whiten=True).adapter["dense"].a
    smallest = np.finfo(flat.gram.dtype).eps ** -0.25
    assert_near(np.linalg.norm(a, axis=0), np.sqrt([0.5, 0.5 * smallest**2]), 1e-4)


USES: dict[str, tuple[Callable[..., Any], np.ndarray, int]] = {
    "twice": (lambda w, x: jnp.tanh(x @ w) @ w, XX + Y.T @ Y, 10),
    "remat": (jax.checkpoint(lambda w, x: jnp.tanh(x @ w)), XX, 5),
    "jit": (jax.jit(lambda w, x: jnp.tanh(x @ w)), XX, 5),
    "one of two branches": (lambda w, x: lax.cond(x.sum() > 0, lambda: x @ w, lambda: x), XX, 5),
    "vmap": (lambda w, x: jax.vmap(lambda row: row @ w)(x), XX, 5),
    "scan over tokens": (lambda w, x: lax.map(lambda row: jnp.tanh(row @ w), x), XX, 5),
    "from both sides": (lambda w, x: (x @ w) @ w.T, XX, 5),
    "scaled": (lambda w, x: x @ (3.0 * w), 9 * XX, 5),
    "scaled by an array": (lambda w, x: x @ (w * x[0][:, None]), XX * np.outer(X[0], X[0]), 5),
    "masked": (lambda w, x: x @ (w * MASK[:, None] * MASK), XX * np.outer(MASK, MASK), 5),
    "concatenated with another": (lambda w, x: x @ jnp.concatenate([w, 2 * jnp.ones((4, 3))], 1), XX, 5),
    "under another": (lambda w, x: jnp.concatenate([x, x], 1) @ jnp.concatenate([jnp.ones((4, 4)), w]), XX, 5),
    "reshaped": (lambda w, x: jnp.einsum("tij,ijo->to", x.reshape(5, 2, 2), w.reshape(2, 2, 4)), XX, 5),
    "heads that keep their tokens": (
        lambda w, x: jnp.einsum("thd,dhk->thk", jnp.stack([x, x], 1), w.reshape(4, 2, 2)),
        2 * XX,
        10,
    ),
    "with an opaque use": (lambda w, x: (x @ w) + jnp.tanh(w).sum(), XX, 5),
    "integers": (lambda w, x: jnp.round(x).astype(jnp.int32) @ w, np.round(X).T @ np.round(X), 5),
}


@pytest.mark.parametrize("use", USES)
def test_activations_are_recorded_for_every_use(use: str) -> None:
    apply, gram, count = USES[use]
    statistics = one_kernel(apply, W, X)
    assert_near(statistics.gram[0], gram)
    assert statistics.count[0] == pytest.approx(count)


# How two kernels are combined, the shape of the second, the activations of each, and the number of uses.
TOGETHER: dict[str, tuple[Callable[..., Any], tuple[int, ...], Any, Any, int]] = {
    "along outputs": (lambda v, w, x: x @ jnp.concatenate([v, w], 1), (4, 2), X, X, 1),
    "along inputs": (
        lambda v, w, x: jnp.concatenate([x, x[:, :2]], 1) @ jnp.concatenate([v, w]),
        (2, 3),
        X,
        X[:, :2],
        1,
    ),
    "in a stack": (lambda v, w, x: jnp.einsum("td,edf->etf", x, jnp.stack([v, w])), (4, 3), X, X, 1),
    "one of them twice": (lambda v, w, x: x @ jnp.concatenate([v, w, 2 * v, w], 1), (4, 2), X, X, 2),
}


@pytest.mark.parametrize("how", TOGETHER)
def test_combined_kernels_have_separate_activations(how: str) -> None:
    apply, shape, x_v, x_w, times = TOGETHER[how]
    params = {"v": normal(4, 3, seed=3), "w": normal(*shape, seed=4)}
    adapter = lj.init(jax.random.key(0), params, {"*": lj.LoRA(rank=1, alpha=1)})
    run = jax.jit(lambda params, x: starts.activations(lambda p, x: apply(p["v"], p["w"], x), params, adapter, x))
    found = run(params, X)
    for statistics, x in ((found["v"], np.asarray(x_v)), (found["w"], np.asarray(x_w))):
        assert_near(statistics.gram[0], times * x.T @ x)
        assert_near(statistics.total[0], times * x.sum(0))
        assert_near(statistics.count[0], times * 5)


def test_activations_of_a_sharded_batch_match_the_batch() -> None:
    x = normal(16, 4, seed=1)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    statistics = one_kernel(lambda w, x: jnp.tanh(x @ w), W, jax.device_put(x, sharding))
    assert_near(statistics.gram[0], np.asarray(x).T @ np.asarray(x))
    assert statistics.count[0] == 16


def test_activations_in_a_shard_map_are_proportional_to_those_of_the_batch() -> None:
    x, w, out = normal(16, 4, seed=1) + 1, normal(4, 6, seed=2), PartitionSpec("data", "model")
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = (PartitionSpec(None, "model"), PartitionSpec("data"))
    statistics = one_kernel(jax.shard_map(lambda w, x: jnp.tanh(x @ w), mesh=mesh, in_specs=specs, out_specs=out), w, x)
    assert_near(statistics.gram[0] / statistics.count[0], np.asarray(x).T @ np.asarray(x) / 16)
    assert_near(statistics.total[0] / statistics.count[0], np.asarray(x).mean(0))


@st.composite
def contractions(draw: Any) -> tuple[str, str, str, str]:
    """The roles of a kernel's axes, their letters, and the letters of an x and of what comes out."""
    roles = "".join(draw(st.permutations(["i", "o", *draw(st.lists(st.sampled_from("bio"), max_size=2))])))
    letters = "abcd"[: len(roles)]
    met = [c for c, role in zip(letters, roles, strict=True) if role == "i" or draw(st.booleans())]
    x = "".join(draw(st.permutations([*met, "n"])))
    kept = ["n", *(c for c, role in zip(letters, roles, strict=True) if role != "i")]
    return roles, letters, x, "".join(draw(st.permutations(kept)))


@settings(max_examples=12)
@given(contractions())
def test_activations_of_any_contraction_match_its_inputs(case: tuple[str, str, str, str]) -> None:
    roles, letters, x_letters, out = case
    sizes = dict(zip("abcdn", (2, 3, 2, 4, 5), strict=True))
    x, w = (normal(*(sizes[c] for c in operand), seed=n) for n, operand in enumerate((x_letters, letters)))
    statistics = one_kernel(lambda w, x: jnp.einsum(f"{x_letters},{letters}->{out}", x, w), w, x, axes=roles)
    batch, inner = ("".join(c for c, role in zip(letters, roles, strict=True) if role == kind) for kind in "bi")
    own = "".join(c for c in batch if c in x_letters)  # layers with different activations
    gram = np.einsum(f"{x_letters},{x_letters.translate(primed(inner))}->{own}{inner}{inner.upper()}", x, x)
    gram = gram[tuple(slice(None) if c in own else None for c in batch)]
    d = math.prod(sizes[c] for c in inner)
    every = [sizes[c] for c in batch + inner + inner]
    assert_near(statistics.gram, np.broadcast_to(gram, every).reshape(-1, d, d))
    rows = math.prod(sizes[c] for c in x_letters if c not in inner + batch)
    assert_near(statistics.count, np.full(statistics.count.shape, rows))


def primed(letters: str) -> dict[int, str]:
    return {ord(c): c.upper() for c in letters}


def test_activations_under_jit_compute_only_the_sums() -> None:
    tokens, d, d_mlp = 64, 16, 48
    params = {"up": normal(d, d_mlp), "down": normal(d_mlp, d)}
    adapter = jax.eval_shape(lambda key: lj.init(key, params, {"*": LORA}), jax.random.key(0))

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["up"]) @ params["down"]

    run = jax.jit(lambda params, x: starts.activations(apply, params, adapter, x))
    compiled = run.lower(params, jnp.ones((tokens, d))).compile()
    forward, gram = 2 * tokens * 2 * d * d_mlp, 2 * tokens * (d * (d + 2) + d_mlp * (d_mlp + 2))
    # x·a and xᵀ·(x·a); the rest is elementwise, or sums of rank 1.
    assert compiled.cost_analysis()["flops"] < 1.05 * (forward + 2 * gram)


def test_activations_of_a_ragged_product_are_per_group() -> None:
    sizes, w = jnp.array([2, 0, 2]), normal(3, 4, 4, seed=5)
    statistics = one_kernel(lambda w, x, sizes: lax.ragged_dot(x, w, sizes), w, X, sizes, axes="bio")
    parts = [
        np.asarray(X)[rows] for rows in (slice(0, 2), slice(0, 0), slice(2, 4))
    ]  # the fifth row belongs to no group
    assert_near(statistics.gram, np.stack([x.T @ x for x in parts]))
    assert_near(statistics.total, np.stack([x.sum(0) for x in parts]))
    assert_near(statistics.count, [2, 0, 2])


def test_activations_of_experts_with_shared_tokens() -> None:
    w = normal(3, 4, 4, seed=5)
    statistics = one_kernel(lambda w, x: jnp.einsum("td,edf->etf", x, w), w, X, axes="bio")
    assert_near(statistics.gram, np.stack([XX] * 3))
    with pytest.raises(lj.AdapterError, match="along the kernel's input axes"):
        one_kernel(lambda w, x: jnp.einsum("etd,edf->tf", jnp.stack([x] * 3), w), w, X, axes="bio")


def test_bfloat16_activations_are_summed_in_float32() -> None:
    x = (normal(3000, 4, seed=1) + 2).astype(jnp.bfloat16)
    statistics = one_kernel(lambda w, x: x @ w, W.astype(jnp.bfloat16), x)
    wide = np.asarray(x, np.float64)
    assert statistics.gram.dtype == jnp.float32
    assert_near(statistics.gram[0], wide.T @ wide)
    assert_near(statistics.total[0], wide.sum(0))
    assert statistics.count[0] == 3000


def test_activations_are_summed_over_batches_of_any_order_and_size() -> None:
    def run(x: jax.Array) -> Any:
        return one_kernel(lambda w, x: x @ w, W, x)

    once = run(X)
    parts = jax.tree.map(jnp.add, run(X[3:]), run(X[:3]))
    jax.tree.map(assert_near, parts, once)


# Weights of tokens


def test_activations_are_weighted_per_token() -> None:
    x = normal(2, 3, 4, seed=1) + 1
    mask = np.array([[True, False, True], [False, False, True]])
    given = np.array([[0.5, 0.0, 2.0], [1.0, 0.25, 3.0]], np.float32)
    params = {"stack": normal(2, 4, 4, seed=2), "v": normal(4, 3, seed=3), "w": normal(4, 2, seed=4)}

    def apply(params: Any, x: jax.Array) -> Any:
        both = x.reshape(6, 4) @ jnp.concatenate([params["v"], params["w"]], 1)
        return layers(params["stack"], x), jnp.tanh(both).sum() + (x[:, 0] @ params["w"]).sum()

    adapter = lj.init(jax.random.key(0), params, {"stack": lj.LoRA(rank=1, alpha=1, axes="bio"), "*": LORA})
    run = jax.jit(lambda params, x, **options: starts.activations(apply, params, adapter, x, **options))
    found = run(params, x, token_weights={"stack": mask, "v": given.reshape(6)})
    inner = jnp.tanh(x @ params["stack"][0])
    cases: list[Any] = [("stack", 0, x, mask), ("stack", 1, inner, mask), ("v", 0, x, given)]
    cases += [("w", 0, jnp.concatenate([x, x[:, :1]], 1), np.ones((2, 4)))]  # without weights, in both uses
    for path, layer, rows, each in cases:
        assert_near(found[path].gram[layer], np.einsum("bti,btj,bt->ij", rows, rows, each))
        assert_near(found[path].total[layer], np.einsum("bti,bt->i", rows, each))
        assert_near(found[path].count[layer], each.sum())
    centered = np.asarray(x - np.einsum("bti,bt->i", x, given) / given.sum())
    covariance = np.einsum("bti,btj,bt->ij", centered, centered, given) / given.sum()
    assert_near(found["v"].covariance(centered=True)[0], covariance, 1e-4)


@pytest.mark.sweep
@pytest.mark.parametrize("use", USES)
def test_weights_of_one_count_every_token(use: str) -> None:
    apply, gram, count = USES[use]
    params = {"w": W}
    adapter = lj.init(jax.random.key(0), params, {"w": lj.LoRA(rank=1, alpha=1)})

    def run(weights: Any) -> Any:
        return starts.activations(lambda p, x: apply(p["w"], x), params, adapter, X, token_weights=weights)["w"]

    if use in ("with an opaque use", "scan over tokens"):
        with pytest.raises(lj.AdapterError, match=r"(?s)Expected `token_weights` with a weight for each token"):
            run(np.ones(5, bool))
        return
    for ones in (np.ones(5, bool), np.ones(5)):
        assert_near(run(ones).gram[0], gram)
        assert run(ones).count[0] == pytest.approx(count)


@pytest.mark.sweep
def test_activations_of_a_convolution_are_weighted_per_place() -> None:
    x, given, numbers = BATCH["image"], np.arange(24).reshape(2, 3, 4) % 5 > 1, ("NHWC", "HWIO", "NHWC")
    params, adapter = {"conv": PARAMS["conv"]}, {"conv": adapter_of()["conv"]}

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, params["conv"], STRIDES, "SAME", dimension_numbers=numbers)

    places = inputs()["conv"].reshape(3, 4, 2, 12).transpose(2, 0, 1, 3)[given]  # the batch is their last axis
    found = starts.activations(apply, params, adapter, x, token_weights=given)["conv"]
    assert_near(found.gram[0], places.T @ places)
    assert_near(found.total[0], places.sum(0))
    assert found.count[0] == given.sum()


def test_weights_that_do_not_fit_the_tokens_are_an_error() -> None:
    params = {"v": W, "w": W}
    adapter = lj.init(jax.random.key(0), params, {"*": lj.LoRA(rank=1, alpha=1)})

    def run(weights: Any, apply: Any = lambda p, x: jnp.tanh(x @ p["v"]) @ p["w"]) -> Any:
        return jax.eval_shape(lambda x: starts.activations(apply, params, adapter, x, token_weights=weights), X)

    text = r"(?s)with a weight for each token.*2 uses have other tokens.*'v', passed to `dot_general`: expected token "
    with pytest.raises(lj.AdapterError, match=text + r"axes of shape \(4,\), as `token_weights` has; got \(5,\)"):
        run(np.ones(4))
    with pytest.raises(lj.AdapterError, match=r"(?s)1 uses have.*'w', passed to `abs`.*or None to count all their tok"):
        run(np.ones(5), lambda p, x: x @ p["v"] + jnp.abs(p["w"]).sum())
    with pytest.raises(lj.AdapterError, match=r"(?s)floating-point array; got int32 for 'v'.*attention_mask == 1"):
        run({"v": np.ones(5, np.int32)})
    with pytest.raises(lj.AdapterError, match="got list for 'v'"):
        run({"v": [1.0] * 5})
    with pytest.raises(lj.AdapterError, match="'x' matches none of 2"):
        run({"x": np.ones(5)})
    with pytest.raises(lj.SpecError, match=r"no parameter named 'token_weights', .* of `starts.activations`"):
        starts.activations(lambda p, x, token_weights: x, params, adapter, X, token_weights=np.ones(5))


def test_a_kernel_behind_stop_gradient_is_an_error_with_the_reason() -> None:
    params, adapter = {"w": W}, lj.init(jax.random.key(0), {"w": W}, {"w": lj.LoRA(rank=1, alpha=1)})
    unused = starts.activations(lambda p, x: lax.stop_gradient(x @ p["w"]), params, adapter, X)
    with pytest.raises(lj.AdapterError, match=r"(?s)layers without any.*'w': 1 of 1.*reverse mode cannot"):
        starts.eva(params, adapter, unused)


# Distribution of ranks


def explained(layout: str) -> np.ndarray:
    x = inputs()[layout]
    variance = np.square(np.linalg.svd(x - x.mean(1, keepdims=True), compute_uv=False))
    return (variance / variance.sum(-1, keepdims=True)).mean(0)


def test_eva_distributes_ranks_by_explained_variance() -> None:
    adapter = {path: adapter_of()[path] for path in ("dense", "conv", "grouped", "transposed", "bias")}
    params, new = starts.eva(PARAMS, adapter, seen(), rho=2)
    # The 8 of 16 directions that explain the largest fraction of the variance of their kernel.
    bids = [(share, path) for path in adapter if path != "bias" for share in explained(path)[:4]]
    won = [path for _, path in sorted(bids, reverse=True)[:8]]
    ranks = {path: part.variant.rank for path, part in new.items() if path != "bias"}
    assert ranks == {path: won.count(path) for path in ranks} and sum(ranks.values()) == 8
    assert len(set(ranks.values())) > 1
    _, fixed = starts.eva(PARAMS, adapter, seen(), rho=2, keep_scale=False)
    for path, rank in ranks.items():
        assert fixed[path].variant == dataclasses.replace(adapter[path].variant, rank=rank)  # the same α
        assert np.array_equal(fixed[path].a, new[path].a)
        assert new[path].a.shape[-1] == rank
        assert new[path].variant.scale == pytest.approx(adapter[path].variant.scale)
    assert new["bias"] is adapter["bias"] and params is PARAMS
    got = jax.jit(lj.lora(model))(params, trained(jax.random.key(0), new), BATCH)
    assert_close(got, base()(lj.merge(params, trained(jax.random.key(0), new)), BATCH))


def test_a_stack_needs_a_rank_per_layer_and_kernels_without_rank_are_dropped() -> None:
    narrow = {"stack": lj.LoRA(rank=1, alpha=1, axes="bio"), "dense": lj.LoRA(rank=1, alpha=1)}
    params = {path: PARAMS[path] for path in narrow}
    adapter = lj.init(jax.random.key(0), params, narrow)
    flat, steep = jnp.eye(6), jnp.diag(jnp.array([100.0, 1, 1, 1, 1, 1]))

    def activations(gram: jax.Array, layers: int) -> Any:
        return starts.Activations(jnp.stack([gram] * layers), jnp.zeros((layers, 6)), jnp.ones(layers))

    _, won = starts.eva(params, adapter, {"stack": activations(steep, 3), "dense": activations(flat, 1)}, rho=4)
    assert {path: part.a.shape for path, part in won.items()} == {"stack": (3, 6, 1), "dense": (6, 1)}
    # The four directions that explain 1/6 each come before the second steep one and use the ranks of the stack.
    _, won = starts.eva(params, adapter, {"stack": activations(flat, 3), "dense": activations(steep, 1)}, rho=4)
    assert {path: part.a.shape for path, part in won.items()} == {"stack": (3, 6, 1), "dense": (6, 1)}
    both = {"stack": activations(jnp.eye(6) / 7, 3), "dense": activations(jnp.diag(jnp.array([1.0, 1, 1, 1, 0, 0])), 1)}
    _, won = starts.eva(params, adapter, both, rho=4)
    assert {path: part.variant.rank for path, part in won.items()} == {"dense": 4}


# Conversion to an adapter of the original base


@pytest.mark.parametrize("start", ["pissa", "olora", "lora_ga"])
def test_as_plain_converts_a_trained_adapter_to_the_original_base(start: str) -> None:
    began = started(start)
    steps = trained(jax.random.key(7), began.adapter)
    after = jax.tree.map(lambda x, step: np.asarray(x) + 0.1 * np.asarray(step), began.adapter, steps)
    plain = starts.as_plain(PARAMS, after, *began)
    for path, part in plain.items():
        if path != "bias":
            assert part.variant.rank == 4 == part.a.shape[-1]
            assert part.variant.scale == pytest.approx(began.adapter[path].variant.scale, rel=1e-12)
    assert plain["bias"] is after["bias"]
    assert plain["dense"].variant == lj.LoRA(rank=4, alpha=6)
    assert plain["query"].variant.alpha == pytest.approx(math.sqrt(2))
    assert_close(adapted()(PARAMS, plain, BATCH), adapted()(began.params, after, BATCH))


def test_as_plain_keeps_adapters_of_an_unchanged_base() -> None:
    began = starts.orthogonal(jax.random.key(0), PARAMS, {"dense": adapter_of()["dense"]})
    after = trained(jax.random.key(0), began.adapter)
    assert starts.as_plain(PARAMS, after, *began)["dense"] is after["dense"]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_as_plain_refuses_the_trained_adapter_as_that_of_the_start(dtype: Any) -> None:
    # With a base in bfloat16, was an adapter that changed nothing.
    params = {"w": normal(64, 32).astype(dtype)}
    started = starts.pissa(params, lj.init(jax.random.key(0), params, {"w": LORA}))
    trained_adapter = jax.tree.map(lambda x: x + 0.02, started.adapter)
    assert starts.as_plain(params, trained_adapter, *started)
    with pytest.raises(lj.AdapterError, match="`started_params` with `started_adapter` is not `params`"):
        starts.as_plain(params, trained_adapter, started.params, trained_adapter)


def test_as_plain_refuses_the_initialization_of_another_base() -> None:
    part = {"dense": adapter_of()["dense"]}
    began = starts.pissa(PARAMS, part)
    other = PARAMS | {"dense": PARAMS["dense"] + 0.01}
    with pytest.raises(lj.AdapterError, match=r"(?s)1 kernels differ.*'dense': `started_params` with `started"):
        starts.as_plain(other, began.adapter, *began)
    with pytest.raises(lj.AdapterError, match="'dense': not in `started_adapter`"):
        starts.as_plain(PARAMS, began.adapter, began.params, {})
    wider = {"dense": lj.Adapter(lj.LoRA(rank=2, alpha=5), "io", **began.adapter["dense"].arrays)}
    with pytest.raises(lj.AdapterError, match=r"alpha=5\) in `adapter`, LoRA\(rank=2, alpha=3\) in `started_adapter`"):
        starts.as_plain(PARAMS, wider, *began)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_as_plain_recognizes_the_base_up_to_its_precision(dtype: str) -> None:
    params = {"dense": PARAMS["dense"].astype(dtype)}
    began = starts.pissa(params, {"dense": adapter_of()["dense"]})
    starts.as_plain(params, began.adapter, *began)
    traced = jax.jit(starts.as_plain)(params, began.adapter, *began)
    assert traced["dense"].variant == lj.LoRA(rank=4, alpha=6)


# Errors


def expect(error: type[Exception], text: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=re.escape(text)):
        call()


def test_invalid_arguments_are_errors() -> None:
    params, key = {"w": jnp.eye(6)}, jax.random.key(0)

    def adapter(**options: Any) -> Any:
        return lj.init(key, params, {"w": lj.LoRA(**options)})

    odd, wide, negative = adapter(rank=3, alpha=1), adapter(rank=4, alpha=1), adapter(rank=2, alpha=-1)
    expect(lj.SpecError, "At 'w': expected an even rank", lambda: starts.orthogonal(key, params, odd))
    expect(lj.SpecError, "both `niter` and `key`", lambda: starts.pissa(params, odd, niter=4))
    expect(lj.SpecError, "got niter=None and a key", lambda: starts.pissa(params, odd, key=key))
    expect(lj.SpecError, "At 'w': expected a positive scale", lambda: starts.pissa(params, negative))
    expect(lj.SpecError, "rank of at most 3", lambda: starts.lora_ga(params, wide, params))
    for options, text in (
        ({"scale": "none"}, "Expected 'stable' or 'unit' or 'gd' or 'weight_svd' for `scale`; got 'none'"),
        ({"direction": "A"}, "Expected 'ArB2r' or 'A2rBr' or 'ArBr' or 'random' for `direction`; got 'A'"),
        ({"direction": "ArBr", "key": key}, "'random', and none for another; got direction='ArBr' and a key"),
        ({"direction": "random"}, "got direction='random' and no key"),
        ({"scale": "gd"}, "At 'w': expected a positive scale"),
    ):
        expect(lj.SpecError, text, functools.partial(starts.lora_ga, params, negative, params, **options))
    for options, text in (
        ({"mode": "cpm"}, "Expected 'ipm' or 'kpm' for `mode`; got 'cpm'"),
        ({"damping": 0}, "Expected a positive number for `damping`; got damping=0"),
    ):
        expect(lj.SpecError, text, functools.partial(starts.corda, params, odd, {}, **options))
    expect(lj.AdapterError, "Expected the activations of every", lambda: starts.corda(params, odd, {}))
    expect(lj.AdapterError, "1 are not in `gradient`", lambda: starts.lora_ga(params, odd, {}))
    expect(lj.SpecError, "Expected rho to be 1", lambda: starts.eva(params, odd, {}, rho=0.5))
    expect(lj.AdapterError, "Expected the activations of every", lambda: starts.eva(params, odd, {}))
    expect(lj.AdapterError, "is not in `params`", lambda: starts.pissa({"v": params["w"]}, odd))
    expect(lj.AdapterError, "'w' is not in `started_params`", lambda: starts.as_plain(params, odd, {}, odd))
    statistics = {"w": starts.Activations(jnp.eye(6)[None], jnp.zeros((1, 6)), jnp.ones(1))}
    traced = jax.jit(lambda statistics: starts.eva(params, odd, statistics, rho=2))
    expect(lj.AdapterError, "got traced arrays", lambda: traced(statistics))


SWAPPED: dict[str, Callable[[Any, Any, Any], Any]] = {
    "pissa": lambda key, params, adapter: starts.pissa(adapter, params),
    "olora": lambda key, params, adapter: starts.olora(adapter, params),
    "lora_ga": lambda key, params, adapter: starts.lora_ga(adapter, params, {}),
    "eva": lambda key, params, adapter: starts.eva(adapter, params, {}),
    "corda": lambda key, params, adapter: starts.corda(adapter, params, {}),
    "mica": lambda key, params, adapter: starts.mica(adapter, params),
    "activations": lambda key, params, adapter: starts.activations(lambda p, x: x, adapter, params, X),
    "gradients": lambda key, params, adapter: starts.gradients(lambda p, x: x.sum(), adapter, params, X),
    "as_plain": lambda key, params, adapter: starts.as_plain(adapter, params, params, adapter),
    "as_plain, the start": lambda key, params, adapter: starts.as_plain(params, adapter, adapter, params),
    "gaussian": lambda key, params, adapter: starts.gaussian(key, adapter, params),
    "kaiming, the key last": lambda key, params, adapter: starts.kaiming(params, adapter, key),
    "orthogonal, the key last": lambda key, params, adapter: starts.orthogonal(adapter, params, key),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_swapped_arguments_are_an_error_with_the_order(name: str) -> None:
    params, key = {"w": jnp.eye(6)}, jax.random.key(0)
    adapter = lj.init(key, params, {"w": LORA})
    expect(lj.AdapterError, "The arguments come in this order: first `", lambda: SWAPPED[name](key, params, adapter))


def test_a_kernel_without_activations_is_reported() -> None:
    with pytest.raises(lj.AdapterError, match=r"(?s)does not do so for 1 kernels.*'embedding', axes 'io'"):
        starts.activations(model, PARAMS, adapter_of(), BATCH)
