"""What one device computes: kernels that know no mesh."""
