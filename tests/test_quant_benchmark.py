"""The benchmark of quantized bases runs, at a tiny size."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import records
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
    assert records.Table("", benchmark.COLUMNS, rows).cell("NF4", "step").startswith("× ")


def test_temporary_bytes_are_shown_by_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SIZE", SIZE)
    monkeypatch.setattr(benchmark, "DEPTHS", (1, 2))
    monkeypatch.setattr(benchmark, "GROWING", ("dense", "NF4"))
    table = benchmark.growth(jax.devices()[0], jnp.float32)
    assert [*table.rows] == [f"{title}: {name}" for title in ("unrolled", "scan + remat") for name in ("dense", "NF4")]
    assert all(row["2 layers"] > 0 for row in table.rows.values())


def test_errors_are_those_of_the_formats() -> None:
    rows = benchmark.errors().rows
    found = {name: (float(row["bits per weight"]), float(row["relative error"])) for name, row in rows.items()}
    assert found["NF4, double"][0] < 4.13 < 4.5 == found["NF4"][0]
    assert found["Int8"][1] < found["Float8"][1] < found["NF4"][1] <= found["NF4, double"][1]


def test_all_methods_of_the_forms_exist() -> None:
    forms, models = importlib.import_module("forms"), importlib.import_module("models")
    case = models.case(TINY, scanned=False)
    assert all(make(case).trained is not None for make in forms.methods(models).values())
