"""Rewriting to the ops that kernels claim whole."""
