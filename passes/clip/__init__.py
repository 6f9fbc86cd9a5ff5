"""Bounding activations."""
