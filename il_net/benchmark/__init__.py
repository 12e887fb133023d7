"""Comparing models: their speed side by side, and what they reach on two small data sets."""
