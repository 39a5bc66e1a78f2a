"""Saves an adapter alone while a manager still saves in the background: run by test_distributed.py.

`python distributed_save.py ADDRESS COUNT INDEX ROOT`: as process INDEX of COUNT, which meet at ADDRESS. Process 0 takes
long to delete the manager's old step, so that the others wait for it in the background while all save.
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


if __name__ == "__main__":
    address, count, index, root = sys.argv[1:]
    jax.distributed.initialize(address, int(count), int(index))
    if jax.process_index() == 0:
        sys.addaudithook(delete_slowly)
    base = {"kernel": np.ones((4, 3), np.float32)}
    adapter = lj.init(jax.random.key(0), base, {"kernel": lj.LoRA(rank=2, alpha=4)})
    adapter = jax.tree.map(np.asarray, adapter)  # Orbax saves no array that lies in one process alone
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager(Path(root) / "run", options=options) as manager:
        for step in range(3):
            manager.save(step, args=ocp.args.Composite(adapter=AdapterSave(adapter, base=base)))
            lj.save(Path(root) / "alone", adapter, base=base)
            lj.restore(Path(root) / "alone", base=base)
