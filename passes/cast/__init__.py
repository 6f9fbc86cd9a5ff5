"""Changing the element type of a model."""
