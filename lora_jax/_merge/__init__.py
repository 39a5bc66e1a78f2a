"""Adapters and parameter trees turned into each other: merge, unmerge, extract, compress."""
