"""GPU kernels in Triton: pure functions on tensors. Import a module of this folder only where a GPU is used."""
