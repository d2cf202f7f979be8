"""One endpoint's traffic, sorted: calls, which are answered here, streams, which `streams` takes, and who is alive."""
