"""Measurements, each against something known in the same run. Results by machine in results/."""
