"""Sweeps: many runs that compare configs, defined in one file and resumable as a whole."""
