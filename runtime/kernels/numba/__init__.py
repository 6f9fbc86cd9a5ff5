"""Kernels for processors, written once on raw pointers (see ``frame``) and compiled by numba: just in time, or ahead of time."""
