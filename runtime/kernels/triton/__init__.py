"""Kernels in Triton for CUDA. Importing a module of this folder, other than ``register``, imports Triton."""
