"""Combinations of adapters: `combine`, and one file for each way to combine."""
