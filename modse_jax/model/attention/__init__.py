"""Causal self-attention: the layer, a plain reference, and implementations for each platform."""
