"""What the kernels cost on a GPU, after a check that they are right."""
