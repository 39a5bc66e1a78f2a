"""QLoRA of SmolLM2-135M-Instruct: a decoder of 4 bits learns to name the kind of answer that a question asks for.

    make qlora                                  # outputs in qlora_output/, eight minutes on two cores
    python examples/qlora_smollm2.py            # the same without the Makefile's malloc options; slower
    python examples/qlora_smollm2.py --short    # every stage, with two layers and a few steps; about a minute

As in QLoRA (Dettmers et al. 2023, arXiv:2305.14314), the linear layers of the decoder are stored in NF4 with double
quantization, LoRA is on all of them, and the state of the optimizer is paged. The embedding, which is also the head,
stays in 16 bits, as in QLoRA: its rows are looked up, and rounding them changes input and logits of every token.

Stages: exact match, perplexity and generated texts before training; training on the answers only; the same after it;
the adapter is saved and restored; peak memory of a step of QLoRA, of 16-bit LoRA and of 16-bit full fine-tuning, each
measured in a process of its own.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from jax import Array
from numpy.typing import NDArray
from rich.table import Table
from tokenizers import Tokenizer

import lora_jax as lj
import smollm2
import trec
import trec_text
from finetune_trec import BLUE, GRAY, ORANGE, compile_quickly, console, draw_loss, progress_bar

SPEC = {lj.targets.all_linear: lj.LoRA(rank=8, alpha=16)}
FORMATS = {lj.targets.all_linear: lj.quant.NF4(block=64, double=True)}
SEED = 0
BATCH = 16
EVALUATION_BATCH = 32
ANSWER_TOKENS = 4  # of the longest answer, with the end of the message
LENGTHS = (53, 60)  # padded lengths in tokens; longer questions, 1 in 20, are left out
PEAK_LEARNING_RATE = 1e-3
WARM_UP = 0.1  # of all steps
METHODS = {"qlora": "QLoRA: NF4, double quantization", "lora": "LoRA: bfloat16", "full": "full fine-tuning: bfloat16"}
PROCESS = Path("/proc/self")
SAMPLES = (0, 2, 8)  # held-out questions whose answers are printed
CHAT = "What is the capital of France? Answer in one sentence."  # not of the task
# Prompts of any kind. In each batch, some of them with the answer of the model before training: with the task alone, it
# learns to answer everything with the kind of an answer.
CHATS = (
    "Hello! Who are you?",
    "Tell me about the moon.",
    "Write a short poem about autumn.",
    "What is a healthy breakfast?",
    "How do I learn to swim?",
    "Give me three tips for better sleep.",
    "Why is the sky blue?",
    "Tell me a short story about a dog.",
    "What is the largest planet?",
    "Translate 'good morning' into Spanish.",
    "Explain photosynthesis in simple words.",
    "Who painted the Mona Lisa?",
    "Recommend a book for a long journey.",
    "What can I cook with tomatoes and eggs?",
    "Where do penguins live?",
    "Thank you for your help!",
)
REHEARSED = 2  # of the chats of a batch


class Scale(NamedTuple):
    """The size of a run."""

    layers: int  # the number of decoder layers, from the first
    steps: int
    test_questions: int
    new_tokens: int  # at most, of the texts that are printed
    expected: float  # minimum exact match


FULL = Scale(smollm2.Sizes().layers, steps=64, test_questions=160, new_tokens=32, expected=0.6)
SHORT = Scale(layers=2, steps=8, test_questions=32, new_tokens=8, expected=0.0)


class Model(NamedTuple):
    """The decoder as functions of its parameters.

    Attributes:
      sizes: its sizes.
      logits: `(params, ids, at) -> logits`, as `Llama.__call__`.
      decode: `(params, ids, cache, at) -> (logits, cache)`, as `Llama.decode`.
      params: the parameters, or their shapes.
    """

    sizes: smollm2.Sizes
    logits: Callable[..., Array]
    decode: Callable[..., tuple[Array, smollm2.Cache]]
    params: Any


class Score(NamedTuple):
    """The result on held-out questions.

    Attributes:
      exact_match: the fraction of questions whose generated answer equals the expected one, token by token.
      perplexity: of the tokens of the expected answers, with the end of the message.
    """

    exact_match: float
    perplexity: float


class Training(NamedTuple):
    """The course of training: the loss of each batch, `(chats seen, value)`, and the tokens per second."""

    loss: list[tuple[int, float]]
    tokens_per_second: float


def functions(decoder: smollm2.Llama) -> Model:
    """Returns the functions of a decoder, also of `nnx.eval_shape`."""
    apply, params, rest = lj.nnx.functional(decoder)
    decode = lj.nnx.functional(decoder, method="decode").apply
    return Model(
        decoder.sizes,
        lambda params, *args: apply(params, rest, *args)[0],
        lambda params, *args: decode(params, rest, *args)[0],
        params,
    )


def abstract(sizes: smollm2.Sizes) -> smollm2.Llama:
    """Returns a decoder of shapes, with scanned and rematerialized layers."""
    return nnx.eval_shape(lambda: smollm2.Llama(sizes, remat=True, rngs=nnx.Rngs(params=0)))


def first_layers(decoder: smollm2.Llama, layers: int) -> smollm2.Llama:
    """Returns the decoder with its first layers only; its layers are scanned."""
    graph, shapes = nnx.split(abstract(dataclasses.replace(decoder.sizes, layers=layers)))
    return nnx.merge(graph, jax.tree.map(lambda leaf, like: leaf[: like.shape[0]], nnx.state(decoder), shapes))


def find_kernels(model: Model) -> Mapping[str, Any]:
    """Returns how the decoder uses each of its leaves."""
    return lj.kernels(model.logits, model.params, jax.ShapeDtypeStruct((1, 2), jnp.int32))


def stored(params: Any, kernels: Mapping[str, Any], method: str) -> Any:
    """Returns the base of one of `METHODS`: all leaves in bfloat16; for QLoRA, the linear layers in NF4."""
    if method == "qlora":
        params = lj.quant.quantize(params, FORMATS, kernels=kernels, donate=True)

    def in_bfloat16(leaf: Any) -> Any:
        return leaf if isinstance(leaf, lj.quant.QuantizedLeaf) else leaf.astype(jnp.bfloat16)

    return jax.tree.map(in_bfloat16, params, is_leaf=lambda leaf: isinstance(leaf, lj.quant.QuantizedLeaf))


def describe(params: Any) -> dict[str, float]:
    """Returns the weights and bytes of a quantized base, and its bytes if all leaves were in bfloat16."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, lj.quant.QuantizedLeaf))
    quantized = [leaf for leaf in leaves if isinstance(leaf, lj.quant.QuantizedLeaf)]
    weights, size = sum(math.prod(leaf.shape) for leaf in quantized), sum(leaf.nbytes for leaf in quantized)
    return {
        "weights": sum(math.prod(leaf.shape) for leaf in leaves),
        "quantized_weights": weights,
        "bits_per_quantized_weight": 8 * size / weights,
        "bytes": sum(leaf.nbytes for leaf in leaves),
        "quantized_bytes": size,
        "bytes_in_bfloat16": 2 * sum(math.prod(leaf.shape) for leaf in leaves),
    }


def optimizer(steps: int) -> optax.GradientTransformation:
    """Returns AdamW with warm-up and cosine decay."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK_LEARNING_RATE, max(1, int(WARM_UP * steps)), steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))


def make_step(
    logits: Callable[..., Array], tx: optax.GradientTransformation
) -> Callable[..., tuple[Any, optax.OptState, Array]]:
    """Returns one update: `(trained, opt_state, frozen, ids, at, targets, mask) -> (trained, opt_state, loss)`.

    Args:
      logits: `(trained, frozen, ids, at) -> logits` at the positions of the answers, the only ones in the loss.
      tx: the optimizer. `trained` and `opt_state` are donated.
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained: Any, opt_state: Any, frozen: Any, ids: Array, at: Array, targets: Array, mask: Array) -> Any:
        def loss_of(trained: Any) -> Array:
            return trec_text.cross_entropy(logits(trained, frozen, ids, at), targets, mask)

        loss, gradient = jax.value_and_grad(loss_of)(trained)
        updates, opt_state = tx.update(gradient, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, loss

    return step


def step_of(method: str, model: Model, kernels: Mapping[str, Any], base: Any, steps: int) -> tuple[Any, ...]:
    """Returns the step of one of `METHODS`, and what it trains, the state of the optimizer, and what is frozen."""
    tx = optimizer(steps)
    if method == "full":
        return make_step(lambda params, _, *args: model.logits(params, *args), tx), base, tx.init(base), ()
    if method == "qlora":
        tx = lj.optim.offload(tx)
    adapter = lj.init(jax.random.key(SEED), base, SPEC, kernels=kernels)
    adapted = lj.lora(model.logits)
    return make_step(lambda adapter, base, *args: adapted(base, adapter, *args), tx), adapter, tx.init(adapter), base


def make_generate(model: Model, new_tokens: int) -> Callable[..., Array]:
    """Returns greedy decoding, `(params, adapter, ids, lengths) -> generated`; see `smollm2.generate`."""

    def generate(params: Any, ids: Array, lengths: Array) -> Array:
        cache = smollm2.empty_cache(model.sizes, ids.shape[0], ids.shape[1] + new_tokens)
        return smollm2.generate(
            functools.partial(model.decode, params), jnp.asarray(ids), lengths, cache, new_tokens=new_tokens
        )

    return jax.jit(lj.lora(generate))


def make_evaluate(model: Model, texts: trec_text.Texts) -> Callable[[str, Any, Any], Score]:
    """Returns `(name, params, adapter) -> score` on all of `texts`, with a progress bar of that name."""
    adapted, generate = lj.lora(model.logits), make_generate(model, texts.answer_tokens)

    @jax.jit
    def total_loss(params: Any, adapter: Any, ids: Array, at: Array, targets: Array, mask: Array) -> Array:
        return trec_text.cross_entropy(adapted(params, adapter, ids, at), targets, mask) * mask.sum()

    def evaluate(name: str, params: Any, adapter: Any) -> Score:
        matches, loss, tokens = 0, 0.0, 0
        with progress_bar(name, len(texts.tokens.ids)) as bar:
            for batch in trec_text.ordered_batches(texts, EVALUATION_BATCH):
                generated = generate(params, adapter, *trec_text.without_answers(batch))
                matches += int(trec_text.exact_matches(np.asarray(generated), batch).sum())
                loss += float(total_loss(params, adapter, batch.ids, batch.at, batch.targets, batch.mask))
                tokens += int(batch.mask.sum())
                bar.update(len(batch.rows))
        return Score(matches / len(texts.tokens.ids), math.exp(loss / tokens))

    return evaluate


def pad(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Returns the tokens of prompts, `(prompts, tokens)`, padded at the end, and their lengths, `(prompts,)`."""
    ids = np.full((len(rows), max(map(len, rows))), smollm2.END, np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    return ids, np.array([len(tokens) for tokens in rows], np.int32)


def rehearsal(model: Model, base: Any, adapter: Any, tokenizer: Tokenizer) -> trec_text.Batch:
    """Returns `CHATS` with the first tokens of the model's answers, in the form of a batch of the shorter length."""
    ids, lengths = pad([tokenizer.encode(smollm2.chat(prompt)).ids for prompt in CHATS])
    answers = np.asarray(make_generate(model, ANSWER_TOKENS)(base, adapter, ids, lengths))
    kept = (answers != smollm2.END).sum(1) + 1  # the end repeats itself
    rows = [[*row[:n], *answer[:k]] for row, n, answer, k in zip(ids, lengths, answers, kept, strict=True)]
    texts = trec_text.Texts(trec.Tokens(rows, np.zeros(len(rows), np.int32)), lengths, LENGTHS, ANSWER_TOKENS)
    return next(trec_text.ordered_batches(texts, len(rows)))


def batches_with(chats: trec_text.Batch, texts: trec_text.Texts) -> Iterator[trec_text.Batch]:
    """Yields batches of one epoch after another, indefinitely; the last rows of each are some of `chats`."""
    rng = np.random.default_rng(SEED)
    while True:
        for batch in trec_text.training_batches(texts, BATCH - REHEARSED, rng):
            some = rng.choice(len(chats.ids), REHEARSED, replace=False)
            ids = np.pad(chats.ids[some], ((0, 0), (0, batch.ids.shape[1] - chats.ids.shape[1])))
            added = (ids, chats.at[some], chats.targets[some], chats.mask[some])
            yield trec_text.Batch(*map(np.concatenate, zip(batch[:4], added, strict=True)), batch.rows)


def train(
    step: Callable[..., tuple[Any, Any, Array]],
    adapter: Any,
    opt_state: Any,
    base: Any,
    batches: Iterator[trec_text.Batch],
    steps: int,
) -> tuple[Any, Training]:
    """Trains the adapter on the first batches.

    Returns:
      The adapter and the course of training. Padding and the steps that compile are not in the tokens per second.
    """
    loss, tokens, seconds, compiled = [], 0, 0.0, set()
    with progress_bar("QLoRA", steps * BATCH) as bar:
        for i, batch in enumerate(itertools.islice(batches, steps), start=1):
            start = time.perf_counter()
            arrays = (batch.ids, batch.at, batch.targets, batch.mask)
            adapter, opt_state, value = step(adapter, opt_state, base, *arrays)
            loss.append((i * BATCH, float(value)))
            if batch.ids.shape in compiled:
                seconds += time.perf_counter() - start
                tokens += int((batch.at[:, 0] + 1).sum() + batch.mask.sum())  # of prompts and answers
            compiled.add(batch.ids.shape)
            bar.set_postfix_str(f"loss {np.mean([value for _, value in loss[-8:]]):.3f}", refresh=False)
            bar.update(BATCH)
    return adapter, Training(loss, tokens / max(seconds, 1e-9))


def tokenize(questions: trec.Questions, task: trec_text.Task, tokenizer: Tokenizer, count: int | None = None) -> Any:
    """Returns the first `count` questions that fit into the longest of `LENGTHS`, or all of them, with their texts."""
    task = task._replace(lengths=(*LENGTHS, max(task.lengths)))
    lengths = [len(ids) for ids in trec_text.tokenize(questions, task, tokenizer).tokens.ids]
    rows = [row for row, length in enumerate(lengths) if length <= LENGTHS[-1]][:count]
    chosen = trec.Questions(tuple(questions.texts[row] for row in rows), questions.labels[rows])
    return chosen, trec_text.tokenize(chosen, task._replace(lengths=LENGTHS), tokenizer)


def resident(which: Literal["VmRSS", "VmHWM"]) -> float:
    """Returns the resident set of this process, or its peak since `restart_peak`, in bytes; NaN where not on Linux."""
    if not PROCESS.exists():
        return math.nan
    found = re.search(rf"{which}:\s+(\d+)", (PROCESS / "status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def restart_peak() -> None:
    """Returns the memory that the compiler has freed, and lets the peak of the resident set start anew."""
    with contextlib.suppress(AttributeError):  # not in every libc
        ctypes.CDLL(None).malloc_trim(0)
    if PROCESS.exists():
        (PROCESS / "clear_refs").write_text("5")


def measure(method: str, sizes: smollm2.Sizes, steps: int = 2) -> dict[str, float]:
    """Compiles and runs the training step of one of `METHODS`, and measures its memory. Runs in a process of its own.

    The base has the shapes of the published one, and constant values: neither memory nor time depend on them, and
    reading the file would take more memory than a step.

    Returns:
      `compiler`: bytes of arguments, results and temporaries, as the compiler allocates them; `resident`: the largest
      resident set of the process during the steps, in bytes; `resident_before`: its resident set before there is any
      array; `seconds` of the last step.
    """
    model = functions(abstract(sizes))
    kernels = find_kernels(model)
    shapes = jax.eval_shape(lambda params: stored(params, kernels, method), model.params)
    before = resident("VmRSS")
    base = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1 if leaf.dtype == jnp.uint8 else 0.01, leaf.dtype), shapes)
    step, trained, opt_state, frozen = step_of(method, model, kernels, base, steps=100)
    del base  # full fine-tuning donates it
    ids, at = (np.zeros((BATCH, width), np.int32) for width in (LENGTHS[-1], ANSWER_TOKENS))
    batch = ids, at, at, np.ones_like(at, bool)
    program = step.lower(trained, opt_state, frozen, *batch).compile()
    restart_peak()
    seconds = 0.0
    for _ in range(steps):
        start = time.perf_counter()
        trained, opt_state, loss = program(trained, opt_state, frozen, *batch)
        assert np.isfinite(loss)
        seconds = time.perf_counter() - start
    return {
        "compiler": bytes_of(program),
        "resident": resident("VmHWM"),
        "resident_before": before,
        "seconds": seconds,
    }


def bytes_of(program: Any) -> int:
    """Returns the bytes that a compiled program has at a time: arguments, results and temporaries, each once."""
    memory = program.memory_analysis()
    return sum(
        getattr(memory, f"{prefix}argument_size_in_bytes")
        + getattr(memory, f"{prefix}temp_size_in_bytes")
        + getattr(memory, f"{prefix}output_size_in_bytes")
        - getattr(memory, f"{prefix}alias_size_in_bytes")  # results in the memory of donated arguments
        for prefix in ("", "host_")
    )


def measure_all(out: Path, layers: int, *options: str) -> dict[str, dict[str, float]]:
    """Runs `measure` for each of `METHODS`."""
    # The default settings of malloc, with which freed memory is returned.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    results = {}
    for method, title in METHODS.items():
        console.print(f"Measuring a step of {title} …")
        arguments = ["--measure", method, "--layers", str(layers), "--out", str(out), *options]
        subprocess.run([sys.executable, __file__, *arguments], check=True, env=environment)
        results[method] = json.loads((out / f"memory_{method}.json").read_text())
    return results


def draw(training: Training, scores: Mapping[str, Score], majority: float, memory: Any, path: Path) -> None:
    """Plots the loss, both scores before and after training, and the memory of a step, as a PNG."""
    figure, ((loss, bars), (perplexity, used)) = plt.subplots(2, 2, figsize=(10.4, 7.2), layout="constrained")
    draw_loss(loss, training.loss)
    loss.set_xlabel("training chats seen")
    loss.set_title("training loss, nats per token of the answer", loc="left")

    names = list(scores)
    for axes, values, form in (
        (bars, [100 * score.exact_match for score in scores.values()], "{:.1f} %"),
        (perplexity, [score.perplexity for score in scores.values()], "{:,.2f}"),
    ):
        shown = axes.bar(names, values, width=0.55, color=[GRAY, ORANGE])
        axes.bar_label(shown, [form.format(value) for value in values])
    bars.set_ylim(0, 100)
    bars.axhline(100 * majority, color=GRAY, linewidth=1, linestyle="--")
    bars.annotate(f"most common answer {majority:.1%}", (0, 100 * majority), (4, 4), ("axes fraction", "data"),
                  "offset points", va="bottom", color=GRAY)  # fmt: skip
    bars.set_title("exact match on held-out questions (%)", loc="left")
    perplexity.set_yscale("log")
    perplexity.margins(y=0.1)
    perplexity.set_title("perplexity of held-out answers", loc="left")

    places = np.arange(len(memory))
    for offset, key, color, name in (
        (-0.2, "compiler", BLUE, "arrays of the step"),
        (0.2, "resident", GRAY, "resident set of the process"),
    ):
        values = [memory[method][key] / 1e6 for method in memory]
        shown = used.bar(places + offset, values, width=0.38, color=color, label=name)
        used.bar_label(shown, fmt="{:,.0f}")
    used.set_xticks(places, [METHODS[method].replace(": ", ":\n") for method in memory])
    used.legend(frameon=False, loc="upper left")
    used.set_title("peak memory of a training step (MB)", loc="left")
    for axes in (loss, bars, perplexity, used):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, axis="y")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run(out: Path, scale: Scale, *options: str) -> None:
    """Runs every stage; see the module's docstring. `options` are for the processes that measure memory."""
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    data, tokenizer = trec.read(), smollm2.load_tokenizer()
    task = trec_text.coarse(data.names)
    train_set, train_texts = tokenize(data.train, task, tokenizer)
    test_set, test_texts = tokenize(data.test, task, tokenizer, scale.test_questions)

    model = functions(first_layers(smollm2.load(remat=True), scale.layers))
    kernels = find_kernels(model)
    base = stored(model.params, kernels, "qlora")
    model = model._replace(params=None)  # deleted
    sizes = describe(base)
    console.print(
        f"SmolLM2-135M-Instruct, {scale.layers} layers, {sizes['weights'] / 1e6:.1f} M weights, on "
        f"{jax.default_backend()}\n"
        f"linear layers, {sizes['quantized_weights'] / 1e6:.1f} M weights: NF4 with double quantization, "
        f"{sizes['bits_per_quantized_weight']:.3f} bits per weight\n"
        f"base: {sizes['bytes_in_bfloat16'] / 1e6:.1f} MB in bfloat16, {sizes['bytes'] / 1e6:.1f} MB now",
        soft_wrap=True,
    )
    answers = [[task.answers[label] for label in questions.labels] for questions in (train_set, test_set)]
    usual = max(set(answers[0]), key=answers[0].count)
    majority = answers[1].count(usual) / len(answers[1])
    console.print(
        f"TREC: {len(answers[0]):,} training and {len(answers[1])} held-out questions, {len(set(task.answers))} "
        f"answers; {usual!r} is right for {majority:.1%}",
        soft_wrap=True,
    )

    step, adapter, opt_state, base = step_of("qlora", model, kernels, base, scale.steps)
    trainable = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    console.print(f"LoRA on all linear layers: {trainable / 1e6:.2f} M trainable parameters\n")
    evaluate = make_evaluate(model, test_texts)
    questions = [*(test_set.texts[row] for row in SAMPLES), CHAT]
    chats = [smollm2.chat(question, system=task.system) for question in questions[:-1]] + [smollm2.chat(CHAT)]
    ids, lengths = pad([tokenizer.encode(chat).ids for chat in chats])
    generate = make_generate(model, scale.new_tokens).lower(base, adapter, ids, lengths).compile()

    began = time.perf_counter()
    generated = [np.asarray(generate(base, adapter, ids, lengths))]  # the factors B are zero: this is the base
    decoding = count_tokens(generated[0]) / (time.perf_counter() - began)
    scores = {"before training": evaluate("Before", base, adapter)}
    batches = batches_with(rehearsal(model, base, adapter, tokenizer), train_texts)
    adapter, training = train(step, adapter, opt_state, base, batches, scale.steps)
    scores["after training"] = evaluate("After", base, adapter)
    generated.append(np.asarray(generate(base, adapter, ids, lengths)))

    lj.save(out / "adapter", adapter, base=base)
    restored = evaluate("Restored", base, lj.restore(out / "adapter", base=base))
    if restored != scores["after training"]:
        raise RuntimeError(f"Expected the restored adapter to score as the trained one, {scores}; got {restored}.")
    on_disk = sum(file.stat().st_size for file in (out / "adapter").rglob("*") if file.is_file())

    texts = [tokenizer.decode_batch(rows.tolist()) for rows in generated]
    samples = [dict(zip(("question", *scores), row, strict=True)) for row in zip(questions, *texts, strict=True)]
    memory = measure_all(out, scale.layers, *options)
    draw(training, scores, majority, memory, out / "qlora.png")
    results = {
        "base": sizes,
        "trainable_parameters": trainable,
        "majority_class": majority,
        "scores": {name: score._asdict() for name, score in scores.items()},
        "samples": samples,
        "training": training._asdict() | {"steps": scale.steps, "batch": BATCH},
        "decoded_tokens_per_second": decoding,
        "memory": memory,
        "adapter_bytes_on_disk": on_disk,
        "seconds": time.perf_counter() - start,
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    report(results)
    fell = np.mean([value for _, value in training.loss[-4:]]) < training.loss[0][1]
    if not fell or scores["after training"].exact_match < scale.expected:
        raise RuntimeError(
            f"Expected the loss to fall and an exact match of {scale.expected:.0%}; got {out}/results.json."
        )
    console.print(f"{out / 'qlora.png'}; {results['seconds']:.0f} s in total", soft_wrap=True)


def count_tokens(generated: NDArray[np.int32]) -> int:
    """Returns the number of tokens that were generated, each row's up to its first end of a message."""
    return int(np.minimum((generated != smollm2.END).sum(1) + 1, generated.shape[1]).sum())


def report(results: Mapping[str, Any]) -> None:
    """Prints the results as tables."""
    before, after = results["scores"]
    texts = Table(title="\nGenerated texts", title_justify="left", show_lines=True)
    for name in ("question", before, after):
        texts.add_column(name)
    for sample in results["samples"]:
        texts.add_row(*sample.values())
    console.print(texts)

    scores = Table(title="\nHeld-out questions", title_justify="left")
    for name in ("", before, after):
        scores.add_column(name, justify="right" if name else "left")
    both = list(results["scores"].values())
    scores.add_row("exact match", *(f"{score['exact_match']:.1%}" for score in both))
    scores.add_row("perplexity of the answers", *(f"{score['perplexity']:,.2f}" for score in both))
    console.print(scores)
    console.print(f"exact match of the most common answer: {results['majority_class']:.1%}")
    console.print(f"training: {results['training']['tokens_per_second']:.0f} tokens/s")
    console.print(f"decoding, {len(results['samples'])} rows: {results['decoded_tokens_per_second']:.0f} tokens/s")
    console.print(f"adapter on disk: {results['adapter_bytes_on_disk'] / 1e6:.1f} MB; restored, it scores the same")

    memory = Table(title=f"\nOne step, {BATCH} chats of {LENGTHS[-1]} tokens", title_justify="left")
    memory.add_column("")
    for name in ("memory, compiler", "resident set, peak", "time"):
        memory.add_column(name, justify="right")
    for method, row in results["memory"].items():
        sizes = (f"{row[key] / 1e6:,.0f} MB" for key in ("compiler", "resident"))
        memory.add_row(METHODS[method], *sizes, f"{row['seconds']:.1f} s")
    console.print(memory)


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("qlora_output"), help="output folder (qlora_output)")
    parser.add_argument("--short", action="store_true", help="every stage, with two layers and a few steps")
    parser.add_argument("--layers", type=int, help="only the first layers of the decoder")
    parser.add_argument("--steps", type=int, help="number of training steps")
    parser.add_argument("--measure", choices=METHODS, help="only measure the memory of a step")
    given = parser.parse_args()
    if given.short:
        compile_quickly()
    scale = SHORT if given.short else FULL
    scale = scale._replace(layers=given.layers or scale.layers, steps=given.steps or scale.steps)
    if given.measure:
        result = measure(given.measure, smollm2.Sizes(layers=scale.layers))
        (given.out / f"memory_{given.measure}.json").write_text(json.dumps(result) + "\n")
    else:
        run(given.out, scale, *(["--short"] if given.short else []))


if __name__ == "__main__":
    main()
