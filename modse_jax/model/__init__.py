"""The Transformer around the MoE layer, text generation, and counts of parameters and FLOPs."""
