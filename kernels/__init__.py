"""Numerics: each operation with its contract and its torch path. Knows tensors, and nothing else of this project."""
