"""Checkpoints on Orbax: the adapter, a readable manifest, and a fingerprint of the base instead of the base.

`save` and `restore` handle one adapter; `manifest` reads what is in one, without its arrays. `AdapterSave` and
`AdapterRestore` make an adapter an item of a `CheckpointManager`; `StateSave` and `StateRestore` do the same for
optimizer state, step and key. Every file has a checksum. `import lora_jax` imports neither this module nor Orbax.
"""

from ._adapter import AdapterHandler as AdapterHandler
from ._adapter import AdapterRestore as AdapterRestore
from ._adapter import AdapterSave as AdapterSave
from ._adapter import manifest as manifest
from ._adapter import restore as restore
from ._adapter import save as save
from ._state import StateHandler as StateHandler
from ._state import StateRestore as StateRestore
from ._state import StateSave as StateSave

__all__ = [
    "AdapterHandler",
    "AdapterRestore",
    "AdapterSave",
    "StateHandler",
    "StateRestore",
    "StateSave",
    "manifest",
    "restore",
    "save",
]
