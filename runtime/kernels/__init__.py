"""Kernels of the ops: in numba for processors, in Triton for CUDA."""
