"""Contractions with an adapted kernel: the forms that they can take, what each costs, and the low-rank products."""
