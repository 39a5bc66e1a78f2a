"""Peak memory and time of merging an adapter into a model's files: `peft.merge_files`, and PEFT's own way in torch.

    python benchmarks/merge_files.py            # about a minute and 4 GB of disk, on a CPU; needs torch and peft

A Llama with random weights and an adapter of all linear layers are written first. Then each way runs in processes of
its own, interleaved: PEFT loads the model and the adapter, calls `merge_and_unload` and `save_pretrained`.
"""

import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import records
from against.figures import progress

LLAMA = {
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "tie_word_embeddings": False,
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write(root: Path) -> None:
    """Writes the model and the adapter."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).to(torch.bfloat16)
    model.save_pretrained(root / "base")
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR, init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(root / "adapter")


def merge_lora_jax(root: Path, out: Path) -> None:
    from lora_jax import peft

    peft.merge_files(root / "base", root / "adapter", out)


def merge_peft(root: Path, out: Path) -> None:
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.bfloat16)
    peft.PeftModel.from_pretrained(model, root / "adapter").merge_and_unload().save_pretrained(out)


WAYS = {"PEFT": merge_peft, "lora_jax": merge_lora_jax}
COLUMNS = {"peak memory": "GB", "of which imports": "GB", "time": "×s", "imports": "×s"}
EXACT = "rounded once"


def measure(way: str, root: Path, out: Path) -> None:
    """Prints the seconds and the peak memory, each without and with the imports."""
    start = time.perf_counter()
    __import__("lora_jax.peft" if way == "lora_jax" else "peft")
    imported, memory = time.perf_counter(), peak()
    WAYS[way](root, out)
    seconds = time.perf_counter() - imported
    print(json.dumps(dict(zip(COLUMNS, (peak(), memory, seconds, imported - start), strict=True))))


def peak() -> float:
    """Returns the most memory that the process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def share_of_exact(root: Path) -> None:
    """Prints which share of the elements of one kernel is the sum in float32, rounded once, for each way."""
    from safetensors import safe_open

    def tensors(path: Path, name: str):
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name).float()

    name = "model.layers.0.mlp.up_proj"
    prefix, adapter = f"base_model.model.{name}", root / "adapter" / "adapter_model.safetensors"
    a, b = (tensors(adapter, f"{prefix}.lora_{factor}.weight") for factor in "AB")
    exact = (tensors(root / "base" / "model.safetensors", f"{name}.weight") + 2 * b @ a).bfloat16().float()
    merged = {way: tensors(root / way / "model.safetensors", f"{name}.weight") for way in WAYS}
    print(json.dumps({way: float((kernel == exact).float().mean()) for way, kernel in merged.items()}))


def tables(runs: int) -> Iterator[records.Table]:
    """Yields the table of both ways, each run in processes of its own, interleaved."""
    # The default settings of malloc, with which freed memory is returned.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    with tempfile.TemporaryDirectory() as root:

        def in_a_process(way: str) -> str:
            progress(way)
            command = [sys.executable, __file__, "--root", root, "--way", way]
            return subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout

        in_a_process("write")
        rows: dict[str, dict[str, Any]] = {way: {column: [] for column in COLUMNS} for way in WAYS}
        for _, (way, row) in itertools.product(range(runs), rows.items()):
            shutil.rmtree(Path(root, way), ignore_errors=True)
            for column, value in json.loads(in_a_process(way).splitlines()[-1]).items():
                row[column].append(value)
        for way, share in json.loads(in_a_process("compare").splitlines()[-1]).items():
            rows[way][EXACT] = f"{share:.2%}"
        size = Path(root, "base", "model.safetensors").stat().st_size / 1e9
        yield records.Table(f"A model of {size:.2f} GB in bfloat16", COLUMNS | {EXACT: ""}, rows)


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--way", choices=["write", "compare", *WAYS], help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way == "write":
        write(given.root)
    elif given.way == "compare":
        share_of_exact(given.root)
    elif given.way:
        measure(given.way, given.root, given.root / given.way)
    else:
        records.publish(tables(given.runs), given.json, "torch", "transformers", "peft")


if __name__ == "__main__":
    main()
