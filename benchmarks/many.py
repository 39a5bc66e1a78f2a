"""Many adapters of one base: trained together against one by one, and served together against one.

Usage:
    export PYTHONPATH=examples
    python benchmarks/many.py training                        # the demo's model
    python benchmarks/many.py training --steps 0              # deterministic figures only
    python benchmarks/many.py lookups                         # gathered factors against sorted tokens, one layer
    python benchmarks/many.py serving --torch TORCH_PYTHON    # SmolLM2; with PEFT, run by that interpreter
    python benchmarks/on_tpu.py --many                        # the same, counted by the compiler for TPUs

Methods that are timed are interleaved. `--short` runs everything at a tiny size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import many_lookups
import numpy as np
import optax
import records
from against.figures import progress
from jax.sharding import SingleDeviceSharding
from timing import timed

import finetune_trec
import lora_jax as lj
import minilm
from lora_jax import many, testing

COUNTED = (1, 2, 4, 8, 16, 32, 64)  # adapters
TIMED = 8  # adapters
SEQUENCES = (4, 16)  # of each adapter
TOKENS = 18  # of each sequence, as in most batches of the demo
COUNTS = {
    "FLOPs": "G",
    "FLOPs of each": "×G",
    "of the compiler": "×G",
    "arguments": "MB",
    "each adapter adds": "MB",
    "temporary": "MB",
    "temporary of each": "×MB",
}
ONE_BY_ONE = ("one by one", "in one program")
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1.0))
TINY = minilm.Encoder(vocabulary=64, max_tokens=32, d_model=32, layers=1, heads=2, d_mlp=64)


class Case(NamedTuple):
    """A model, shapes of its parameters, and shapes of an adapter."""

    apply: Callable[..., Any]
    params: Any
    adapter: Any


def case(encoder: minilm.Encoder | None = None) -> Case:
    """The demo's classifier and adapter, or one with another encoder."""
    model = minilm.Classifier(50, encoder or minilm.Encoder())
    example = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 2), bool)
    params = jax.eval_shape(model.init, jax.random.key(0), *example)
    kernels = lj.kernels(model.apply, params, *example)
    adapter = jax.eval_shape(
        lambda key, params: lj.init(key, params, finetune_trec.SPEC, kernels=kernels), jax.random.key(0), params
    )
    return Case(model.apply, params, adapter)


def loss_fn(apply: Callable[..., Any], params: Any, adapter: Any, ids: Any, mask: Any, labels: Any) -> Any:
    """The mean loss of a batch of one adapter."""
    logits = apply(params, adapter, ids, mask)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def single_step(found: Case) -> Callable[..., Any]:
    """A step of one adapter: `(params, adapter, state, rate, *batch) -> (adapter, state, loss)`."""
    apply = lj.lora(found.apply)

    def step(params: Any, adapter: Any, state: Any, rate: Any, *batch: Any) -> Any:
        loss, gradient = jax.value_and_grad(lambda adapter: loss_fn(apply, params, adapter, *batch))(adapter)
        updates, state = TX.update(gradient, state, adapter)
        return optax.apply_updates(adapter, jax.tree.map(lambda update: rate * update, updates)), state, loss

    return step


def stacked_step(found: Case) -> Callable[..., Any]:
    """A step of all adapters of a stack."""
    apply = lj.lora(found.apply, form="factored")
    step = many.train_step(lambda *args: loss_fn(apply, *args), TX)
    return lambda params, stacked, states, rates, *batch: step(params, stacked, states, *batch, rates=rates)


def batch_of(leading: tuple[int, ...], tokens: int, vocabulary: int) -> tuple[Any, ...]:
    """Random sequences."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocabulary, (*leading, tokens)).astype(np.int32)
    return ids, np.ones(ids.shape, bool), rng.integers(0, 50, leading).astype(np.int32)


def shapes_of(found: Case, adapters: int, sequences: int, tokens: int) -> tuple[Any, ...]:
    """Shapes of the arguments of a stacked step."""
    stacked = jax.eval_shape(many.stack, {str(number): found.adapter for number in range(adapters)})
    states = jax.eval_shape(jax.vmap(TX.init), stacked.members.trainable)
    rates = jax.ShapeDtypeStruct((adapters,), jnp.float32)
    return found.params, stacked, states, rates, *batch_of((adapters, sequences), tokens, 50)


class Counts(NamedTuple):
    """FLOPs on the jaxpr and as the compiler counts them, and bytes, of a step."""

    flops: int
    compiled: int
    arguments: int
    temporary: int


def count(found: Case, adapters: int, sequences: int, tokens: int, device: Any = None) -> Counts:
    """Compiles a step of all adapters, for this machine or another device."""
    args, step = shapes_of(found, adapters, sequences, tokens), stacked_step(found)
    sharding = None if device is None else SingleDeviceSharding(device)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=sharding), args)
    program = jax.jit(step, donate_argnums=(1, 2)).lower(*shapes).compile()
    memory = program.memory_analysis()
    return Counts(
        testing.flops(step, *args),
        int(program.cost_analysis()["flops"]),
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
    )


def counts_table(
    found: Case, numbers: tuple[int, ...], sequences: int = SEQUENCES[0], tokens: int = TOKENS, device: Any = None
) -> records.Table:
    """Returns what a step needs by the number of adapters."""
    rows: dict[str, dict[str, Any]] = {}
    first: Counts | None = None
    for adapters in numbers:
        progress(f"compile: {adapters} adapters")
        counts = count(found, adapters, sequences, tokens, device)
        first = first or counts
        rows[records.plural(adapters)] = {
            "FLOPs": counts.flops,
            "FLOPs of each": counts.flops / adapters,
            "of the compiler": counts.compiled / adapters,
            "arguments": counts.arguments,
            "each adapter adds": (counts.arguments - first.arguments) / (adapters - 1) if adapters > 1 else None,
            "temporary": counts.temporary,
            "temporary of each": counts.temporary / adapters,
        }
        jax.clear_caches()
    return records.Table("A training step by the number of adapters", COUNTS, rows)


def seconds_of_steps(
    found: Case, adapters: int, sequences: int, tokens: int, rounds: int
) -> tuple[list[float], list[float]]:
    """Returns the seconds in which all adapters make a step: in one program, and one after another."""
    draw = lambda x: 0.02 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype)  # noqa: E731
    params, adapter = jax.jit(lambda: jax.tree.map(draw, (found.params, found.adapter)))()
    batch = batch_of((adapters, sequences), tokens, 50)
    rates = np.full(adapters, 1e-3, np.float32)
    own = [jax.tree.map(jnp.copy, adapter) for _ in range(adapters)]
    stacked = many.stack({str(number): adapter for number in range(adapters)})
    together = [stacked, jax.jit(jax.vmap(TX.init))(stacked.members.trainable)]
    one_by_one = [[adapter, TX.init(adapter)] for adapter in own]
    step = jax.jit(stacked_step(found), donate_argnums=(1, 2))
    single = jax.jit(single_step(found), donate_argnums=(1, 2))
    took: tuple[list[float], list[float]] = ([], [])
    losses: dict[str, Any] = {}

    def run_together() -> None:
        seconds, (*together[:], losses["together"]) = timed(lambda: step(params, *together, rates, *batch))
        took[0].append(seconds)

    def run_one_by_one() -> None:
        total, losses["one by one"] = 0.0, []
        for number, args in enumerate(one_by_one):
            part = [x[number] for x in batch]
            seconds, (*args[:], loss) = timed(lambda a=args, p=part: single(params, *a, rates[0], *p))
            losses["one by one"].append(loss)
            total += seconds
        took[1].append(total)

    for number in range(rounds + 1):
        progress(f"round {number} of {rounds}: {sequences} sequences of each of {adapters} adapters")
        for run in (run_together, run_one_by_one)[:: -1 if number % 2 else 1]:
            run()
        if number == 0:
            np.testing.assert_allclose(losses["together"], losses["one by one"], rtol=1e-3)
    return took[0][1:], took[1][1:]


def times_table(found: Case, adapters: int, all_sequences: tuple[int, ...], tokens: int, rounds: int) -> records.Table:
    """Returns the time of a step of one adapter, in one program with others and alone."""
    rows = {}
    for sequences in all_sequences:
        together, alone = seconds_of_steps(found, adapters, sequences, tokens, rounds)
        of_each = [[took / adapters for took in seconds] for seconds in (alone, together)]
        rows[f"{sequences} sequences"] = dict(zip(ONE_BY_ONE, of_each, strict=True))
        jax.clear_caches()
    title = f"A step of one of {adapters} adapters by its sequences of {tokens} tokens"
    return records.Table(title, dict.fromkeys(ONE_BY_ONE, "×ms"), rows, across=True)


def training(steps: int, *, short: bool = False, device: Any = None) -> Iterator[records.Table]:
    """Yields the tables of training."""
    found, tokens = case(TINY if short else None), 4 if short else TOKENS
    yield counts_table(found, COUNTED[:2] if short else COUNTED, tokens=tokens, device=device)
    if steps:
        adapters, rounds = (2, 2) if short else (TIMED, steps)
        yield times_table(found, adapters, SEQUENCES, tokens, rounds)


def counted(device: Any) -> Iterator[records.Table]:
    """Yields the tables of the compiler for another device, which need not exist."""
    import many_serving

    yield from training(0, device=device)
    yield from many_lookups.tables(0, device=device, dtype=jnp.bfloat16)
    yield many_serving.counted(many_serving.FULL, many_serving.LOADED, device, jnp.bfloat16)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints, and writes the requested file."""
    parser = records.parser(__doc__)
    parser.add_argument("part", choices=("training", "lookups", "serving"))
    parser.add_argument("--steps", type=int, default=9, help="rounds to time; 0 for none")
    parser.add_argument("--torch", default="", help="an interpreter that has torch, transformers and PEFT")
    parser.add_argument("--short", action="store_true", help="a tiny size")
    given = parser.parse_args(arguments)
    if given.part == "serving":
        import many_serving  # needs the packages of the language model

        found = many_serving.tables(given.steps, given.torch, short=given.short)
        records.publish(found, given.json, **many_serving.versions(given.torch))
    else:
        make = {"training": training, "lookups": many_lookups.tables}[given.part]
        records.publish(make(given.steps, short=given.short), given.json)


if __name__ == "__main__":
    main()
