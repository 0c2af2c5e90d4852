"""The losses that the report of a sweep can compare. This module is fast to import."""

# Name of the metric: what it is, with its unit.
METRICS = {
    "validation_loss": "validation loss, nats per token",
    "macro_loss": "mean loss of the validation sets, nats per token",
    "bits_per_byte": "validation loss, bits per byte",
    "training_loss": "training loss of the last logged step, nats per token",
}
