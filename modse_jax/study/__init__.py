"""The design-space study: symbols, recipe, arms, scaling laws."""
