"""Kernels: one folder per operation; each has a reference that runs anywhere."""
