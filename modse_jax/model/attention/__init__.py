"""Causal self-attention: the layer, its plain reference, and the implementations for each platform."""
