"""Preference training (DPO) of SmolLM2-135M-Instruct: the reference policy is the same base, with the adapter off.

    python examples/dpo.py            # five minutes on two cores
    python examples/dpo.py --short    # every stage, with two layers and a few steps

Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290) raises the log-probability of a preferred answer
y⁺ over that of another answer y⁻, relative to a frozen reference:

    loss = −log σ(β·[log π(y⁺|x)/π₀(y⁺|x) − log π(y⁻|x)/π₀(y⁻|x)])

With LoRA, π is `lora(logits)(base, adapter, …)` and π₀ is `logits(base, …)`, so one copy of the base is in memory. Here
x is a question of TREC, y⁺ the kind of its answer, and y⁻ another kind.
"""

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import Array
from numpy.typing import NDArray

import lora_jax as lj
import qlora_smollm2 as qlora
import smollm2
import trec
import trec_text
from finetune_trec import BLUE, GRAY, compile_quickly, console, progress_bar

SPEC = {lj.targets.all_linear: lj.LoRA(rank=8, alpha=16)}
BETA = 0.1
PAIRS = 8  # of a batch
LENGTH = 60  # tokens; the few longer questions are left out
PEAK_LEARNING_RATE = 5e-4
SEED = 0


class Pairs(NamedTuple):
    """Chats with a preferred and another answer: `ids`, `at`, `targets` and `mask` as in `trec_text.Batch`.

    The arrays are of shape (2, pairs, …), the preferred answers first.
    """

    ids: NDArray[np.int32]
    at: NDArray[np.int32]
    targets: NDArray[np.int32]
    mask: NDArray[np.bool_]

    def __getitem__(self, rows: Any) -> "Pairs":  # type: ignore[override]
        return Pairs(*(array[:, rows] for array in tuple(self)))


class Scale(NamedTuple):
    """The size of a run."""

    layers: int
    steps: int
    test_pairs: int
    expected: float  # minimum fraction of held-out pairs whose preferred answer is the more likely one


FULL = Scale(smollm2.Sizes().layers, steps=40, test_pairs=160, expected=0.75)
SHORT = Scale(layers=2, steps=4, test_pairs=16, expected=0.0)


def log_likelihood(logits: Array, targets: Array, mask: Array) -> Array:
    """Returns the log-probability of each answer, `(chats,)`, from the logits at its tokens."""
    found = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return jnp.where(mask, found, 0).sum(-1)


def margins(apply: Any, pairs: Pairs) -> Array:
    """Returns log π(y⁺|x) − log π(y⁻|x) of each pair, `(pairs,)`; `apply` is `(ids, at) -> logits`."""
    ids, at, targets, mask = (array.reshape(-1, array.shape[-1]) for array in tuple(pairs))
    preferred, other = jnp.split(log_likelihood(apply(ids, at), targets, mask), 2)
    return preferred - other


def make_step(logits: Any, tx: optax.GradientTransformation) -> Any:
    """Returns one update of the adapter: `(adapter, opt_state, base, pairs) -> (adapter, opt_state, loss)`."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(adapter: Any, opt_state: Any, base: Any, pairs: Pairs) -> Any:
        reference = margins(functools.partial(logits, base), pairs)  # the adapter is off

        def loss_of(adapter: Any) -> Array:
            policy = margins(functools.partial(lj.lora(logits), base, adapter), pairs)
            return -jax.nn.log_sigmoid(BETA * (policy - reference)).mean()

        loss, gradient = jax.value_and_grad(loss_of)(adapter)
        updates, opt_state = tx.update(gradient, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state, loss

    return step


def make_pairs(questions: trec.Questions, task: trec_text.Task, tokenizer: Any, rng: np.random.Generator) -> Pairs:
    """Returns the questions that fit into `LENGTH`, each with its answer and another one of the task."""
    task = task._replace(lengths=(LENGTH, max(task.lengths)))
    answers = np.array(task.answers)
    labels = questions.labels
    others = [rng.choice(np.flatnonzero(answers != answers[label])) for label in labels]
    both = [trec_text.tokenize(questions._replace(labels=np.array(y)), task, tokenizer) for y in (labels, others)]
    lengths = np.array([[len(ids) for ids in texts.tokens.ids] for texts in both])
    kept = np.flatnonzero((lengths <= LENGTH).all(0))
    arrays = []
    for texts in both:
        tokens = trec.Tokens([texts.tokens.ids[row] for row in kept], texts.tokens.labels[kept])
        chats = texts._replace(tokens=tokens, prompts=texts.prompts[kept], lengths=(LENGTH,))
        batch = next(trec_text.ordered_batches(chats, len(kept)))
        arrays.append([array[np.argsort(batch.rows)] for array in tuple(batch)[:4]])
    return Pairs(*map(np.stack, zip(*arrays, strict=True)))


def run(out: Path, scale: Scale) -> dict[str, Any]:
    """Trains, evaluates on held-out pairs before and after, and writes results and a plot to `out`."""
    start, cpu = time.perf_counter(), time.process_time()
    data, tokenizer, rng = trec.read(), smollm2.load_tokenizer(), np.random.default_rng(SEED)
    task = trec_text.coarse(data.names)
    train, test = (make_pairs(questions, task, tokenizer, rng) for questions in (data.train, data.test))
    test = test[: scale.test_pairs]

    model = qlora.functions(qlora.first_layers(smollm2.load(remat=True), scale.layers))
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    adapter = lj.init(jax.random.key(SEED), base, SPEC, kernels=qlora.find_kernels(model))
    tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, PEAK_LEARNING_RATE, max(1, scale.steps // 8), scale.steps))
    opt_state = tx.init(adapter)
    step = make_step(model.logits, tx).lower(adapter, opt_state, base, train[:PAIRS]).compile()
    arguments = step.memory_analysis().argument_size_in_bytes
    of_base = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    console.print(f"arguments of the step: {arguments / 1e6:.0f} MB, of which the base {of_base / 1e6:.0f} MB, once")

    margins_of = jax.jit(
        lambda base, adapter, pairs: margins(functools.partial(lj.lora(model.logits), base, adapter), pairs)
    )

    def evaluate(adapter: Any) -> list[float]:
        batches = [test[at : at + PAIRS] for at in range(0, scale.test_pairs, PAIRS)]
        return np.concatenate([margins_of(base, adapter, batch) for batch in batches]).tolist()

    found = {"reference": evaluate(adapter)}  # B is zero: the adapter is off
    losses: list[float] = []
    with progress_bar("DPO", scale.steps * PAIRS) as bar:
        for _ in range(scale.steps):
            rows = rng.choice(train.ids.shape[1], PAIRS, replace=False)
            adapter, opt_state, loss = step(adapter, opt_state, base, train[rows])
            losses.append(float(loss))
            bar.set_postfix_str(f"loss {np.mean(losses[-8:]):.3f}", refresh=False)
            bar.update(PAIRS)
    found["after DPO"] = evaluate(adapter)

    right = {name: float(np.mean(np.array(values) > 0)) for name, values in found.items()}
    for name, fraction in right.items():
        console.print(
            f"{name}: the preferred answer is the more likely one for {fraction:.1%} of {scale.test_pairs} pairs"
        )
    results = {"loss": losses, "margins": found, "right": right, "arguments": arguments, "base": of_base}
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(found, out / "dpo.png")
    if arguments > 1.2 * of_base or right["after DPO"] < scale.expected:
        raise RuntimeError(f"Expected one base in memory, and {scale.expected:.0%} right; got {out / 'results.json'}.")
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    console.print(f"{out / 'dpo.png'}; {seconds:.0f} s in total, {cpu:.0f} s of CPU time", soft_wrap=True)
    return results


def draw(found: dict[str, list[float]], path: Path) -> None:
    """Plots the log-probability ratios of the held-out pairs, as PNG."""
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    edges = np.histogram_bin_edges(np.concatenate([*map(np.array, found.values())]), 40)
    for (name, values), color in zip(found.items(), (GRAY, BLUE), strict=True):
        axes.hist(values, edges, color=color, alpha=0.7, label=name)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("log π(y⁺|x) − log π(y⁻|x), nats")
    axes.set_ylabel("held-out pairs")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("dpo_output"), help="output folder (dpo_output)")
    parser.add_argument("--short", action="store_true", help="every stage, with two layers and a few steps")
    given = parser.parse_args()
    if given.short:
        compile_quickly()
    run(given.out, SHORT if given.short else FULL)


if __name__ == "__main__":
    main()
