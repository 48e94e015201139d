"""Triton kernels, each beside its twin in plain torch (`..._slow`), which defines it.

Triton is optional (`pip install qlightning[kernels]`; torch for CUDA brings it). Nothing here is imported before a
tensor on a GPU asks for it; see `switch.py` for when that is and how to turn it off.
"""
