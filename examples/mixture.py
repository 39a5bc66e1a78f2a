"""Mixes two experts, each trained on half of TREC's labels, and compares the mixture with each of them and their mean.

    python examples/mixture.py            # three seeds; some minutes on two cores
    python examples/mixture.py --short    # every stage for a few steps, under a minute

The base is all-MiniLM-L6-v2 with a head that logistic regression has fitted to its features, both frozen. One expert is
LoRA on the questions about people, places and numbers, the other on those about things, descriptions and
abbreviations; each must choose among all 50 labels, and never sees the questions of the other. Then the experts are
frozen and mixed: with equal weights, by Arrow, which trains nothing, and by gates, which are trained for a few steps on
questions of both kinds.
"""

import argparse
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table

import lora_jax as lj
import minilm
import trec
from finetune_trec import MODEL, accuracy, compile_quickly, console, evaluate, make_step, progress_bar

SPEC = {"**/encoder/**/kernel": lj.LoRA(rank=8, alpha=16)}
TASKS = {"people, places, numbers": ("HUM", "LOC", "NUM"), "things, descriptions": ("ENTY", "DESC", "ABBR")}
BATCH = 32


class Scale(NamedTuple):
    """The size of a run."""

    train_questions: int
    test_questions: int
    expert_steps: int
    gate_steps: int
    max_tokens: int


FULL = Scale(4_882, test_questions=500, expert_steps=150, gate_steps=100, max_tokens=18)
SHORT = Scale(192, test_questions=64, expert_steps=3, gate_steps=3, max_tokens=12)


def fit_head(params: Any, tokens: trec.Tokens) -> dict[str, Any]:
    """Returns the base with a head that is logistic regression on the encoder's features."""
    from sklearn.linear_model import LogisticRegression  # slow to import

    embed = jax.jit(lambda ids, mask: MODEL.apply(params, ids, mask, method="embed"))
    regression = LogisticRegression(max_iter=1_000).fit(evaluate(embed, tokens), tokens.labels)
    kernel = np.zeros((regression.coef_.shape[1], trec.LABELS), np.float32)
    bias = np.full(trec.LABELS, -20, np.float32)  # of labels that no question has
    kernel[:, regression.classes_], bias[regression.classes_] = regression.coef_.T, regression.intercept_
    head = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
    return {"params": params["params"] | {"classifier": head}}


def training(steps: int, *, rate: float, only: Sequence[str] = ()) -> Callable[..., Any]:
    """Returns `train(name, params, adapter, tokens, seed)`, whose compiled step is the same for all seeds.

    It returns the adapter after `steps` steps of Adam, with cosine decay, on some of its arrays or on all.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 16), steps)
    tx = optax.masked(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)), lj.optim.select(*only))
    step = make_step(lj.lora(MODEL.apply), tx)

    def train(name: str, params: Any, adapter: Any, tokens: trec.Tokens, seed: int) -> Any:
        state = tx.init(adapter)
        with progress_bar(f"{name}, seed {seed}", steps * BATCH) as bar:
            for batch in itertools.islice(_epochs(tokens, seed), steps):
                adapter, state, loss = step(params, adapter, state, batch.ids, batch.mask, batch.labels)
                bar.set_postfix_str(f"loss {float(loss):.3f}", refresh=False)
                bar.update(BATCH)
        return adapter

    return train


def _epochs(tokens: trec.Tokens, seed: int) -> Iterator[trec.Batch]:
    rng = np.random.default_rng(seed)
    while True:
        yield from trec.training_batches(tokens, BATCH, rng, trec.LENGTHS)


def run(out: Path, scale: Scale, seeds: Sequence[int] = (0,)) -> dict[str, Any]:
    """Trains the experts and the mixtures, prints the table and writes it to `out`.

    Returns:
      By row of the table, for each seed the test accuracy on the questions of each task and on all of them.
    """
    start, cpu = time.perf_counter(), time.process_time()
    data = trec.read()
    kinds = np.array([name.split(":")[0] for name in data.names])
    train_tokens, test_tokens = (
        trec.tokenize(trec.Questions(questions.texts[:count], questions.labels[:count]), scale.max_tokens)
        for questions, count in ((data.train, scale.train_questions), (data.test, scale.test_questions))
    )
    params = {"params": {"encoder": minilm.load_encoder()}}
    params = fit_head(params, train_tokens)
    example = next(trec.ordered_batches(test_tokens, BATCH))
    kernels = lj.kernels(MODEL.apply, params, example.ids, example.mask)
    init = jax.jit(lambda key: lj.init(key, params, SPEC, kernels=kernels))
    train_expert = training(scale.expert_steps, rate=1e-3)
    train_gates = training(scale.gate_steps, rate=3e-2, only=["gate"])
    apply = jax.jit(lj.lora(MODEL.apply))
    is_first = np.isin(kinds[test_tokens.labels], next(iter(TASKS.values())))

    def right(adapter: Any) -> list[float]:
        logits = evaluate(functools.partial(apply, params, adapter), test_tokens)
        parts = (is_first, ~is_first, np.ones_like(is_first))
        return [accuracy(logits[part], test_tokens.labels[part]) for part in parts]

    results: dict[str, list[list[float]]] = {"base": [right({})]}
    for seed in seeds:
        experts = {}
        for at, (task, names) in enumerate(TASKS.items()):
            rows = np.flatnonzero(np.isin(kinds[train_tokens.labels], names))
            chosen = trec.Tokens([train_tokens.ids[row] for row in rows], train_tokens.labels[rows])
            adapter = init(jax.random.key(len(TASKS) * seed + at))
            experts[task] = train_expert(task, params, adapter, chosen, seed)
        gated = lj.many.mixture(experts, lj.many.Gate())  # a gate of zeros: at first the mean of the experts
        found = {
            **{f"expert: {task}": adapter for task, adapter in experts.items()},
            "mean of both": lj.many.mixture(experts, lj.many.Constant()),
            "Arrow": lj.many.mixture(experts, lj.many.Arrow(top_k=1)),
            "gates": train_gates("gates", params, gated, train_tokens, seed),
        }
        for name, adapter in found.items():
            results.setdefault(name, []).append(right(adapter))
    out.mkdir(parents=True, exist_ok=True)
    (out / "mixture.json").write_text(json.dumps({"seeds": [*seeds], "accuracy": results}, indent=2) + "\n")

    title = f"Test accuracy of all-MiniLM-L6-v2 on TREC, 50 labels, seeds {[*seeds]}"
    table = Table(title=title, title_justify="left")
    for column in ("adapter", *TASKS, "all"):
        table.add_column(column, justify="left" if column == "adapter" else "right")
    for name, values in results.items():
        table.add_row(name, *map(_percent, np.array(values).T))
    console.print(table)
    gates, *others = (np.array(results[name])[:, -1] for name in ("gates", "mean of both", "Arrow"))
    for name, other in zip(("the mean of both", "Arrow"), others, strict=True):
        gains = ", ".join(f"{100 * gain:+.1f}" for gain in gates - other)
        console.print(f"Gates minus {name}: {_percent(gates - other)}; by seed {gains}")
    if scale is FULL and gates.mean() <= others[0].mean():
        raise RuntimeError(
            f"Expected the gates to be better than the mean of the experts, {others[0].mean():.1%}; got "
            f"{gates.mean():.1%} ({out / 'mixture.json'})."
        )
    console.print(f"{time.perf_counter() - start:.0f} s in total, {time.process_time() - cpu:.0f} s of CPU time")
    return results


def _percent(values: Any) -> str:
    """Formats the mean, and the standard deviation if there are several values."""
    return f"{100 * values.mean():.1f}{f' ± {100 * values.std(ddof=1):.1f}' if len(values) > 1 else ''} %"


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description="Mixes two LoRA experts of TREC.")
    parser.add_argument("--out", type=Path, default=Path("mixture_output"), help="output folder (mixture_output)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="two experts and the gates for each")
    parser.add_argument("--short", action="store_true", help="every stage, for a few steps")
    arguments = parser.parse_args()
    if arguments.short:
        compile_quickly()
    run(arguments.out, SHORT if arguments.short else FULL, arguments.seeds[:1] if arguments.short else arguments.seeds)


if __name__ == "__main__":
    main()
