"""Triton kernels of training; they are imported where there is a GPU."""
