"""What a model with an adapter costs, before it runs: tables of kernels, FLOPs, memory, collectives."""
