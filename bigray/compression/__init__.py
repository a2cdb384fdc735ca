"""A finished bundle made smaller: quantized, pruned, or with its matrices factored. Runs on the driver, without Ray."""
