"""Several processes train and save, and other processes on another mesh resume, with the results of one process."""

import dataclasses
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed_process
import distributed_run
import distributed_values
import numpy as np
import pytest
from distributed_process import mesh
from helpers import environment, sweep

from lora_jax.checkpoint._fingerprint import fingerprint

SECONDS = 200  # a run that takes longer hangs


def start_processes(count: int, devices: int, root: Path, *tasks: str) -> list[subprocess.Popen[str]]:
    """Starts `distributed_process.py` in `count` processes with `devices` devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    program = [sys.executable, distributed_process.__file__, address, str(count)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([*program, str(index), str(root), *tasks], env=environment(XLA_FLAGS=flags), **pipes)
        for index in range(count)
    ]


def wait_for_processes(running: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Waits for processes; returns exit code, output and errors of each."""
    try:
        ended = [process.communicate(timeout=SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()  # closes the pipes
    return [(process.returncode, *texts) for process, texts in zip(running, ended, strict=True)]


def run_processes(count: int, devices: int, root: Path, *tasks: str) -> list[dict[str, Any]]:
    """The results of the tasks of each process."""
    ended = wait_for_processes(start_processes(count, devices, root, *tasks))
    assert [code for code, _, _ in ended] == [0] * count, "\n".join(errors[-2000:] for _, _, errors in ended)
    return [json.loads(output.splitlines()[-1]) for _, output, _ in ended]  # gloo also prints


@dataclasses.dataclass(frozen=True)
class Stages:
    """Runs of the same training, each from the checkpoint of the run before.

    Attributes:
      layouts: the layouts of the base.
      training: the report of the first process of each stage, by layout.
      results: the results of the other tasks from all processes.
    """

    layouts: tuple[str, ...]
    training: list[dict[str, Any]]
    results: dict[str, list[Any]]


def few_stages(root: Path) -> Stages:
    """Stages of two, one, two and one processes with one layout, and the other tasks of two processes."""
    first = run_processes(2, 2, root, "train:mixed:2x2:3")
    second = distributed_process.train(root, "mixed", "2x4", 5)
    damaged = Path(shutil.copytree(root / "mixed", root / "damaged" / "mixed"))
    for file in (damaged / "5" / "state" / "d").iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    third = run_processes(2, 2, root, "train:mixed:1x4:6", "values", "save", "export", "damaged:mixed:2x2")
    fourth = distributed_process.train(root, "mixed", "1x1", 7)
    results = {task.partition(":")[0]: [process[task] for process in third] for task in third[0]}
    training = [first[0]["train:mixed:2x2:3"], second, third[0]["train:mixed:1x4:6"], fourth]
    return Stages(("mixed",), training, results)


def many_stages(root: Path) -> Stages:
    names = "fsdp,data parallel"

    def processes(count: int, devices: int, shape: str, until: int) -> dict[str, Any]:
        task = f"train:{names}:{shape}:{until}"
        report: dict[str, Any] = run_processes(count, devices, root, task)[0][task]
        return report

    training = [processes(2, 4, "4x2", 3), processes(4, 1, "2x2", 5), processes(2, 2, "1x4", 6)]
    training += [distributed_process.train(root, names, shape, until) for shape, until in (("1x1", 7), ("2x4", 8))]
    return Stages(("fsdp", "data parallel"), training, {})


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return few_stages(tmp_path_factory.mktemp("few"))


@pytest.fixture(
    scope="module",
    params=[sweep("few"), pytest.param("many", marks=pytest.mark.slow)],
)
def stages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    """Few stages, or many with more processes and with all layouts."""
    yield request.getfixturevalue("few") if request.param == "few" else many_stages(tmp_path_factory.mktemp("many"))


def test_training_resumes_in_other_processes_bit_for_bit(stages: Stages) -> None:
    for layout in stages.layouts:
        reports = [stage[layout] for stage in stages.training]
        assert [report["restored"] for report in reports[1:]] == [report["saved"] for report in reports[:-1]]
        assert [report["single"] for report in reports[1:]] == [report["adapter"] for report in reports[1:]]
        ends = [[2, 3], [4, 5], [5, 6], [6, 7], [7, 8]]
        assert [report["steps"] for report in reports] == ends[: len(reports)]


def test_losses_match_one_device(stages: Stages, tmp_path: Path) -> None:
    until = stages.training[-1][stages.layouts[0]]["steps"][-1]
    expected = distributed_run.run(tmp_path, "fsdp", mesh("1x1"), until)[
        "losses"
    ]  # on one device all layouts are the same
    assert len(set(expected)) == until
    for layout in stages.layouts:
        losses = [loss for stage in stages.training for loss in stage[layout]["losses"]]
        np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.sweep
def test_all_processes_report_a_changed_file(few: Stages) -> None:
    for error in few.results["damaged"]:
        assert "Expected a complete checkpoint" in error
        assert re.search(r"'d/\w+' has changed", error)


@pytest.mark.sweep
def test_an_adapter_is_saved_while_a_manager_saves_in_the_background(few: Stages) -> None:
    """Both wait at barriers of Orbax, which refuses a barrier that is already waited at."""
    assert few.results["save"][0] == {"run": ["2"], "single": ["2"]}


@pytest.mark.sweep
@pytest.mark.parametrize("memory", ["device", "pinned_host"])
def test_kernels_sharded_over_processes_are_compared_on_their_devices(memory: str, few: Stages) -> None:
    for results in few.results["values"]:
        got = results[memory]
        assert got["fingerprint"] == fingerprint(distributed_values.make_base())
        assert got["restored"]
        assert got["another base"].endswith("to be the merge of `base` and the adapter; 2 of 2 leaves are not.")
        assert got["another start"].endswith("which was initialized from `params`; 1 kernels differ.")
        assert (got["rank as plain"], got["rank compact"]) == (4, 2)
        assert 0 < got["drift"] < 1e-5


@pytest.mark.sweep
def test_an_adapter_that_is_sharded_over_processes_is_exported_once(few: Stages) -> None:
    first, second = few.results["export"]
    assert first.pop("device") and second.pop("device") and first.pop("pinned_host") and second.pop("pinned_host")
    assert first["error"].startswith("Cannot write a PEFT adapter to ")
    assert second["error"].startswith("The first of 2 processes could not write a PEFT adapter to ")


def wait_for(step: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not step.exists() and time.monotonic() < deadline:
        time.sleep(0.002)


def newest(run: Path) -> int:
    return max((int(entry.name) for entry in run.iterdir() if entry.name.isdigit()), default=0)


@pytest.mark.sweep
def test_killed_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    """A process with eight devices is killed while it saves a step after the fourth, and another one resumes."""
    until = 12
    (process,) = start_processes(1, 8, tmp_path / "killed", f"train:fsdp:4x2:{until}")
    wait_for(tmp_path / "killed" / "fsdp" / "4")
    process.kill()
    assert wait_for_processes([process])[0][0] == -signal.SIGKILL
    resumed = distributed_run.run(tmp_path / "killed", "fsdp", mesh("4x2"), until)
    straight = distributed_run.run(tmp_path / "straight", "fsdp", mesh("4x2"), until)
    assert 1 <= len(resumed["losses"]) <= until - 4
    np.testing.assert_array_equal(resumed["losses"], straight["losses"][-len(resumed["losses"]) :])
    assert resumed["saved"] == straight["saved"]


@pytest.mark.slow
def test_processes_of_which_one_is_killed_leave_a_complete_checkpoint(tmp_path: Path) -> None:
    """One of two processes is killed at a random moment, then the other, which waits for it. Two new ones resume."""
    draw, until = random.Random(0), 1000
    expected = distributed_run.run(tmp_path / "straight", "fsdp", mesh("1x1"), until=60)["losses"]
    before, half = [], 0
    for _ in range(12):
        count = newest(tmp_path / "fsdp") if before else 0
        before.append(count)
        processes = start_processes(2, 2, tmp_path, f"train:fsdp:2x2:{until}")
        wait_for(tmp_path / "fsdp" / str(count + 2))
        time.sleep(draw.uniform(0, 0.3))
        draw.shuffle(processes)
        processes[0].kill()
        time.sleep(0.2)
        processes[1].kill()
        wait_for_processes(processes)
        half += any("orbax-checkpoint-tmp" in entry.name for entry in (tmp_path / "fsdp").iterdir())
        goes_on = newest(tmp_path / "fsdp")
        shutil.copytree(tmp_path / "fsdp", tmp_path / "copy" / "fsdp")
        losses = distributed_run.run(tmp_path / "copy", "fsdp", mesh("1x1"), until=goes_on + 1)["losses"]
        np.testing.assert_allclose(losses, expected[goes_on : goes_on + 1], rtol=1e-5)
        shutil.rmtree(tmp_path / "copy")
    print(f"{len(before)} kills of one of two processes, {half} left an incomplete step; steps {before}")
    assert before == sorted(set(before))
