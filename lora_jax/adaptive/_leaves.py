"""The leaves of an adapter that have a rank to adapt."""

from __future__ import annotations

from .._core.adapter import Adapter, Adapters, check_adapter
from .._errors import AdapterError
from .._variants import AdaLoRA


def adaptive(adapter: Adapters) -> dict[str, Adapter]:
    """The parts of an adapter, or of a tree like it, that are AdaLoRA's, in the order of their paths.

    Under `jit` a dict comes in that order; outside it comes in its own, and ties are to be broken alike.

    Raises:
      AdapterError: if there is none, or if it is no adapter.
    """
    check_adapter(adapter, "In one tree with the base, give `ada_lora` the adapter only: freeze_base(ada_lora(tx, …)).")
    parts = {path: adapter[path] for path in sorted(adapter) if isinstance(adapter[path].variant, AdaLoRA)}
    if not parts:
        there = ", ".join(sorted({type(part.variant).__name__ for part in adapter.values()})) or "nothing"
        raise AdapterError(
            f"Expected an adapter with leaves of AdaLoRA, whose rank can be adapted; got one of {there}.\n"
            "  Name them in the spec: init(key, params, {'**/kernel': AdaLoRA(rank=12, alpha=24)})."
        )
    return parts
