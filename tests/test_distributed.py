"""Several processes train, save, and go on as other processes on another mesh, as one process alone would."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import distributed_run
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

SECONDS = 200  # after which a run hangs


def processes(count: int, devices: int, root: Path, shape: str, until: int) -> list[tuple[int, str, str]]:
    """Runs `distributed_run.py` in so many processes of so many devices; gives exit code, output and errors of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
    program = [sys.executable, distributed_run.__file__, address, str(count)]
    running = [
        subprocess.Popen(
            [*program, str(index), str(root), shape, str(until)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    try:
        ended = [process.communicate(timeout=SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(running, ended, strict=True)]


def together(count: int, devices: int, root: Path, shape: str, until: int) -> dict[str, Any]:
    ended = processes(count, devices, root, shape, until)
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


@pytest.mark.parametrize("layout", distributed_run.LAYOUTS)
def test_the_losses_are_those_of_one_device(layout: str, stages: list[dict[str, Any]], tmp_path: Path) -> None:
    losses = [loss for stage in stages for loss in stage[layout]["losses"]]
    expected = alone(tmp_path, 1, 1, until=8)[layout]["losses"]
    assert len(set(expected)) == 8
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_training_that_is_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """A process with eight devices is killed as it saves step 5 of 10, and another goes on."""
    program = [sys.executable, distributed_run.__file__, "", "1", "0", str(tmp_path / "killed"), "4x2", "10"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + SECONDS
    while not (tmp_path / "killed" / "fsdp" / "4").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    resumed, straight = (
        distributed_run.run(tmp_path / name, "fsdp", mesh(4, 2), 10) for name in ("killed", "straight")
    )
    assert 1 <= len(resumed["losses"]) <= 6
    assert resumed["losses"] == straight["losses"][-len(resumed["losses"]) :]
    assert resumed["saved"] == straight["saved"]


def test_all_processes_name_a_file_that_has_changed(tmp_path: Path) -> None:
    alone(tmp_path, 1, 1, until=1)
    for file in (tmp_path / "data parallel" / "1" / "state" / "d").iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    for code, _, errors in processes(2, 1, tmp_path, "2x1", until=2):
        assert code != 0
        assert "CheckpointError: Expected a whole checkpoint" in errors
        assert f"'d/{file.name}' has changed" in errors
