"""Proposals of a mapping: `guess`, from names, shapes, traced axes and values."""
