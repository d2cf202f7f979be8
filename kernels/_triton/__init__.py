"""Triton twins of the ops one level up: same file names, same function names, same contracts. Sole user of Triton.

Each file holds its `@triton.jit` kernels and the launchers beneath them. Import nothing from here directly: ask
`kernels.dispatch`.
"""
