"""What is stored in `tests/data`, to compare with: a small run in version 1 of the checkpoint format, and PEFT files.

`python tests/stored_run.py ROOT` stores both. lora_jax 0.1.0 wrote `tests/data`, which must not change.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import lora_jax as lj
from lora_jax import peft
from lora_jax.checkpoint import AdapterSave, StateSave

STORED = Path(__file__).parent / "data" / "format_1"
PEFT = Path(__file__).parent / "data" / "peft_1"
PEFT_MAPPING = {
    "embedding": peft.embedding("model.embed_tokens"),
    "query/kernel": peft.linear(peft.Part("model.q_proj", interleaved=8, factor=0.5), axes="ioo"),
    "query/bias": peft.vector(peft.Part("model.q_proj", interleaved=8, factor=0.5)),
}

# The variant and axes of each adapted leaf.
ADAPTED: dict[str, tuple[Any, str]] = {
    "embedding": (lj.Rows(ids=(3, 5)), "io"),
    "head/kernel": (lj.DoRA(rank=1, alpha=1), "io"),
    "key/bias": (lj.LoRABias(scale=2.0), "o"),
    "key/kernel": (lj.LoRA(rank=2, alpha=4, dropout=0.1), "io"),
    "layers/0/kernel": (lj.AdaLoRA(rank=2, alpha=4), "io"),
    "layers/1/kernel": (lj.ALoRA(rank=2, alpha=4, invocation=(1, 2)), "io"),
    "packed": (lj.RSLoRA(rank=2, alpha=0.5), "io"),
    "query/bias": (lj.Full(), ""),
    "query/kernel": (lj.LoRA(rank=2, alpha=16), "ioo"),
    "value/kernel": (lj.VeRA(rank=4, seed=3), "io"),
}


def ramp(*shape: int, first: int = 0) -> np.ndarray[Any, Any]:
    """Multiples of 1/64 between −1 and 1, the same on every machine."""
    return ((np.arange(np.prod(shape, dtype=int)) + first) * 37 % 128 / 64 - 1).reshape(shape)


def base() -> dict[str, Any]:
    """Weights of several dtypes, including NumPy's float64, and other state of a model."""
    return {
        "activation": "gelu",
        "dropout": {"count": jnp.uint32(3), "key": jax.random.key(0)},
        "embedding": jnp.asarray(ramp(24, 8), jnp.float16),
        "head": {"kernel": ramp(8, 3), "mask": np.arange(3) < 2},
        "key": {"kernel": jnp.asarray(ramp(16, 8), jnp.float32), "bias": jnp.zeros(8)},
        "layers": [{"kernel": jnp.asarray(ramp(8, 8, first=layer), jnp.float32)} for layer in range(2)],
        "nothing": jnp.zeros((0, 4)),
        "packed": jnp.asarray(64 * ramp(16, 8), jnp.int8),
        "query": {"kernel": jnp.asarray(ramp(16, 4, 8), jnp.bfloat16), "bias": jnp.zeros((4, 8))},
        "value": {"kernel": jnp.asarray(ramp(16, 8, first=5), jnp.float32)},
    }


def adapter() -> dict[str, lj.Adapter]:
    """One part of each variant."""
    shapes = {jax.tree_util.keystr(keys, simple=True, separator="/"): np.shape(leaf) for keys, leaf in paths(base())}
    return {path: part(variant, axes, shapes[path]) for path, (variant, axes) in ADAPTED.items()}


def peft_adapter() -> dict[str, lj.Adapter]:
    """The parts that one PEFT file can hold."""
    return {path: part for path, part in adapter().items() if path in PEFT_MAPPING}


def paths(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def part(variant: Any, axes: str, shape: tuple[int, ...]) -> lj.Adapter:
    dtype = jnp.bfloat16 if isinstance(variant, lj.RSLoRA) else jnp.float32
    arrays = {name: jnp.asarray(ramp(*sizes), dtype) for name, sizes in variant.shapes(shape, axes).items()}
    return lj.Adapter(variant, axes, **arrays)


def state() -> dict[str, Any]:
    """The training state without the adapter."""
    return {"mu": jax.tree.map(jnp.negative, adapter()), "key": jax.random.key(7), "order": np.arange(5), "step": 5}


if __name__ == "__main__":
    root = Path(sys.argv[1]).absolute()
    peft.export(root / PEFT.name, peft_adapter(), PEFT_MAPPING, base=base())
    with ocp.CheckpointManager(root / STORED.name) as manager:
        items = {"adapter": AdapterSave(adapter(), base=base()), "state": StateSave(state())}
        manager.save(5, args=ocp.args.Composite(**items))
