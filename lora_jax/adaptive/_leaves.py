"""The leaves of an adapter whose rank is adaptive."""

from __future__ import annotations

from .._core.adapter import Adapter, Adapters, check_adapter
from .._errors import AdapterError
from .._variants import AdaLoRA


def adaptive(adapter: Adapters) -> dict[str, Adapter]:
    """Returns the leaves of `AdaLoRA` in an adapter, or in a tree like it, sorted by path.

    They are sorted because `jit` sorts dicts, and ties between scores must be broken in the same way outside `jit`.

    Raises:
      AdapterError: if the argument is not an adapter, or no leaf is of `AdaLoRA`.
    """
    check_adapter(adapter, "If one tree holds the adapter and the base: freeze_base(ada_lora(tx, …)).")
    parts = {path: adapter[path] for path in sorted(adapter) if isinstance(adapter[path].variant, AdaLoRA)}
    if not parts:
        found = ", ".join(sorted({type(part.variant).__name__ for part in adapter.values()})) or "nothing"
        raise AdapterError(
            f"Expected an adapter with leaves of AdaLoRA; got leaves of {found}.\n"
            "  Use AdaLoRA in the spec: init(key, params, {'**/kernel': AdaLoRA(rank=12, alpha=24)})."
        )
    return parts
