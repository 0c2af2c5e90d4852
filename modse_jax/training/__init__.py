"""Loss, optimiser, step, loop, checkpoints and metrics."""
