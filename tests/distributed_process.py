"""One of several processes that perform tasks together. test_distributed.py runs it.

`python distributed_process.py ADDRESS COUNT INDEX ROOT TASK…`: process INDEX of COUNT, which connect to ADDRESS and
write to ROOT. Prints the results of all tasks as one line of JSON.

`train:LAYOUTS:SHAPE:UNTIL`: `distributed_run` on a mesh of SHAPE, such as `4x2`, from a checkpoint if there is one
`damaged:LAYOUT:SHAPE`: the same from a damaged checkpoint in ROOT/damaged; returns the error
`save`: `distributed_save`, in ROOT/save
`values`: `distributed_values`
`export`: `distributed_export`, in ROOT/export
"""

import json
import sys
from pathlib import Path
from typing import Any

import distributed_export
import distributed_run
import distributed_save
import distributed_values
import jax
from jax.sharding import AxisType, Mesh

import lora_jax as lj


def mesh(shape: str) -> Mesh:
    sizes = tuple(map(int, shape.split("x")))
    devices = jax.devices()[: sizes[0] * sizes[1]]
    return jax.make_mesh(sizes, ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def train(root: Path, layouts: str, shape: str, until: int) -> dict[str, Any]:
    return {name: distributed_run.run(root, name, mesh(shape), until) for name in layouts.split(",")}


def damaged(root: Path, layout: str, shape: str) -> str:
    try:
        distributed_run.run(root / "damaged", layout, mesh(shape), until=1000)
    except lj.CheckpointError as error:
        return str(error)
    return "nothing"


def perform(root: Path, task: str) -> Any:
    match task.split(":"):
        case ["train", layouts, shape, until]:
            return train(root, layouts, shape, int(until))
        case ["damaged", layout, shape]:
            return damaged(root, layout, shape)
        case ["save"]:
            return distributed_save.run(root / "save")
        case ["values"]:
            return distributed_values.run()
        case ["export"]:
            return distributed_export.run(root / "export")
    raise ValueError(task)


if __name__ == "__main__":
    address, count, index, root, *tasks = sys.argv[1:]
    if int(count) > 1:
        jax.distributed.initialize(address, int(count), int(index))
    print(json.dumps({task: perform(Path(root), task) for task in tasks}))
