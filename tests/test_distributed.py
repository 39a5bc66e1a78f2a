"""Several processes train, save, and go on as other processes on another mesh, as one process alone would."""

import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import distributed_run
import distributed_save
import jax
import numpy as np
import pytest
from helpers import environment
from jax.sharding import AxisType, Mesh

SECONDS = 200  # after which a run hangs


def begin(count: int, devices: int, root: Path, shape: str, until: int) -> list[subprocess.Popen[str]]:
    """Starts `distributed_run.py` in so many processes of so many devices."""
    return begin_program(distributed_run.__file__, count, devices, str(root), shape, str(until))


def begin_program(file: str, count: int, devices: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """Starts a program in so many processes of so many devices, as `ADDRESS COUNT INDEX`, then its own arguments."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    program = [sys.executable, file, address, str(count)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([*program, str(index), *arguments], env=environment(XLA_FLAGS=flags), **pipes)
        for index in range(count)
    ]


def end(running: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Waits for processes; gives exit code, output and errors of each."""
    try:
        ended = [process.communicate(timeout=SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()  # closes its pipes
    return [(process.returncode, *texts) for process, texts in zip(running, ended, strict=True)]


def together(count: int, devices: int, root: Path, shape: str, until: int) -> dict[str, Any]:
    ended = end(begin(count, devices, root, shape, until))
    assert [code for code, _, _ in ended] == [0] * count, "\n".join(errors[-2000:] for _, _, errors in ended)
    report: dict[str, Any] = json.loads(ended[0][1].splitlines()[-1])  # gloo prints, too
    return report


def mesh(data: int, model: int) -> Mesh:
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def alone(root: Path, data: int, model: int, until: int) -> dict[str, Any]:
    return {name: distributed_run.run(root, name, mesh(data, model), until) for name in distributed_run.LAYOUTS}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One run after another of the same training, each from what the one before it has saved."""
    root = tmp_path_factory.mktemp("stages")
    return [
        together(2, 4, root, "4x2", until=3),
        together(4, 1, root, "2x2", until=5),
        together(2, 2, root, "1x4", until=6),
        alone(root, 1, 1, until=7),
        alone(root, 2, 4, until=8),
    ]


@pytest.mark.parametrize("layout", distributed_run.LAYOUTS)
def test_training_goes_on_in_other_processes_bit_for_bit(layout: str, stages: list[dict[str, Any]]) -> None:
    reports = [stage[layout] for stage in stages]
    assert [report["restored"] for report in reports[1:]] == [report["saved"] for report in reports[:-1]]
    assert [report["alone"] for report in reports[1:]] == [report["adapter"] for report in reports[1:]]
    assert [report["steps"] for report in reports] == [[2, 3], [4, 5], [5, 6], [6, 7], [7, 8]]


def test_the_losses_are_those_of_one_device(stages: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = distributed_run.run(tmp_path, "fsdp", mesh(1, 1), until=8)["losses"]  # where all layouts are one
    assert len(set(expected)) == 8
    for layout in distributed_run.LAYOUTS:
        losses = [loss for stage in stages for loss in stage[layout]["losses"]]
        np.testing.assert_allclose(losses, expected, rtol=1e-5)


def wait_for(step: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not step.exists() and time.monotonic() < deadline:
        time.sleep(0.002)


def newest(run: Path) -> int:
    return max((int(entry.name) for entry in run.iterdir() if entry.name.isdigit()), default=0)


def test_training_that_is_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """A process with eight devices is killed as it saves one of the steps after the fourth, and another goes on."""
    until = 25
    (process,) = begin(1, 8, tmp_path / "killed", "4x2", until)
    wait_for(tmp_path / "killed" / "fsdp" / "4")
    process.kill()
    assert end([process])[0][0] == -signal.SIGKILL
    resumed = distributed_run.run(tmp_path / "killed", "fsdp", mesh(4, 2), until)
    straight = distributed_run.run(tmp_path / "straight", "fsdp", mesh(4, 2), until)
    assert 1 <= len(resumed["losses"]) <= until - 4
    np.testing.assert_array_equal(resumed["losses"], straight["losses"][-len(resumed["losses"]) :])
    assert resumed["saved"] == straight["saved"]


@pytest.mark.slow
def test_processes_of_which_one_is_killed_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    """One of two is killed at any moment, then the other, which waits for it; two new ones go on."""
    draw, until = random.Random(0), 1000
    expected = distributed_run.run(tmp_path / "straight", "fsdp", mesh(1, 1), until=60)["losses"]
    before, half = [], 0
    for _ in range(12):
        count = newest(tmp_path / "fsdp") if before else 0
        before.append(count)
        processes = begin(2, 2, tmp_path, "2x2", until)
        wait_for(tmp_path / "fsdp" / str(count + 2))
        time.sleep(draw.uniform(0, 0.3))
        draw.shuffle(processes)
        processes[0].kill()
        time.sleep(0.2)
        processes[1].kill()
        end(processes)
        half += any("orbax-checkpoint-tmp" in entry.name for entry in (tmp_path / "fsdp").iterdir())
        goes_on = newest(tmp_path / "fsdp")
        shutil.copytree(tmp_path / "fsdp", tmp_path / "copy" / "fsdp")
        losses = distributed_run.run(tmp_path / "copy", "fsdp", mesh(1, 1), until=goes_on + 1)["losses"]
        np.testing.assert_allclose(losses, expected[goes_on : goes_on + 1], rtol=1e-5)
        shutil.rmtree(tmp_path / "copy")
    print(f"{len(before)} kills of one of two processes, {half} left a step half written; steps {before}")
    assert before == sorted(set(before))


def test_all_processes_name_a_file_that_has_changed(tmp_path: Path) -> None:
    alone(tmp_path, 1, 1, until=1)
    for file in (tmp_path / "data parallel" / "1" / "state" / "d").iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    for code, _, errors in end(begin(2, 1, tmp_path, "2x1", until=2)):
        assert code != 0
        assert "CheckpointError: Expected a whole checkpoint" in errors
        assert f"'d/{file.name}' has changed" in errors


def test_an_adapter_is_saved_while_a_manager_saves_in_the_background(tmp_path: Path) -> None:
    """Both meet the other processes at barriers of Orbax's; one would be refused where the other waits already."""
    ended = end(begin_program(distributed_save.__file__, 2, 1, str(tmp_path)))
    assert [code for code, _, _ in ended] == [0, 0], "\n".join(errors[-2000:] for _, _, errors in ended)
    assert [step.name for name in ("run", "alone") for step in (tmp_path / name).iterdir()] == ["2", "2"]
