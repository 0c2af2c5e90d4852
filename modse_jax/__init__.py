"""Mixture-of-Experts language models whose experts have different widths, in JAX."""
