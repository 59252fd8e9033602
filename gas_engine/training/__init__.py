"""A training run: options, iteration, loop, directory, results."""
