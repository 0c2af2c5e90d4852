"""Evaluation of trained models: validation loss, routing, samples and benchmarks."""
