"""`explain` and `plan`: FLOPs, memory and collectives of an adapted model before it runs."""
