"""Ten minutes on a real accelerator, TPU or GPU, in one command. See docs/accelerator.md."""
