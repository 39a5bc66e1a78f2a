"""Exports the demo's adapter to PEFT, and compares the predictions of both on TREC's test questions.

    make demo                                   # trains the adapter, in demo_output/; without it, it is trained here
    python examples/export_to_peft.py --torch-python .venv-oracle/bin/python
    python examples/export_to_peft.py --short …  # an adapter of a few steps, under a minute

PEFT and torch are in an environment of their own (`make test-oracle` makes one), where `export_to_peft_torch.py` loads
the adapter. Without `--torch-python`, the command for it is printed.
"""

import argparse
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

import finetune_trec as demo
import lora_jax as lj
import minilm
import trec
from finetune_trec import console
from lora_jax import peft

TOLERANCE = 1e-4  # of logits, which are as large as 10

# The model's names, and those of its torch counterpart: `transformers`' BertModel as `encoder`, a `classifier`.
MODULES = {
    "attention/query": ("attention.self.query", "ioo"),
    "attention/key": ("attention.self.key", "ioo"),
    "attention/value": ("attention.self.value", "ioo"),
    "attention/out": ("attention.output.dense", "iio"),
    "mlp/up": ("intermediate.dense", "io"),
    "mlp/down": ("output.dense", "io"),
}
MAPPING = {
    f"encoder/layer_{{i}}/{path}/kernel": peft.linear(f"encoder.encoder.layer.{{i}}.{module}", axes=axes)
    for path, (module, axes) in MODULES.items()
}
MAPPING |= peft.layer("classifier", "classifier")


def train(params: Any, scale: demo.Scale, tokens: trec.Tokens) -> Any:
    """Returns an adapter that is trained as in the demo."""
    data = trec.read().train
    questions = trec.Questions(data.texts[: scale.train_questions], data.labels[: scale.train_questions])
    example = next(trec.ordered_batches(tokens, demo.BATCH))
    kernels = lj.kernels(demo.MODEL.apply, params, example.ids, example.mask)
    adapter = lj.init(jax.random.key(demo.SEED + 1), params, demo.SPEC, kernels=kernels)
    return demo.train(params, adapter, scale, trec.tokenize(questions, scale.max_tokens), tokens)[0]


def export(out: Path, scale: demo.Scale, saved: Path) -> float:
    """Writes the adapter, the questions and their logits to `out`; returns the test accuracy."""
    params = demo.base_params()
    data = trec.read().test
    questions = trec.Questions(data.texts[: scale.test_questions], data.labels[: scale.test_questions])
    tokens = trec.tokenize(questions, scale.max_tokens)
    if scale is demo.FULL and saved.exists():
        console.print(f"The adapter of {saved}.", soft_wrap=True)
        adapter = lj.restore(saved, base=params)
    else:
        adapter = train(params, scale, tokens)
    weights = minilm.installed_file(minilm.DISTRIBUTION, minilm.WEIGHTS).parent
    peft.export(out / "adapter", adapter, MAPPING, base=params, base_name=str(weights))

    apply = jax.jit(lj.lora(demo.MODEL.apply))
    logits = demo.evaluate(lambda ids, mask: apply(params, adapter, ids, mask), tokens)
    (batch,) = trec.ordered_batches(tokens, len(tokens.ids), lengths=(scale.max_tokens,))
    np.savez(out / "questions.npz", ids=batch.ids, mask=batch.mask, labels=batch.labels, logits=logits)
    return demo.accuracy(logits, tokens.labels)


def report(out: Path, accuracy: float) -> None:
    """Prints the table of what both frameworks answer.

    Raises:
      RuntimeError: if they differ.
    """
    result = json.loads((out / "result.json").read_text())
    questions = np.load(out / "questions.npz")
    count, largest = len(questions["labels"]), np.abs(questions["logits"]).max()
    title = f"The same adapter on {count} test questions of TREC; logits up to {largest:.1f}"
    table = Table(title=title, title_justify="left")
    for column in ("", "lora_jax", "PEFT", "PEFT, merged"):
        table.add_column(column, justify="right" if column else "left")
    kinds = [result[name] for name in ("adapted", "merged")]
    table.add_row("test accuracy", f"{accuracy:.1%}", *(f"{kind['accuracy']:.1%}" for kind in kinds))
    table.add_row("same label as lora_jax", "", *(f"{count - kind['other_labels']} of {count}" for kind in kinds))
    table.add_row("largest difference of logits", "", *(f"{kind['difference']:.1e}" for kind in kinds))
    console.print(table)
    size = sum(file.stat().st_size for file in (out / "adapter").iterdir())
    console.print(f"{out / 'adapter'}: {size / 1e6:.2f} MB", soft_wrap=True)
    if any(kind["other_labels"] or not kind["difference"] <= TOLERANCE for kind in kinds):
        raise RuntimeError(f"Expected the same labels, and logits within {TOLERANCE}; got {result}.")


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description="Exports the demo's adapter to PEFT and compares the predictions.")
    parser.add_argument("--out", type=Path, default=Path("export_output"), help="output folder (export_output)")
    parser.add_argument("--adapter", type=Path, default=Path("demo_output/adapter"), help="demo_output/adapter")
    parser.add_argument("--torch-python", type=Path, help="a Python with torch, transformers and PEFT")
    parser.add_argument("--short", action="store_true", help="an adapter of a few steps, and few questions")
    arguments = parser.parse_args()
    if arguments.short:
        demo.compile_quickly()
    arguments.out.mkdir(parents=True, exist_ok=True)
    accuracy = export(arguments.out, demo.SHORT if arguments.short else demo.FULL, arguments.adapter)
    half = [str(Path(__file__).with_name("export_to_peft_torch.py")), str(arguments.out)]
    if arguments.torch_python is None:
        console.print(f"Exported. To load it with PEFT: {shlex.join(['python', *half])}", soft_wrap=True)
        return
    subprocess.run([str(arguments.torch_python), *half], check=True)
    report(arguments.out, accuracy)


if __name__ == "__main__":
    main()
