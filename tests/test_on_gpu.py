"""The benchmark for GPUs runs at a tiny size on the CPU, and shows what does not run."""

import re

import on_gpu
import pytest


@pytest.mark.sweep
def test_the_short_mode_checks_the_laws_and_measures(capsys: pytest.CaptureFixture[str]) -> None:
    on_gpu.main(["--short"])
    out = capsys.readouterr().out
    laws = re.findall(r"^\| (.*?) \| (\S+e[+-]\d+) \| (\S+e[+-]\d+) \|$", out, re.MULTILINE)
    assert len(laws) == 5
    for name, result, gradient in laws:
        bound = 5e-2 if "bfloat16" in name else 1e-4
        assert float(result) < bound and float(gradient) < 2 * bound, name
    rows = dict(re.findall(r"^\| (LoRA by hand|lora\(\)) \| (.*) \|$", out, re.MULTILINE))
    losses = [row.split("|")[-1] for row in rows.values()]
    assert len(losses) == 2 and losses[0] == losses[1]


def test_the_table_is_relative_to_lora_by_hand_and_says_what_failed() -> None:
    found = {"by hand": on_gpu.Figures(0.02, 2_000_000_000, 3.0, 7.5), "lora": on_gpu.Figures(0.018, 10**9, 3.5, 7.5)}
    text = on_gpu.table(found | {"qwix": "ValueError: no"})
    assert "| LoRA by hand | 20.0 | 1.000 | 2.00 | 3.0 | 7.5000 |" in text
    assert "| lora() | 18.0 | 0.900 | 1.00 | 3.5 | 7.5000 |" in text
    assert "| Qwix | ValueError: no | | | | |" in text
