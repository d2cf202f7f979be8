"""GPU tests and kernel benchmarks: `python -m benchmarks.gpu`. Needs torch, triton, pytest and hypothesis only."""
