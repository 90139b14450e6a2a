"""Every figure the docs quote, one command each; results are JSON in `benchmarks/results/`."""
