"""Saves an adapter repeatedly and is killed while it saves. test_checkpoint.py runs it in a separate process.

`python checkpoint_killed.py events ROOT`: saves to ROOT/0, ROOT/1, …; the n-th save is killed before its n-th write.
`python checkpoint_killed.py timed ROOT SECONDS…`: saves to ROOT; each save is killed after its number of seconds.
`python checkpoint_killed.py many ROOT COUNT`: saves to ROOT COUNT times; none is killed.
`python checkpoint_killed.py full ROOT BYTES…`: saves to ROOT with a limit on the size of files; prints the errors.
`python checkpoint_killed.py room ROOT`: a run that has no space for its second step, gets space, and saves it again.
`python checkpoint_killed.py run KIND ROOT KILLS SEED`: a training run that saves at every step and is killed
KILLS times, each time at a random moment after it has resumed from its newest checkpoint. KIND is `async`, `sync` or
`single`, which uses `save` without a manager. Prints a line of JSON for each kill.

Commands separated by `--` run in order. JAX is imported once and each save runs in a fork, made before JAX starts its
threads. `many` and `room` start them and therefore come last.
"""

import itertools
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from helpers import bits

import lora_jax as lj
from lora_jax.checkpoint import AdapterRestore, AdapterSave, StateRestore, StateSave, restore, save

BASE = {"kernel": np.ones((500, 300), np.float32), "bias": np.ones(300, np.float32)}
WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def adapter(number: float) -> dict[str, lj.Adapter]:
    """An adapter filled with one number, so that a mixture of two checkpoints is noticed."""
    factors = {"a": np.full((500, 8), number, np.float32), "b": np.full((8, 300), number, np.float32)}
    return {
        "kernel": lj.Adapter(lj.LoRA(rank=8, alpha=16), "io", **factors),
        "bias": lj.Adapter(lj.Full(), "", value=np.full(300, number, np.float32)),
    }


def forked_save(path: Path, number: float, die_at: float = float("inf")) -> int:
    """Starts a save that kills its process before write number `die_at`."""
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


def wait(pid: int) -> bool:
    """Waits for a process; returns whether it was killed."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, -signal.SIGKILL):
        sys.exit(f"the save ended with {code}")
    return code != 0


def kill_at_every_write(root: Path) -> None:
    root.mkdir()
    wait(forked_save(root / "first", 1))
    for moment in itertools.count():
        shutil.copytree(root / "first", root / str(moment))
        if not wait(forked_save(root / str(moment), 2, die_at=moment)):
            return


def kill_after(root: Path, delays: list[float]) -> None:
    wait(forked_save(root, 0))
    for number, delay in enumerate(delays, 1):
        pid = forked_save(root, number)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        wait(pid)


def contents(step: int) -> tuple[dict[str, lj.Adapter], dict[str, Any]]:
    """The adapter and state of a run at a step: some hundred kilobytes of distinct values."""
    draw = np.random.default_rng(step).normal
    factors = {"a": draw(size=(500, 64)).astype(np.float32), "b": draw(size=(64, 300)).astype(np.float32)}
    part = lj.Adapter(lj.LoRA(rank=64, alpha=16), "io", **factors)
    return {"kernel": part}, {"mu": part, "step": step}


class Run:
    """The checkpoints of a run, by a `CheckpointManager` or by `save`."""

    def __init__(self, kind: str, root: Path) -> None:
        self.kind, self.root = kind, root
        if kind != "single":
            background = kind == "async"
            options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=background)
            self.manager = ocp.CheckpointManager(root, options=options)

    def restored(self) -> int:
        """The step of the newest checkpoint, −1 if there is none. Its contents are checked."""
        newest = newest_step(self.root)
        if newest == -1:
            return newest
        expected = contents(newest)
        if self.kind == "single":
            got: Any = restore(self.root, base=BASE), expected[1]
        else:
            items = {"adapter": AdapterRestore(base=BASE), "state": StateRestore(expected[1])}
            got = tuple(self.manager.restore(self.manager.latest_step(), args=ocp.args.Composite(**items)).values())
        assert bits(got) == bits(expected)
        return newest

    def save(self, step: int) -> None:
        adapter, state = contents(step)
        if self.kind == "single":
            save(self.root, adapter, base=BASE)
        else:
            items = {"adapter": AdapterSave(adapter, base=BASE), "state": StateSave(state)}
            self.manager.save(step, args=ocp.args.Composite(**items))


def newest_step(root: Path) -> int:
    """The newest step whose save is complete."""
    return max((int(entry.name) for entry in root.iterdir() if entry.name.isdigit()), default=-1)


def resume(kind: str, root: Path, report: int) -> None:
    """Resumes from the newest checkpoint and never returns; raises if the checkpoint is wrong."""
    run = Run(kind, root)
    step = run.restored()
    os.write(report, b"%d\n" % step)
    while True:
        step += 1
        run.save(step)


def kill_run(kind: str, root: Path, kills: int, seed: int) -> None:
    root.mkdir(parents=True)
    for delay in np.random.default_rng(seed).uniform(0, 0.6, size=kills + 1):
        newest = newest_step(root)
        half = any("orbax-checkpoint-tmp" in entry.name for entry in root.iterdir())
        source, report = os.pipe()
        if not (pid := os.fork()):
            resume(kind, root, report)
        os.close(report)
        with open(source) as answers:
            restored = int(answers.readline())
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
            assert wait(pid)
        print(json.dumps({"kind": kind, "newest": newest, "restored": restored, "half written": half}), flush=True)


def save_on_full_disk(root: Path, limits: list[int]) -> None:
    wait(forked_save(root, 1))
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


def run_out_of_room(root: Path) -> None:
    run = Run("async", root)
    with run.manager:
        for step, limit in ((0, resource.RLIM_INFINITY), (1, 1000), (1, resource.RLIM_INFINITY)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                run.save(step)
                run.manager.wait_until_finished()
            except ValueError as error:
                os.write(1, str(error).encode())
                wait_for_quiet(root)


def wait_for_quiet(root: Path) -> None:
    """Waits until no file changes for a second: Orbax raises for one array while it still writes the others."""
    before = None
    while before != (now := sorted(root.rglob("*"))):
        before = now
        time.sleep(1)


def execute(command: str, root: str, *rest: str) -> None:
    if command == "events":
        kill_at_every_write(Path(root))
    elif command == "timed":
        kill_after(Path(root), [float(delay) for delay in rest])
    elif command == "run":
        kill_run(root, Path(rest[0]), int(rest[1]), int(rest[2]))
    elif command == "room":
        run_out_of_room(Path(root))
    elif command == "full":
        save_on_full_disk(Path(root), [int(limit) for limit in rest])
    else:
        for number in range(int(rest[0])):
            save(root, adapter(number), base=BASE)


if __name__ == "__main__":
    words = sys.argv[1:]
    while words:
        end = words.index("--") if "--" in words else len(words)
        execute(*words[:end])
        words = words[end + 1 :]
