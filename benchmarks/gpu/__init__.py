"""GPU tests and kernel benchmarks in one command: `python -m benchmarks.gpu`. Needs torch, triton, pytest, hypothesis."""
