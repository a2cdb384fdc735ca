"""Ray Tune over learning rates, batch sizes and models."""
