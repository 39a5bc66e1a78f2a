"""Who is measured, in which environment. One file for each, all with the same face:

    build(case) -> Method    # a loss, what is trained, what stays frozen; the case's values in the library's own form
    merge(case) -> params    # for the model as it stands, if the library can
    dense(case) -> Method    # as `build`, where the library forms kernels only if told to

Needs nothing but Python; `pins/ENVIRONMENT.txt` says what each environment holds.
"""

from __future__ import annotations

from typing import NamedTuple


class Peer(NamedTuple):
    """A library: its name, its file here, its distribution on PyPI."""

    name: str
    module: str
    distribution: str


BY_HAND, AGAIN, BIAS_FIRST = "by hand", "by hand, again", "by hand, bias first"
MERGED, WHOLE = "W0 + s·A·B each step", "full fine-tuning"

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
