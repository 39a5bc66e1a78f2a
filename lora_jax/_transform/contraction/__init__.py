"""Contractions with an adapted kernel: the three forms, the FLOPs of each, and the low-rank products."""
