"""Figures, tables and web pages that describe a run."""
