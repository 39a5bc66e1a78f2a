"""The version, said once: the package, its metadata and its checkpoints read it here."""

__version__ = "0.1.0"
