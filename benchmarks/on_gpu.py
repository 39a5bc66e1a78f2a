"""What LoRA costs on one GPU: a training step by hand, through `lora()`, with Qwix, in full, and with PEFT on PyTorch.

First the laws: on five small models the adapted function and its gradient are those of merged kernels. Then the step of
a decoder in bfloat16, its layers in a scan with remat and unrolled. Each method runs in a process of its own, so that
the peak of its memory is its own. Libraries that are not installed are left out; so is what does not fit in the time.

Usage:
    python benchmarks/on_gpu.py                        # at most 8 minutes on one GPU
    python benchmarks/on_gpu.py --short                # a minute on any machine, at a tiny size
    python benchmarks/on_gpu.py --one lora --scanned   # one method, as JSON
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from sizes import TINY, Size

LARGE = Size(layers=8, width=2048, heads=16, hidden=8192, vocabulary=32000, batch=4, length=1024, rank=16)
SECONDS = 450  # in which the last process starts
STEPS, WARM_UP = 10, 3


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a training step takes.

    Attributes:
      seconds: of a step; the median.
      peak: bytes of device memory in use at the same time, as the device counts them; where it does not, arguments,
        results and temporaries of the compiled program.
      compile: seconds to trace, lower and compile.
      loss: before the first step.
    """

    seconds: float
    peak: int
    compile: float
    loss: float


# The laws


def laws() -> list[tuple[str, float, float]]:
    """For five models the largest relative differences of result and gradient from those of merged kernels."""
    import jax
    import jax.numpy as jnp
    import models

    import lora_jax as lj

    size = dataclasses.replace(TINY, layers=1)
    cases: dict[str, tuple[Callable[..., Any], Any, Any, Any]] = {}
    for name, options in {
        "decoder": {"scanned": False},
        "decoder, scan + remat": {"scanned": True},
        "decoder, untied head": {"scanned": False, "tied": False},
        "decoder, bfloat16": {"scanned": True, "dtype": jnp.bfloat16},
    }.items():
        case = models.case(size, **options)
        cases[name] = models.plain(case.model), case.params, case.adapter, case.tokens
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 4, 8))
    spec = {"kernel": lj.LoRA(rank=2, alpha=4, axes="iiio")}
    adapter = jax.tree.map(lambda x: x + 0.1, lj.init(jax.random.key(1), {"kernel": kernel}, spec))
    images = jax.random.normal(jax.random.key(2), (2, 9, 9, 4))
    cases["convolution"] = (
        lambda params, x: jax.lax.conv_general_dilated(
            x, params["kernel"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        {"kernel": kernel},
        adapter,
        images,
    )
    rows = []
    with jax.default_matmul_precision("highest"):
        for name, (apply, params, adapter, inputs) in cases.items():
            functions = [lj.lora(apply), lambda params, ad, x, apply=apply: apply(lj.merge(params, ad), x)]
            found = [jax.jit(_value_and_gradient(function))(adapter, params, inputs) for function in functions]
            rows.append((name, *(_difference(*pair) for pair in zip(*found, strict=True))))
    return rows


def _value_and_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    import jax
    import jax.numpy as jnp

    def run(adapter: Any, params: Any, inputs: Any) -> Any:
        def loss(adapter: Any) -> Any:
            out = function(params, adapter, inputs).astype(jnp.float32)
            return jnp.sum(jnp.sin(out)), out

        gradient, out = jax.grad(loss, has_aux=True)(adapter)
        return out, gradient

    return run


def _difference(got: Any, expected: Any) -> float:
    """The largest difference of an array, relative to its largest element."""
    import jax
    import numpy as np

    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    wide = [(np.asarray(one, np.float64), np.asarray(other, np.float64)) for one, other in pairs]
    return max(float(np.max(np.abs(one - other)) / np.max(np.abs(other))) for one, other in wide)


# A step


def jax_step(method: str, size: Size, *, scanned: bool, dtype: str, steps: int) -> Figures:
    """Measures one method in JAX."""
    import jax
    import jax.numpy as jnp
    import models
    from timing import copied_args, jitted, timed

    case = models.case(size, scanned=scanned, dtype=jnp.dtype(dtype))
    if method == "qwix":
        from against.qwix_linen import build

        trained = build(_as_peers_see_it(case))
    else:
        makes = {"by hand": models.by_hand, "lora": models.through_lora, "full": models.full_fine_tuning}
        trained = makes[method](case)
    arguments = copied_args(trained)
    begin = time.perf_counter()
    program = jitted(trained).lower(*arguments, case.tokens).compile()
    compiled = time.perf_counter() - begin
    frozen, *state = arguments
    times, first = [], None
    for _ in range(WARM_UP + steps):
        seconds, (*state, loss) = timed(lambda state=state: program(frozen, *state, case.tokens))
        times.append(seconds)
        first = float(loss) if first is None else first
    memory, held = program.memory_analysis(), jax.local_devices()[0].memory_stats() or {}
    of_program = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    assert first is not None
    return Figures(statistics.median(times[WARM_UP:]), int(held.get("peak_bytes_in_use", of_program)), compiled, first)


def _as_peers_see_it(case: Any) -> Any:
    """The case as the comparison with other libraries has it."""
    from against.cases import Case, Factors
    from decoder import cross_entropy

    factors = {path: Factors(part.axes, part.a, part.b) for path, part in case.adapter.items()}
    return Case(case.model, case.params, factors, case.tokens, cross_entropy, case.model.size.rank)


def torch_step(method: str, size: Size, *, scanned: bool, dtype: str, steps: int) -> Figures:
    """Measures one method in PyTorch, eager, its blocks checkpointed instead of scanned."""
    import torch
    from against import torch_step as peers
    from against.values import tokens

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_device(device)
    build = {"torch by hand": peers.by_hand, "peft": peers.with_peft, "torch full": peers.decoder}[method]
    model = build(size, remat=scanned)
    for parameter in model.parameters():
        if not parameter.requires_grad or method == "torch full":
            parameter.data = parameter.data.to(getattr(torch, dtype))
    batch = torch.tensor(tokens(size.vocabulary, (size.batch, size.length)))
    training, times, first = peers.Training(model, batch), [], None
    with torch.autocast(device, getattr(torch, dtype)):
        for _ in range(WARM_UP + steps):
            begin = time.perf_counter()
            loss = training.step()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
            first = loss if first is None else first
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    assert first is not None
    return Figures(statistics.median(times[WARM_UP:]), peak, 0.0, first)


# The names of the methods, what each needs, and what measures it.
METHODS: dict[str, tuple[str, str | None, Callable[..., Figures]]] = {
    "by hand": ("LoRA by hand", None, jax_step),
    "lora": ("lora()", None, jax_step),
    "qwix": ("Qwix", "qwix", jax_step),
    "full": ("full fine-tuning", None, jax_step),
    "torch by hand": ("PyTorch: LoRA by hand", "torch", torch_step),
    "peft": ("PyTorch: PEFT", "peft", torch_step),
    "torch full": ("PyTorch: full fine-tuning", "torch", torch_step),
}
REFERENCE = "by hand"


def measured(method: str, *, scanned: bool, short: bool) -> Figures:
    """Measures a method in this process."""
    size, dtype = (dataclasses.replace(TINY, layers=1), "float32") if short else (LARGE, "bfloat16")
    return METHODS[method][2](method, size, scanned=scanned, dtype=dtype, steps=2 if short else STEPS)


def in_a_process(method: str, *, scanned: bool, seconds: float) -> Figures | str:
    """Measures a method in a process of its own; why not, if it fails."""
    command = [sys.executable, __file__, "--one", method, *(["--scanned"] if scanned else [])]
    # What JAX takes in advance would be counted as used.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return "took too long"
    if ran.returncode:
        return (ran.stderr.strip().splitlines() or ["failed"])[-1][:80]
    return Figures(**json.loads(ran.stdout.splitlines()[-1]))


def table(found: dict[str, Figures | str]) -> str:
    """The figures of one way to write the layers, as a table in Markdown; times relative to LoRA by hand."""
    lines = ["| | ms a step | × by hand | peak, GB | compile, s | loss |", "|---|---|---|---|---|---|"]
    reference = found.get(REFERENCE)
    for method, figures in found.items():
        name = METHODS[method][0]
        if isinstance(figures, str):
            lines.append(f"| {name} | {figures} | | | | |")
            continue
        ratio = f"{figures.seconds / reference.seconds:.3f}" if isinstance(reference, Figures) else "-"
        lines.append(
            f"| {name} | {1e3 * figures.seconds:.1f} | {ratio} | {figures.peak / 1e9:.2f} | {figures.compile:.1f} "
            f"| {figures.loss:.4f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Checks the laws, measures, and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a tiny size in float32, all in this process")
    parser.add_argument("--one", choices=METHODS, help="measure this method only, and print JSON")
    parser.add_argument("--scanned", action="store_true", help="with --one: the layers in a scan with remat")
    given = parser.parse_args(arguments)
    if given.one:
        print(json.dumps(dataclasses.asdict(measured(given.one, scanned=given.scanned, short=given.short))))
        return
    import jax

    begin = time.monotonic()
    device = jax.local_devices()[0]
    print(f"{device.device_kind}, JAX {jax.__version__}\n\n| model | result | gradient |\n|---|---|---|")
    for name, result, gradient in laws():
        print(f"| {name} | {result:.1e} | {gradient:.1e} |", flush=True)
    installed = [name for name, (_, needs, _) in METHODS.items() if needs is None or importlib.util.find_spec(needs)]
    for scanned in [True] if given.short else [True, False]:
        found: dict[str, Figures | str] = {}
        for method in [name for name in installed if name in ("by hand", "lora")] if given.short else installed:
            left = SECONDS - (time.monotonic() - begin)
            if given.short:
                found[method] = measured(method, scanned=scanned, short=True)
            else:
                found[method] = in_a_process(method, scanned=scanned, seconds=left) if left > 0 else "no time left"
        print(f"\n{'scan + remat' if scanned else 'unrolled'}\n\n{table(found)}", flush=True)


if __name__ == "__main__":
    main()
