"""Datasets, splits, augmentation and loading."""
