"""Random programs match the same programs with merged kernels, and wrong or missing rules are found."""

from __future__ import annotations

import multiprocessing
import random
import sys

import fuzz
import fuzz_program as fp
import pytest
from fuzz_program import Dot, K, Leaf, Opaque, Program, Rev
from fuzz_run import Count, ProgramError, assert_program, fuzz_programs
from helpers import sweep_except
from jax import lax
from tqdm import tqdm

from lora_jax._core.stored import Change
from lora_jax._transform import registry as registry

FAST, SLOW = 50, 500  # programs per run
RUNS = 44
WANTED = 20_000
# Rules that no program uses; other tests do.
ELSEWHERE = {
    "all_gather",
    "closed_call",
    "compute_on",
    "eval_jaxpr",
    "pvary",
    "reduce_precision",
    "reshard",
    "shard_map",
    "sharding_constraint",
    "unstack",
}


@pytest.mark.parametrize("seed", sweep_except([0], range(4)))
def test_programs_match_merged_kernels(seed: int) -> None:
    count = fuzz_programs(seed, FAST)
    assert len(count.programs) > 0.9 * FAST


def run_slow(seed: int) -> Count | str:
    """One slow run, in a separate process: its counts, or the error."""
    try:
        return fuzz_programs(seed, SLOW)
    except ProgramError as error:
        return str(error)


@pytest.mark.slow
def test_twenty_thousand_programs_match_merged_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    count, failures = Count(), []
    # A worker exits after a few runs to free what it compiled. (`ProcessPoolExecutor` can hang when workers exit.)
    workers = multiprocessing.get_context("spawn").Pool(maxtasksperchild=4)
    with capsys.disabled(), workers, tqdm(total=RUNS * SLOW, unit=" programs", file=sys.stderr, smoothing=0) as bar:
        for run in workers.imap_unordered(run_slow, range(1000, 1000 + RUNS)):
            if isinstance(run, Count):
                count.add(run)
            else:
                failures.append(run)
            bar.update(SLOW)
        print(f"\n{count}")
    assert not failures, "\n\n".join(failures)
    different = len(count.programs)
    assert different >= WANTED
    assert set(registry.RULES) - set(count.rules) <= ELSEWHERE


def test_a_program_prints_as_the_expression_that_constructs_it() -> None:
    for seed in range(50):
        program = fuzz.Drawing(random.Random(seed)).program()
        assert eval(repr(program), vars(fp)) == program


REVERSED = Program((("w0", Leaf((3, 2), "io")),), (2,), (Dot(K("w0", (Rev((0,)),)), (3,), (((0,), (0,)), ((), ()))),))


def test_a_rule_that_leaves_the_factors_unchanged_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_program(REVERSED)

    def rev_base_only(site: object, kernel: object, *, dimensions: tuple[int, ...]) -> object:
        return kernel.moved(Change(lax.rev, (dimensions,)), kernel.roles, lambda factor, before, after: factor)

    monkeypatch.setitem(registry.RULES, "rev", ("moved", rev_base_only))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_program(REVERSED)


def test_a_missing_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(registry.RULES, "rev")
    with pytest.raises(AssertionError, match="refused, though all its steps have rules"):
        assert_program(REVERSED)


def test_a_use_without_a_rule_must_be_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    program = Program((("w0", Leaf((3, 2), "io")),), (2,), (Opaque("exp", K("w0")),))
    count = Count()
    assert_program(program, count)
    assert count.refused == {"exp": 1}
    monkeypatch.setitem(fp.OPAQUE, "exp", lambda w: w[0, 0])
    with pytest.raises(AssertionError, match="not refused at"):
        assert_program(program)
    monkeypatch.setitem(fp.OPAQUE, "exp", lambda w: w + 1)
    with pytest.raises(AssertionError, match="refused, but not at `exp`"):
        assert_program(program)
