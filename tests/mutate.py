"""Breaks one rule or formula at a time in a copy of the repository, and prints the test that fails.

`make mutate` runs it. A mutation that no test finds is a gap in the tests. Each text below must occur exactly once in
its file; otherwise the script exits, and the list must be updated.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]


class Mutation(NamedTuple):
    """A text of a file of the package, its replacement, and the tests that should fail, by name or path."""

    file: str
    old: str
    new: str
    tests: str

    @property
    def paths(self) -> list[str]:
        return [name if "/" in name else f"tests/test_{name}.py" for name in self.tests.split()]


MUTATIONS = [
    # Variants: scale, missing term, wrong gradient, wrong size.
    Mutation("_variants/lora.py", "self.alpha / self.rank", "self.alpha * self.rank", "lora_jax/_variants/lora.py"),
    Mutation("_variants/rslora.py", "math.sqrt(self.rank)", "self.rank", "lora_jax/_variants/rslora.py"),
    Mutation("_core/variant.py", '1 / math.sqrt(width(axes, kernel.shape, "i"))', "1.0", "init"),
    Mutation("_variants/dora.py", "lax.stop_gradient(norms(constant))", "norms(plain)", "dora"),
    Mutation("_core/norms.py", "(2 * wa + ", "(wa + ", "dora"),
    Mutation("_variants/adalora.py", 'return arrays["e"]', 'return jnp.abs(arrays["e"])', "adalora"),
    Mutation("_variants/vera.py", "math.sqrt(6 / fan_in)", "math.sqrt(3 / fan_in)", "vera"),
    Mutation("_variants/lora_bias.py", "self.scale * arrays", "arrays", "lora_bias"),
    Mutation("_variants/rows.py", "len(set(self.ids)) < len(self.ids)", "False", "rows"),
    # Mixtures: a weight, a scale, a norm, a sign, a check.
    Mutation(
        "_transform/contraction/routing.py", "thin.array, jnp.zeros_like(thin.array)", "thin.array, thin.array", "alora"
    ),
    Mutation("_transform/contraction/routing.py", "jnp.where(variance == 0, 1, variance)", "variance * 2", "mixtures"),
    Mutation("_variants/mixture.py", "np.array(self.scales) / first", "np.array(self.scales)", "mixtures"),
    Mutation("_variants/routers.py", "return centered / ", "return gate / ", "mixtures"),
    Mutation("_variants/routers.py", "jax.nn.softmax(logits, where=_in", "jax.nn.softmax(logits) * (_in", "mixtures"),
    Mutation("many/_mixture.py", "sign = -1 /", "sign = 1 /", "mixtures"),
    Mutation(
        "_transform/rules/shard_map.py", 'if kernel.roles[at] == "i" else moved', "if False else moved", "mixtures"
    ),
    # Rules: sign, axis, order, cast, missing term.
    Mutation("_transform/rules/scale.py", "scale=-moved.scale", "scale=moved.scale", "scalars"),
    Mutation("_transform/rules/shape.py", "return lax.rev(factor, [", "return (lambda x, _: x)(factor, [", "fuzz"),
    Mutation("_transform/lookup.py", "fill_value=0,  #", "fill_value=1,  #", "lookups"),
    Mutation(
        "_transform/rules/gather.py",
        "where(inside, total, fill_value)",
        "where(inside, y, fill_value) + low_rank",
        "lookups",
    ),
    Mutation("_transform/rules/gather.py", "indices.astype(jnp.int32)", "indices", "quant"),
    Mutation(
        "_transform/rules/concatenate.py",
        "(start, total - start - rank)",
        "(total - start - rank, start) if len(axes) > 2 else (0, total - rank)",
        "laws",
    ),
    Mutation(
        "_transform/contraction/conv.py",
        "thin._replace(array=thin.array * self.kernel.scale)",
        "thin",
        "laws",
    ),
    Mutation("_transform/contraction/conv.py", "* rank * self.groups", "* rank", "conv"),
    Mutation("_transform/rules/ragged.py", "thin.array * kernel.scale", "thin.array", "ragged"),
    Mutation("_transform/contraction/pair.py", "(plain + low_rank.array) *", "plain *", "pairs"),
    # Forms and the choice between them: missing term, wrong tangent, wrong cost.
    Mutation("_transform/contraction/forms.py", "(self.base + x) + self.low_rank", "self.base + x", "laws"),
    Mutation("_transform/contraction/forms.py", "lambda: base(dx, kernel)", "lambda: base(dx, primals[1])", "plan"),
    Mutation("_transform/contraction/forms.py", "apply_gain(x, gain.expand_to(contraction.x))", "x", "variants"),
    Mutation("_transform/contraction/costs.py", "(gradients.a + gradients.b) * costs.delta", "costs.delta", "plan"),
    Mutation("_transform/contraction/factored.py", "delta=2 * size(", "delta=size(", "plan"),
    # Control flow, `jit` and caches.
    Mutation("_transform/rules/loops.py", "[x.for_use(iteration) if", "[x if", "dropout"),
    Mutation("_transform/rules/loops.py", "reverse=reverse", "reverse=False", "control_flow"),
    Mutation("_transform/interpreter.py", "_fold_dropout(read(atom), number)", "read(atom)", "dropout"),
    Mutation(
        "_transform/rules/calls.py", "if donated and not isinstance(x, TrackedKernel)", "if donated", "control_flow"
    ),
    Mutation("_transform/cache.py", ", *params.items())", ")", "control_flow"),
    Mutation("_core/dropout.py", "x / (1 - self.rate)", "x", "dropout"),
    # Merging and its errors.
    Mutation("_merge/fold.py", "scale=-kernel.scale, gain=None", "scale=-kernel.scale", "dora"),
    Mutation("_merge/merge.py", "    if not untie:\n", "    if untie:\n", "merge"),
    Mutation("_core/attach.py", "    if got == expected:\n", "    if True:\n", "attach"),
    Mutation("_core/init.py", "key_for(key, path)", "key", "init"),
    # Initializations, optimizers, adaptive ranks.
    Mutation("_core/linalg.py", "jnp.sqrt(svd.s[..., :rank] / abs(scale))", "jnp.sqrt(svd.s[..., :rank])", "starts"),
    Mutation("_transform/statistics.py", "count = total(jnp.ones_like(x))", "count = total(x)", "starts"),
    Mutation("_transform/statistics.py", "y if weights is None else x_times_a(x, a).array", "y", "starts"),
    Mutation("starts/_activations.py", "(mean * mean.mT if centered else 0)", "0", "starts"),
    Mutation("starts/_corda.py", "return jnp.linalg.solve(c, a), b", "return a, b", "starts"),
    Mutation("optim/_precondition.py", "scale_of(part) ** 2", "scale_of(part)", "optim_factors"),
    Mutation("adaptive/_importance.py", "jnp.abs(one - other)", "one - other", "adaptive"),
    Mutation("adaptive/_schedule.py", "height * remaining**3", "height * remaining**2 * length", "adaptive"),
    # Quantized and offloaded bases: scale, order, offset, what is kept for the backward pass.
    Mutation("quant/_nf4.py", "abs(blocks).max(start + 1)", "blocks.max(start + 1)", "quant"),
    Mutation("quant/_nf4.py", "high << 4 | low", "low << 4 | high", "quant"),
    Mutation("quant/_double.py", "blocks.transpose(axes) + offset", "blocks.transpose(axes)", "quant"),
    Mutation("quant/_double.py", "position // BLOCK]", "position // BLOCK // 2]", "quant"),
    Mutation("_core/base.py", "return jax.checkpoint(use)", "return use", "quant"),
    Mutation("_core/base.py", "self.leaf.sliceable and self._is_elementwise", "self.leaf.sliceable", "base quant"),
    Mutation("quant/_requantize.py", "jnp.sum(left * update)", "jnp.sum(left * left)", "quant_merge"),
    Mutation(
        "starts/_quantized.py", "leaf.matrices - leaf.as_matrices(_dequantize(stored))", "leaf.matrices", "quant_starts"
    ),
    Mutation("optim/_offload.py", "return updates, _to_host(state)", "return updates, state", "offload"),
    # Checkpoints, shardings, reports.
    Mutation(
        "checkpoint/_fingerprint.py", '_digest(samples[path], was) != saved[path]["content"]', "False", "checkpoint"
    ),
    Mutation(
        "checkpoint/_checksums.py", "if _file_digest(directory / name) != digest", "if not digest", "checkpoint damage"
    ),
    Mutation("sharding.py", "None if axis in undivided else entry", "entry", "sharding"),
    Mutation("_report/flops.py", "return length * flops(", "return flops(", "flops"),
    Mutation("_transform/rules/gather.py", "flops=y.size * (2 *", "flops=y.size * (", "explain lookups"),
    # PEFT's files: a gap between values, a key twice, a file that is not regular, a scale.
    Mutation("peft/_safetensors.py", "first != end", "first < end", "peft"),
    Mutation("peft/_untrusted.py", "if name in found:", "if False:", "peft"),
    Mutation("peft/_untrusted.py", "stat.S_ISREG(before.st_mode)", "True", "untrusted_files"),
    Mutation("peft/_patterns.py", r"(?:.*\.)?(?:{pattern})$", "(?:.*)?(?:{pattern})$", "untrusted_files"),
    Mutation("peft/_read.py", "most * top.rank if stabilized else top.alpha", "top.alpha", "peft"),
]


def check(root: pathlib.Path) -> None:
    """Raises if a text does not occur exactly once, or a test file is missing."""
    wrong = []
    for mutation in MUTATIONS:
        count = (root / "lora_jax" / mutation.file).read_text().count(mutation.old)
        if count != 1:
            wrong.append(f"{mutation.file}: {mutation.old!r} occurs {count} times")
        wrong += [f"{name} is missing" for name in mutation.paths if not (root / name).exists()]
    if wrong:
        sys.exit("Expected each text exactly once; update the list:\n  " + "\n  ".join(wrong))


def run(copy: pathlib.Path, tests: list[str]) -> tuple[str, float]:
    """The first test that fails, or the tests that crash, or why none did, and the seconds of CPU time."""
    before = os.times()
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "--no-header", "-p", "no:cacheprovider"]
    environment = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache")} | os.environ | {"PYTHONPATH": str(copy)}
    ran = subprocess.run([*command, *tests], cwd=copy, env=environment, capture_output=True, text=True)
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    failed = re.search(r"^FAILED (\S.*?)(?: - .*)?$", ran.stdout, re.MULTILINE)
    if ran.returncode == 1 and failed:
        return failed[1], seconds
    if ran.returncode < 0:
        return f"{tests[0]}: the process was killed by signal {-ran.returncode}", seconds
    return "NOT FOUND" if ran.returncode == 0 else f"NO RESULT: {(ran.stdout + ran.stderr)[-300:]}", seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=pathlib.Path, default=ROOT, help="the repository to copy")
    parser.add_argument("--only", default="", help="run only mutations whose file or tests contain this text")
    options = parser.parse_args()
    check(options.root)
    chosen = [mutation for mutation in MUTATIONS if options.only in f"{mutation.file} {mutation.tests}"]
    missed = 0
    with tempfile.TemporaryDirectory() as directory:
        copy = pathlib.Path(directory) / "copy"
        shutil.copytree(options.root, copy, ignore=shutil.ignore_patterns(".git", ".venv*", ".*_cache", "__pycache__"))
        for number, mutation in enumerate(chosen, start=1):
            file = copy / "lora_jax" / mutation.file
            text = file.read_text()
            file.write_text(text.replace(mutation.old, mutation.new))
            found, seconds = run(copy, mutation.paths)
            file.write_text(text)
            missed += not found.startswith("tests/") and not found.startswith("lora_jax/")
            what = f"{mutation.file}: {mutation.old.strip()}  →  {mutation.new.strip()}"
            print(f"{number:2}  {what}\n    {found}  ({seconds:.0f} s)", flush=True)
    print(f"\n{len(chosen) - missed} of {len(chosen)} found")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
