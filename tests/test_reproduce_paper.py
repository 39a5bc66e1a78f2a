"""The reproduction of the paper: budgets, resuming, statistics, tables, and the results in the docs."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import lora_jax as lj
import paper_configurations
import paper_report
import reproduce_paper
import trec
from paper_configurations import BUDGET, COMPARISONS, CONFIGURATIONS, MATRICES, budget_rank, factor_count

pytestmark = pytest.mark.sweep

SCALE = reproduce_paper.Scale(steps=2, seeds=(0,), tokens=12, test_questions=4, layers=6)


def tokens(count: int) -> trec.Tokens:
    return trec.Tokens([[101, 2054, 2003, 102]] * count, np.arange(count, dtype=np.int32))


DATA = reproduce_paper.Data(tokens(32), tokens(4))


@pytest.fixture(scope="module")
def shapes() -> Any:
    ids = np.zeros((1, 1), np.int32)
    return jax.eval_shape(reproduce_paper.MODEL.init, jax.random.key(0), ids, ids > 0)


@pytest.fixture(scope="module")
def kernels(shapes: Any) -> Any:
    ids = np.zeros((2, 12), np.int32)
    return lj.kernels(reproduce_paper.MODEL.apply, shapes, ids, ids == 0)


def adapter_of(spec: Any, shapes: Any, kernels: Any) -> dict[str, lj.Adapter]:
    return jax.eval_shape(lambda params: lj.init(jax.random.key(0), params, spec, kernels=kernels), shapes)


# Budgets.


@pytest.mark.parametrize("name", [name for name, configuration in CONFIGURATIONS.items() if configuration.rank])
def test_the_size_of_the_factors_matches_the_adapter(name: str, shapes: Any, kernels: Any) -> None:
    configuration = CONFIGURATIONS[name]
    adapter = adapter_of(configuration.spec, shapes, kernels)
    factors = sum(part.arrays[factor].size for part in adapter.values() if "a" in part.arrays for factor in ("a", "b"))
    assert factors == factor_count(configuration.matrices, configuration.rank)
    assert sum(map(reproduce_paper.is_head, adapter)) == 2


def test_every_choice_of_matrices_has_the_rank_nearest_to_the_budget() -> None:
    ranks = {matrices: budget_rank(matrices, BUDGET) for matrices in MATRICES}
    assert ranks == {"q": 72, "q, v": 36, "q, k, v, o": 18, "MLP": 14, "all": 8}
    for matrices, rank in ranks.items():
        off = [abs(factor_count(matrices, other) - BUDGET) for other in (rank - 1, rank, rank + 1)]
        assert off[1] == min(off)
        assert off[1] < 0.03 * BUDGET


def test_the_rank_is_at_least_1() -> None:
    assert budget_rank("all", 1) == 1


def test_full_trains_every_leaf_and_bitfit_the_biases_and_the_head(shapes: Any, kernels: Any) -> None:
    full, bias, probe = (adapter_of(CONFIGURATIONS[name].spec, shapes, kernels) for name in ("full", "bias", "probe"))
    assert sum(part.arrays["value"].size for part in full.values()) == sum(
        leaf.size for leaf in jax.tree.leaves(shapes)
    )
    assert set(bias) == {path for path in full if path.endswith("/bias") or reproduce_paper.is_head(path)}
    assert set(probe) == {path for path in full if reproduce_paper.is_head(path)}


def test_every_configuration_is_in_a_comparison_and_runs_once() -> None:
    assert {name for names in COMPARISONS.values() for name in names} == set(CONFIGURATIONS)
    settings = [json.dumps(c.settings() | {"name": "", "method": ""}) for c in CONFIGURATIONS.values()]
    assert len(set(settings)) == len(settings)


def test_the_rates_are_among_those_of_the_search() -> None:
    for name, rates in paper_configurations.GRID.items():
        assert CONFIGURATIONS[name].rate in rates


# Runs and resuming.


def test_the_head_and_the_rest_have_different_rates() -> None:
    params = {"classifier": {"bias": np.ones(50, np.float32)}, "encoder": {"bias": np.ones(3, np.float32)}}
    adapter = lj.init(jax.random.key(0), {"params": params}, {"**": lj.Full()})
    gradient = jax.tree.map(np.ones_like, adapter)
    scaled = reproduce_paper.scaled(gradient, rest=0.5, head=2.0)
    assert float(scaled["params/encoder/bias"].value[0]) == -0.5
    assert float(scaled["params/classifier/bias"].value[0]) == -2.0


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Replaces training by a function that records the configurations."""
    calls: list[tuple[str, int]] = []

    def train(configuration: Any, seed: int, *rest: Any) -> dict[str, Any]:
        calls.append((configuration.name, seed))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {"accuracy": 0.5}

    monkeypatch.setattr(reproduce_paper, "train", train)
    return calls


def runs(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    changed = dataclasses.replace(CONFIGURATIONS["lora-q"], **changes)
    wanted = [(folder / f"{seed}.json", changed, seed) for seed in (0, 1, 2)]
    return reproduce_paper.run_all(wanted, SCALE, DATA, lambda name, seed: None)


def test_a_killed_reproduction_runs_only_what_is_missing(tmp_path: Path, trained: list[tuple[str, int]]) -> None:
    with pytest.raises(KeyboardInterrupt):
        runs(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["0.json"]
    results = runs(tmp_path)
    assert trained == [("lora-q", seed) for seed in (0, 1, 1, 2)]
    assert [run["settings"]["seed"] for run in results] == [0, 1, 2]
    assert runs(tmp_path) == results
    assert len(trained) == 4


def test_a_result_of_other_settings_is_an_error(tmp_path: Path, trained: list[tuple[str, int]]) -> None:
    with pytest.raises(KeyboardInterrupt):
        runs(tmp_path)
    with pytest.raises(
        ValueError, match=r"0\.json has the .* other settings.*\n  rate: 0\.\d+ in the file, 7\.0 expected"
    ):
        runs(tmp_path, rate=7.0)
    assert len(trained) == 2


def test_an_incomplete_result_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"

    def killed(*names: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce_paper.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        reproduce_paper.write(path, {"settings": {}})
    assert reproduce_paper.finished(path, {}) is None


def test_means_over_layers_include_kernels_of_one_kind() -> None:
    found = {f"encoder/layer_{i}/attention/query/kernel": np.array([i, 2.0 * i]) for i in (1, 2)}
    assert reproduce_paper.over_layers(found) == {"query": [1.5, 3.0]}


# Statistics and tables.


def run(name: str, seed: int, wrong: list[int], questions: int = 4) -> dict[str, Any]:
    settings = reproduce_paper.settings(CONFIGURATIONS[name], seed, SCALE, DATA)
    assert settings["test_questions"] == questions
    return {
        "settings": settings,
        "accuracy": 1 - len(wrong) / questions,
        "wrong": wrong,
        "trained": 1234,
        "step_cpu_ms": 10.0 + seed,
    }


def test_an_accuracy_is_a_mean_and_a_standard_deviation() -> None:
    accuracy = paper_report.accuracy([run("lora-q", seed, list(range(seed))) for seed in (0, 1, 2)])
    assert accuracy == pytest.approx((75.0, 25.0))
    assert str(accuracy) == "75.0 ± 25.0"


def test_a_difference_is_paired_by_seed_and_question() -> None:
    reference = [run("lora-q", 0, [0, 1]), run("lora-q", 1, [0])]
    assert paper_report.difference(reference, reference) == (0.0, 0.0)
    # Seed 0 gains question 1, seed 1 loses question 2: by question 0, 50, -50, 0; by seed 25, -25.
    other = [run("lora-q", 0, [0]), run("lora-q", 1, [0, 2])]
    by_question, by_seed = np.std([0, 50, -50, 0], ddof=1) / 2, np.std([25, -25], ddof=1) / math.sqrt(2)
    assert paper_report.difference(other, reference) == pytest.approx((0.0, math.hypot(by_question, by_seed)))


def test_a_table_shows_each_configuration_against_the_first() -> None:
    results = {"runs": [run("full", seed, []) for seed in (1, 0)] + [run("lora-q", seed, [seed]) for seed in (0, 1)]}
    table = paper_report.comparison(results, ("lora-q", "full")).splitlines()
    rate = CONFIGURATIONS["lora-q"].rate
    assert table[2] == f"| LoRA on q | 72 | 1,234 | {rate:g} | 75.0, 75.0 | 75.0 ± 0.0 |  |  | 10 ms |"
    assert table[3].startswith("| full fine-tuning | – | 1,234 |")
    assert table[3].endswith("| 100.0, 100.0 | 100.0 ± 0.0 | 25.0 ± 14.4 | noise | 10 ms |")


@pytest.mark.parametrize(
    ("value", "error", "word"),
    [(2.1, 1.0, "higher"), (-2.1, 1.0, "lower"), (-1.9, 0.1, "noise"), (5.0, 2.6, "noise"), (3.0, math.nan, "noise")],
)
def test_a_difference_counts_if_it_is_two_points_and_twice_its_error(value: float, error: float, word: str) -> None:
    assert paper_report.verdict(paper_report.Estimate(value, error)) == word


def test_the_summary_classifies_every_difference() -> None:
    wrong = {"lora-q": [0], "full": [], "probe": [1], "bias": [0, 1, 2, 3]}
    results = {"runs": [run(name, seed, questions) for name, questions in wrong.items() for seed in (0, 1)]}
    assert paper_report.summary(results, ("lora-q", "full", "probe", "bias")) == (
        "**Compared with LoRA on q at rank 72.** Less accurate: biases only (BitFit) (−75.0 ± 25.0). "
        "No significant difference: full fine-tuning; linear probe."
    )


# The docs.


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    return json.loads(paper_report.STORED.read_text())


def test_the_page_shows_the_stored_results(stored: dict[str, Any]) -> None:
    page = paper_report.PAGE.read_text()
    assert page == paper_report.filled(page, stored)


def test_a_page_without_a_mark_for_a_table_is_an_error(stored: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Expected one section `<!-- ranks -->` … `<!-- end -->` in .*; got 0"):
        paper_report.filled(paper_report.PAGE.read_text().replace("<!-- ranks -->", ""), stored)


def test_stored_results_match_the_configurations(stored: dict[str, Any]) -> None:
    found = {(run["settings"]["name"], run["settings"]["seed"]): run["settings"] for run in stored["runs"]}
    seeds = {seed for _, seed in found}
    assert set(found) == {(name, seed) for name in CONFIGURATIONS for seed in seeds}
    assert seeds <= set(reproduce_paper.FULL.seeds)
    data = reproduce_paper.Data(tokens(4_882), tokens(500))
    for (name, seed), settings in found.items():
        assert settings == reproduce_paper.settings(CONFIGURATIONS[name], seed, reproduce_paper.FULL, data)


def test_the_figures_are_drawn(stored: dict[str, Any], tmp_path: Path) -> None:
    paper_report.draw(stored, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {paper_report.ACCURACIES, paper_report.SUBSPACES}
