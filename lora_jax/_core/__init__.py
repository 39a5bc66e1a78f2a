"""Adapters and kernels as data: paths, axes, specs, and the linear algebra of factors. Nothing here traces a model."""
