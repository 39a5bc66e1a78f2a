"""Saves an adapter again and again, and is killed in the middle: run by test_checkpoint.py in a process of its own.

`python checkpoint_killed.py events ROOT`: saves to ROOT/0, ROOT/1, …, each killed just before another of its writes.
`python checkpoint_killed.py timed ROOT SECONDS…`: saves to ROOT, killed one after another after so many seconds.
`python checkpoint_killed.py many ROOT COUNT`: COUNT saves to ROOT, and none is killed.
`python checkpoint_killed.py full ROOT BYTES…`: saves to ROOT where no file can be longer; prints the errors.

JAX is imported once, and each save runs in a fork, made before JAX has started anything.
"""

import itertools
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import lora_jax as lj
from lora_jax.checkpoint import save

BASE = {"kernel": np.ones((500, 300), np.float32), "bias": np.ones(300, np.float32)}
WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def adapter(number: float) -> dict[str, lj.Adapter]:
    """An adapter that is filled with one number, so that a mixture of two would show."""
    factors = {"a": np.full((500, 8), number, np.float32), "b": np.full((8, 300), number, np.float32)}
    return {
        "kernel": lj.Adapter(lj.LoRA(rank=8, alpha=16), "io", **factors),
        "bias": lj.Adapter(lj.Full(), "", value=np.full(300, number, np.float32)),
    }


def forked_save(path: Path, number: float, die_at: float = float("inf")) -> int:
    """Starts a save that kills itself just before it writes to the disk for the nth time."""
    if pid := os.fork():
        return pid
    count = itertools.count()

    def watch(event: str, args: tuple[Any, ...]) -> None:
        opens = event == "open" and "w" in (args[1] or "") and str(path) in str(args[0])
        if (opens or event in WRITES) and next(count) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    save(path, adapter(number), base=BASE)
    os._exit(0)


def killed(pid: int) -> bool:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, -signal.SIGKILL):
        sys.exit(f"the save ended with {code}")
    return code != 0


def kill_at_every_write(root: Path) -> None:
    killed(forked_save(root / "first", 1))
    for moment in itertools.count():
        shutil.copytree(root / "first", root / str(moment))
        if not killed(forked_save(root / str(moment), 2, die_at=moment)):
            return


def kill_after(root: Path, delays: list[float]) -> None:
    killed(forked_save(root, 0))
    for number, delay in enumerate(delays, 1):
        pid = forked_save(root, number)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        killed(pid)


def save_on_full_disk(root: Path, limits: list[int]) -> None:
    killed(forked_save(root, 1))
    for limit in limits:
        if pid := os.fork():
            os.waitpid(pid, 0)
            continue
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            save(root, adapter(2), base=BASE)
        except lj.CheckpointError as error:
            os.write(1, f"{error}\n\n".encode())
        os._exit(0)


if __name__ == "__main__":
    command, root, *rest = sys.argv[1:]
    if command == "events":
        kill_at_every_write(Path(root))
    elif command == "timed":
        kill_after(Path(root), [float(delay) for delay in rest])
    elif command == "full":
        save_on_full_disk(Path(root), [int(limit) for limit in rest])
    else:
        for number in range(int(rest[0])):
            save(root, adapter(number), base=BASE)
