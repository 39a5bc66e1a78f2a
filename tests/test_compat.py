"""Errors for a JAX version that is newer than the library, and the common form of equations for all versions."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from law import adapted, assert_law, normal

import lora_jax as lj
from lora_jax._compat import SUPPORTED, Jaxpr, JaxprEqn, compute_on, normal_parameters, parameters
from lora_jax._transform import interpreter as _interpreter

PARAMS = {"w": normal(3, 4, 4)}


def stack(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    bias = jnp.ones(4)
    return lax.scan(lambda x, w: (jnp.tanh(x @ w) + bias, None), x, params["w"], unroll=2)[0]


def equation(name: str) -> JaxprEqn:
    eqns = jax.make_jaxpr(stack)(PARAMS, normal(2, 4)).eqns
    return next(eqn for eqn in eqns if eqn.primitive.name == name)


def test_a_scan_has_the_same_parameters_on_every_jax_version() -> None:
    names = ["reverse", "length", "jaxpr", "num_consts", "num_carry", "unroll"]
    got = parameters(equation("scan"), names)
    body = got.pop("jaxpr")
    assert got == {"reverse": False, "length": 3, "num_consts": 1, "num_carry": 1, "unroll": 2}
    assert len(body.jaxpr.invars) == 3
    assert list(body.consts) == []


@pytest.mark.parametrize(("name", "new"), [("scan", "prefetch"), ("scan", "ft_middle"), ("broadcast_in_dim", "fill")])
def test_an_unknown_parameter_is_an_error_with_version_primitive_and_name(name: str, new: str) -> None:
    eqn = equation(name)
    newer = eqn.replace(params={**eqn.params, new: 1})
    with pytest.raises(lj.UnsupportedError) as error:
        parameters(newer, list(normal_parameters(eqn)))
    text = str(error.value)
    assert f"Expected `{name}` to have the parameters that it has in JAX {SUPPORTED}" in text
    assert f"in JAX {jax.__version__} it has the unknown parameter '{new}'.\n" in text
    assert f"lora_jax supports JAX {SUPPORTED}: install one of these, or a newer lora_jax." in text
    assert __file__ in text


def test_a_missing_parameter_is_an_error() -> None:
    with pytest.raises(lj.UnsupportedError, match="it lacks the parameter 'turns'"):
        parameters(equation("scan"), [*normal_parameters(equation("scan")), "turns"])


def test_lora_raises_the_error_for_such_an_equation(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _interpreter.live_equations

    def newer(jaxpr: Jaxpr) -> list[JaxprEqn]:
        return [
            eqn.replace(params={**eqn.params, "prefetch": 1}) if eqn.primitive.name == "scan" else eqn
            for eqn in plain(jaxpr)
        ]

    monkeypatch.setattr(_interpreter, "live_equations", newer)
    with pytest.raises(lj.UnsupportedError, match=r"`scan` .*'prefetch'"):
        lj.lora(stack)(PARAMS, adapted(PARAMS, {"w": "bio"}), normal(2, 4))


def test_compute_on_host_applies_to_the_factors() -> None:
    where = {"compute_type": "device_host", "out_memory_spaces": jax.memory.Space.Device}

    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return compute_on(lambda w, x: jnp.sin(x @ w), **where)(params["w"][0], x) @ params["w"][1]

    adapter = adapted(PARAMS, {"w": "bio"})
    assert_law(apply, PARAMS, adapter, normal(2, 4))
    assert "_xla_compute_type" in jax.jit(lj.lora(apply)).lower(PARAMS, adapter, normal(2, 4)).as_text()
