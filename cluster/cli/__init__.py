"""The commands of `tandem`, one module each: `add_to(subparsers)` declares it, `run(options)` does it."""
