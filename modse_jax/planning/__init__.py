"""Training steps compiled and counted for hardware that is not attached."""
