"""What a checkpoint is worth: loss, routing, samples, pictures."""
