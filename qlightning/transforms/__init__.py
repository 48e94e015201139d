"""Transforms: rewrites of a tensor before it is quantized."""
