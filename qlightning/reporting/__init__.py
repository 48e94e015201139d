"""Reporting: a page that shows what quantization made of a model, from a checkpoint and the logs beside it."""
