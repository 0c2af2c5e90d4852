"""Planning: compiles a training step for hardware that is not attached, and counts its needs."""
