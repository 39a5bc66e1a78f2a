"""Conversions between adapters and parameter trees: merge, unmerge, extract, compress."""
