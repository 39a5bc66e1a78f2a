"""The benchmark of quantized bases runs, at a tiny size."""

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against.cases import decoder
from sizes import TINY

from lora_jax import quant

pytestmark = pytest.mark.sweep

benchmark = importlib.import_module("benchmarks.quant")
SIZE = dataclasses.replace(TINY, width=64, heads=2, hidden=128)


@pytest.mark.parametrize("scanned", [False, True])
def test_the_table_of_a_step_shows_fewer_bytes_for_a_quantized_base(
    scanned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "FORMATS", {"NF4": quant.NF4(), "Int8": quant.Int8()})
    case = decoder(SIZE, scanned=scanned)
    rows = benchmark.measure(case, jax.devices()[0], steps=2)
    assert rows["NF4"]["arguments"] < rows["Int8"]["arguments"] < rows["dense"]["arguments"]
    assert rows["NF4"]["FLOPs"] > rows["dense"]["FLOPs"]
    np.testing.assert_allclose(rows["Int8"]["first loss"], rows["dense"]["first loss"], rtol=1e-2)
    lines = benchmark.step_table(rows).splitlines()
    assert len(lines) == 2 + len(rows) and "×" in next(line for line in lines if "NF4" in line)


def test_temporary_bytes_are_shown_by_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SIZE", SIZE)
    monkeypatch.setattr(benchmark, "DEPTHS", (1, 2))
    monkeypatch.setattr(benchmark, "GROWING", ("dense", "NF4"))
    lines = benchmark.growth(jax.devices()[0], jnp.float32).splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == 2 * ["dense", "NF4"]


def test_errors_are_those_of_the_formats() -> None:
    rows: list[Any] = [line.split("|")[1:4] for line in benchmark.errors().splitlines()[2:]]
    found = {name.strip(): (float(bits), float(error)) for name, bits, error in rows}
    assert found["NF4, double"][0] < 4.13 < 4.5 == found["NF4"][0]
    assert found["Int8"][1] < found["Float8"][1] < found["NF4"][1] <= found["NF4, double"][1]


def test_all_methods_of_the_forms_exist() -> None:
    forms, models = importlib.import_module("forms"), importlib.import_module("models")
    case = models.case(TINY, scanned=False)
    assert all(make(case).trained is not None for make in forms.methods(models).values())
