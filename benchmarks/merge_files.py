"""Peak memory and time of merging an adapter into a model's files: `peft.merge_files`, and PEFT's own way in torch.

    python benchmarks/merge_files.py            # about a minute and 4 GB of disk, on a CPU; needs torch and peft

A Llama with random weights and an adapter of all linear layers are written first. Then each way runs in processes of
its own, in turn: PEFT loads the model and the adapter, calls `merge_and_unload` and `save_pretrained`.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


WAYS = {"lora_jax": merge_lora_jax, "PEFT": merge_peft}


def measure(way: str, root: Path, out: Path) -> None:
    """Prints the seconds and the peak memory, each without and with the imports."""
    start = time.perf_counter()
    __import__("lora_jax.peft" if way == "lora_jax" else "peft")
    imported, memory = time.perf_counter(), peak()
    WAYS[way](root, out)
    seconds = time.perf_counter() - imported
    print(json.dumps({"seconds": seconds, "import": imported - start, "peak": peak(), "imports": memory}))


def peak() -> float:
    """Returns the most memory that the process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def compare(root: Path) -> None:
    """Prints how many elements of one kernel are the sum in float32, rounded once."""
    from safetensors import safe_open

    def tensors(path: Path, name: str):
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name).float()

    name = "model.layers.0.mlp.up_proj"
    prefix, adapter = f"base_model.model.{name}", root / "adapter" / "adapter_model.safetensors"
    a, b = (tensors(adapter, f"{prefix}.lora_{factor}.weight") for factor in "AB")
    exact = tensors(root / "base" / "model.safetensors", f"{name}.weight") + 2 * b @ a
    for way in WAYS:
        merged = tensors(root / way / "model.safetensors", f"{name}.weight")
        share = float((merged == exact.bfloat16().float()).float().mean())
        print(f"{way}: {share:.2%} of the elements of {name} are the sum in float32, rounded once")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--way", choices=["write", "compare", *WAYS], help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way == "write":
        return write(args.root)
    if args.way == "compare":
        return compare(args.root)
    if args.way:
        return measure(args.way, args.root, args.root / args.way)
    with tempfile.TemporaryDirectory() as root:
        program = [sys.executable, __file__, "--root", root, "--way"]
        subprocess.run([*program, "write"], check=True, stderr=subprocess.DEVNULL)
        results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(args.runs):
            for way, some in results.items():
                subprocess.run(["rm", "-rf", f"{root}/{way}"], check=True)
                ran = subprocess.run([*program, way], check=True, capture_output=True, text=True)
                some.append(json.loads(ran.stdout.splitlines()[-1]))
        size = (Path(root) / "base" / "model.safetensors").stat().st_size / 1e9
        print(f"A model of {size:.2f} GB in bfloat16, rank 16 in all linear layers; the median of {args.runs} runs.\n")
        print("| | peak memory | of which imports | time | imports |")
        print("|---|---|---|---|---|")
        for way, some in results.items():
            median = {key: statistics.median(one[key] for one in some) for key in some[0]}
            print(
                f"| {way} | {median['peak']:.2f} GB | {median['imports']:.2f} GB | {median['seconds']:.1f} s | "
                f"{median['import']:.1f} s |"
            )
        print(flush=True)
        subprocess.run([*program, "compare"], check=True)


if __name__ == "__main__":
    main()
