"""The mixture-of-experts layer, whose experts may have different widths."""
