"""Kernels: what one device computes. They know no mesh and send nothing."""
