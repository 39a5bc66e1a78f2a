"""Checkpoints on Orbax: the adapter and a readable manifest, and nothing of the base but its fingerprint.

`save` and `restore` are for an adapter on its own. `AdapterSave` and `AdapterRestore`, of which they are made, put one
into a `CheckpointManager`; `StateSave` and `StateRestore` put optimizer state, step and key beside it. Every file has a
checksum. `import lora_jax` does not load this module, nor Orbax.
"""

from ._adapter import AdapterHandler as AdapterHandler
from ._adapter import AdapterRestore as AdapterRestore
from ._adapter import AdapterSave as AdapterSave
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
    "restore",
    "save",
]
