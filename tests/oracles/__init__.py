"""The slow, obvious versions of what the package computes: a formula at a time, as the papers have them."""
