"""The design-space study: notation, arms, scaling laws."""
