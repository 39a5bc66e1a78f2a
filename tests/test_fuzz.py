"""Random programs, each with adapted kernels against the same with formed ones; and what runs them, against JAX."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import sys

import pytest
from fuzz_run import Count, ProgramError, fuzzed
from tqdm import tqdm

FAST, SLOW = 80, 500  # programs of a run
RUNS = 44
WANTED = 20_000


@pytest.mark.parametrize("seed", range(4))
def test_programs_are_those_of_the_formed_kernels(seed: int) -> None:
    count = fuzzed(seed, FAST)
    assert len(count.programs) > 0.9 * FAST


@pytest.mark.slow
def test_twenty_thousand_programs_are_those_of_the_formed_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    count, failures = Count(), []
    spawn = multiprocessing.get_context("spawn")
    with (
        capsys.disabled(),
        concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=spawn, max_tasks_per_child=2) as workers,
        tqdm(total=RUNS * SLOW, unit=" programs", file=sys.stderr, smoothing=0) as bar,
    ):
        for run in concurrent.futures.as_completed(workers.submit(fuzzed, 1000 + seed, SLOW) for seed in range(RUNS)):
            try:
                count.add(run.result())
            except ProgramError as failure:
                failures.append(str(failure))
            bar.update(SLOW)
        print(f"\n{count}")
    assert not failures, "\n\n".join(failures)
    assert len(count.programs) >= WANTED
