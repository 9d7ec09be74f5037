"""Measures of quality, and the baselines they are compared with."""
