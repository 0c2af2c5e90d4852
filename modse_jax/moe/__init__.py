"""The layer this project exists for: experts of unequal width on one flat hidden axis."""
