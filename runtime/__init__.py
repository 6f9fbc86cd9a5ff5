"""Engines and kernels that run graphs."""
