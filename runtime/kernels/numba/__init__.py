"""Kernels for processors, written once on raw pointers (see ``frame``) and compiled by numba."""
