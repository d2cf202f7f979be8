"""The C twins of ops on the CPU: the same names as in `kernels`, for the few rows of a decode step.

There a step is bound by calls, not by arithmetic: each of these is one call where torch needs five to ten. Float32 and
bfloat16, sums in float32, one thread. `library.py` compiles and loads them; nothing here runs at import.
"""
