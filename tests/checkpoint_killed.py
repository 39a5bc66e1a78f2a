"""Saves an adapter again and again, and is killed in the middle: run by test_checkpoint.py in a process of its own.

`python checkpoint_killed.py events ROOT`: saves to ROOT/0, ROOT/1, …, each killed just before another of its writes.
`python checkpoint_killed.py timed ROOT SECONDS…`: saves to ROOT, killed one after another after so many seconds.
`python checkpoint_killed.py many ROOT COUNT`: COUNT saves to ROOT, and none is killed.
`python checkpoint_killed.py full ROOT BYTES…`: saves to ROOT where no file can be longer; prints the errors.
`python checkpoint_killed.py room ROOT`: a run that finds no room for its second step; makes some, and saves it again.
`python checkpoint_killed.py run KIND ROOT KILLS SEED`: a run of training that saves at every step and is killed so
many times, at any moment after it has gone on from its newest checkpoint; KIND is `async`, `sync`, or `single` for
`save` alone. Prints a line of JSON for each kill.

Commands with `--` between them run one after another. JAX is imported once, and each save runs in a fork, made before
JAX has started anything; `many` and `room` start it, and come last.
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
    root.mkdir()
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


def numbers(step: int) -> tuple[dict[str, lj.Adapter], dict[str, Any]]:
    """What a run has come to at a step: some hundred kilobytes, no two of them alike."""
    draw = np.random.default_rng(step).normal
    factors = {"a": draw(size=(500, 64)).astype(np.float32), "b": draw(size=(64, 300)).astype(np.float32)}
    part = lj.Adapter(lj.LoRA(rank=64, alpha=16), "io", **factors)
    return {"kernel": part}, {"mu": part, "step": step}


class Run:
    """The checkpoints of a run, in a `CheckpointManager` or with `save` alone."""

    def __init__(self, kind: str, root: Path) -> None:
        self.kind, self.root = kind, root
        if kind != "single":
            background = kind == "async"
            options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=background)
            self.manager = ocp.CheckpointManager(root, options=options)

    def restored(self) -> int:
        """The step that the newest checkpoint is of, −1 if there is none; what it holds must be whole."""
        newest = complete(self.root)
        if newest == -1:
            return newest
        expected = numbers(newest)
        if self.kind == "single":
            got: Any = restore(self.root, base=BASE), expected[1]
        else:
            items = {"adapter": AdapterRestore(base=BASE), "state": StateRestore(expected[1])}
            got = tuple(self.manager.restore(self.manager.latest_step(), args=ocp.args.Composite(**items)).values())
        assert bits(got) == bits(expected)
        return newest

    def save(self, step: int) -> None:
        adapter, state = numbers(step)
        if self.kind == "single":
            save(self.root, adapter, base=BASE)
        else:
            items = {"adapter": AdapterSave(adapter, base=BASE), "state": StateSave(state)}
            self.manager.save(step, args=ocp.args.Composite(**items))


def complete(root: Path) -> int:
    """The newest step that is not marked as half written."""
    return max((int(entry.name) for entry in root.iterdir() if entry.name.isdigit()), default=-1)


def go_on(kind: str, root: Path, says: int) -> None:
    """Goes on from the newest checkpoint for ever, or, if there is anything wrong with it, ends."""
    run = Run(kind, root)
    step = run.restored()
    os.write(says, b"%d\n" % step)
    while True:
        step += 1
        run.save(step)


def kill_run(kind: str, root: Path, kills: int, seed: int) -> None:
    root.mkdir(parents=True)
    for delay in np.random.default_rng(seed).uniform(0, 0.6, size=kills + 1):
        newest = complete(root)
        half = any("orbax-checkpoint-tmp" in entry.name for entry in root.iterdir())
        hears, says = os.pipe()
        if not (pid := os.fork()):
            go_on(kind, root, says)
        os.close(says)
        with open(hears) as answers:
            restored = int(answers.readline())
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
            assert killed(pid)
        print(json.dumps({"kind": kind, "newest": newest, "restored": restored, "half written": half}), flush=True)


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


def run_out_of_room(root: Path) -> None:
    run = Run("async", root)
    with run.manager:
        for step, room in ((0, resource.RLIM_INFINITY), (1, 1000), (1, resource.RLIM_INFINITY)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            try:
                run.save(step)
                run.manager.wait_until_finished()
            except ValueError as error:
                os.write(1, str(error).encode())
                wait_for_quiet(root)


def wait_for_quiet(root: Path) -> None:
    """Until no file comes or goes for a second: Orbax says that one array failed while it still writes the others."""
    before = None
    while before != (now := sorted(root.rglob("*"))):
        before = now
        time.sleep(1)


def obey(command: str, root: str, *rest: str) -> None:
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
        obey(*words[:end])
        words = words[end + 1 :]
