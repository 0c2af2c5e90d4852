"""The decoder around the MoE layer, its sampler, and the counting of its parameters and FLOPs."""
