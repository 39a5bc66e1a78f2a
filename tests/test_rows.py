"""`Rows` trains some rows of a table in all of its uses. The oracle writes the rows into the table."""

import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import trained
from law import assert_law, normal

import lora_jax as lj

TOKENS = jnp.array([[1, 5, 2], [8, 5, 5]])
IDS = (5, 8)


class Tied(nn.Module):
    """A table for lookups that is also the head."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(9, 4, name="embed")
        return embed.attend(jnp.tanh(embed(tokens)))


def by_hand(params: Any, rows: jax.Array) -> Any:
    return {"table": params["table"].at[jnp.array(IDS)].add(rows)}


USES: dict[str, Callable[..., jax.Array]] = {
    "a lookup": lambda p, tokens: p["table"][tokens],
    "take": lambda p, tokens: jnp.take(p["table"], tokens, axis=0),
    "a product": lambda p, tokens: jax.nn.one_hot(tokens, 9) @ p["table"],
    "a tied head": lambda p, tokens: jnp.tanh(p["table"][tokens]) @ p["table"].T,
}


@pytest.mark.parametrize("use", USES)
def test_uses_of_the_table_match_a_table_with_the_rows(use: str) -> None:
    params = {"table": normal(9, 4)}
    adapter = trained(jax.random.key(1), lj.init(jax.random.key(0), params, {"table": lj.Rows(ids=IDS)}))
    assert_law(USES[use], params, adapter, TOKENS)

    def total(apply: Any) -> Any:
        return lambda *args: jnp.sum(jnp.sin(apply(*args)))

    rows, gradient = jax.grad(total(lambda rows: USES[use](by_hand(params, rows), TOKENS))), lj.lora(USES[use])
    got = jax.grad(total(lambda adapter: gradient(params, adapter, TOKENS)))(adapter)
    np.testing.assert_allclose(got["table"].rows, rows(adapter["table"].rows), rtol=1e-4, atol=1e-5)


def test_merge_writes_only_these_rows() -> None:
    params = {"table": normal(9, 4)}
    adapter = trained(jax.random.key(1), lj.init(jax.random.key(0), params, {"table": lj.Rows(ids=(8, 5))}))
    merged, expected = lj.merge(params, adapter)["table"], np.array(params["table"])
    expected[[8, 5]] += np.asarray(adapter["table"].rows)
    np.testing.assert_array_equal(merged, expected)
    np.testing.assert_array_equal(lj.unmerge({"table": merged}, adapter, base=params)["table"], params["table"])


def test_training_changes_only_these_rows() -> None:
    model = Tied()
    params = model.init(jax.random.key(0), TOKENS)
    kernels = lj.kernels(model.apply, params, TOKENS)
    adapter = lj.init(jax.random.key(1), params, {"**/embedding": lj.Rows(ids=IDS)}, kernels=kernels)
    apply = lj.lora(model.apply)
    np.testing.assert_array_equal(apply(params, adapter, TOKENS), model.apply(params, TOKENS))
    gradient = jax.grad(lambda adapter: jnp.sum(apply(params, adapter, TOKENS) ** 2))(adapter)
    tx = optax.adamw(0.1)
    new = optax.apply_updates(adapter, tx.update(gradient, tx.init(adapter), adapter)[0])
    moved = lj.merge(params, new)["params"]["embed"]["embedding"] != params["params"]["embed"]["embedding"]
    assert np.flatnonzero(moved.any(1)).tolist() == list(IDS)


def test_a_stack_of_tables_has_rows_for_each_table() -> None:
    params = {"tables": normal(3, 9, 4)}
    adapter = lj.init(jax.random.key(0), params, {"tables": lj.Rows(ids=IDS, axes="bio")})
    assert adapter["tables"].rows.shape == (3, 2, 4)

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        def step(x: jax.Array, table: jax.Array) -> Any:
            return jnp.tanh(x + table[tokens]), None

        return jax.lax.scan(step, jnp.zeros((*tokens.shape, 4)), params["tables"])[0]

    assert_law(apply, params, trained(jax.random.key(1), adapter), TOKENS)


def test_the_table_is_neither_copied_nor_differentiated() -> None:
    params = {"table": normal(50, 4)}
    adapter = lj.init(jax.random.key(0), params, {"table": lj.Rows(ids=IDS)})
    apply = lj.lora(lambda p, tokens: p["table"][tokens])
    jaxpr = jax.make_jaxpr(jax.grad(lambda adapter: jnp.sum(apply(params, adapter, TOKENS) ** 2)))(adapter)
    shapes = [str(var.aval) for eqn in jaxpr.jaxpr.eqns for var in eqn.outvars]
    assert shapes and not [aval for aval in shapes if "[50,4]" in aval]


def test_a_checkpoint_contains_the_rows(tmp_path: pathlib.Path) -> None:
    params = {"table": normal(9, 4)}
    adapter = trained(jax.random.key(1), lj.init(jax.random.key(0), params, {"table": lj.Rows(ids=IDS)}))
    lj.save(tmp_path / "adapter", adapter, base=params)
    restored = lj.restore(tmp_path / "adapter", base=params)
    assert jax.tree.structure(restored) == jax.tree.structure(adapter)
    np.testing.assert_array_equal(restored["table"].rows, adapter["table"].rows)


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (
            (5, 9),
            "Cannot adapt 'table' of shape (9, 4), by the rule 'table': the table has 9 rows, with axes 'io'; "
            "got ids=(5, 9).",
        ),
        ((-1,), "Expected an integer of at least 0 for `ids`; got ids=-1."),
        ((5, 5), "Expected no duplicates in `ids`; got ids=(5, 5)."),
        ((), "Expected at least one integer for `ids`; got ()."),
        (5, "Expected a list of integers for `ids`; got 5."),
        ("56", "Expected a list of integers for `ids`; got '56'."),
        ([5.0], "Expected an integer of at least 0 for `ids`; got 5.0."),
    ],
    ids=["out of range", "negative", "twice", "none", "no list", "text", "no integers"],
)
def test_rows_outside_the_table_are_an_error(ids: Any, text: str) -> None:
    with pytest.raises(lj.SpecError) as caught:
        lj.init(jax.random.key(0), {"table": normal(9, 4)}, {"table": lj.Rows(ids=ids)})
    assert str(caught.value) == text


def test_a_kernel_that_is_not_a_table_is_an_error() -> None:
    with pytest.raises(lj.SpecError) as caught:
        lj.init(jax.random.key(0), {"out": normal(2, 3, 4)}, {"out": lj.Rows(ids=(1,), axes="iio")})
    assert str(caught.value) == (
        "Cannot adapt 'out' of shape (2, 3, 4), by the rule 'out': Rows needs one input axis, the axis of the rows, "
        "and output axes; the axes are 'iio'."
    )
