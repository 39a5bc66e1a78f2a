"""The measured libraries and their environments. There is one file per library, with these functions:

    build(case) -> Method    # a loss, trained arrays and frozen arrays, with the values of the case
    merge(case) -> params    # for the unmodified model; missing if the library cannot merge
    dense(case) -> Method    # as `build`, with materialization allowed; missing if the library has no such option

Imports only the standard library. `pins/ENVIRONMENT.txt` lists the packages of each environment.
"""

from __future__ import annotations

from typing import NamedTuple


class Peer(NamedTuple):
    """A library: its name, its file in this folder, and its distribution on PyPI."""

    name: str
    module: str
    distribution: str


BY_HAND, AGAIN, BIAS_FIRST = "by hand", "by hand, again", "by hand, bias first"
MERGED, FULL = "W0 + s·A·B each step", "full fine-tuning"

ENVIRONMENTS: dict[str, tuple[Peer, ...]] = {
    "jax": (
        Peer("lora_jax", "lora_jax", "lora_jax"),
        Peer("Qwix, Linen", "qwix_linen", "qwix"),
        Peer("Qwix, NNX", "qwix_nnx", "qwix"),
        Peer("flax.nnx LoRA", "flax_nnx", "flax"),
        Peer("Quax", "quax", "quax"),
        Peer("MLoRAx", "mlorax", "mlorax"),
    ),
    "lorax": (Peer("jax-lorax", "lorax", "jax-lorax"),),
    "torch": (Peer("PEFT", "peft", "peft"),),
}
