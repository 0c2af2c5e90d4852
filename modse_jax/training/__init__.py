"""Training: loss, optimizer, training step, loop, checkpoints, logs and metrics."""
