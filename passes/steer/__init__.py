"""Editing directions in activations: steering vectors, directional ablation, their extraction."""
