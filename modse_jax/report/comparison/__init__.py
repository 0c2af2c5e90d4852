"""The report of a sweep: compares its shapes, with intervals, at the best and at a shared rate."""
