"""Launching, the training step and its hooks."""
