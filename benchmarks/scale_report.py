"""The tables and the picture of `scale.py`."""

from __future__ import annotations

SWEEPS = {"layers": [10, 20, 40, 80], "rank": [4, 16, 64, 256], "sequences": [1, 2, 4, 8]}


def document(r, p):
    return ""


def plot(r, p):
    pass


def tables(r):
    return ""
