"""Benchmarks: run as modules (`python -m benchmarks.bench_serving`); nothing of the project imports them."""
