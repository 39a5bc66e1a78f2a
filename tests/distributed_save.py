"""Calls `save` while a manager still saves in the background. test_distributed.py runs it.

Process 0 deletes the manager's old step slowly, so that the others wait for it in the background while all save.
"""

import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

import lora_jax as lj
from lora_jax.checkpoint import AdapterSave


def delete_slowly(event: str, args: tuple[Any, ...]) -> None:
    if event == "shutil.rmtree" and threading.current_thread() is not threading.main_thread():
        time.sleep(2)


def run(root: Path) -> dict[str, list[str]]:
    """Saves with a manager and with `save`; returns the steps that remain."""
    if jax.process_index() == 0:
        sys.addaudithook(delete_slowly)
    base = {"kernel": np.ones((4, 3), np.float32)}
    adapter = lj.init(jax.random.key(0), base, {"kernel": lj.LoRA(rank=2, alpha=4)})
    adapter = jax.tree.map(np.asarray, adapter)  # Orbax refuses arrays that only one process has
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager(root / "run", options=options) as manager:
        for step in range(3):
            manager.save(step, args=ocp.args.Composite(adapter=AdapterSave(adapter, base=base)))
            lj.save(root / "single", adapter, base=base)
            lj.restore(root / "single", base=base)
    return {name: [step.name for step in (root / name).iterdir()] for name in ("run", "single")}
