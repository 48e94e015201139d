"""A layer's quantized weight, made before compiled code asks for it."""

import torch

from qlightning.layers.kept_weight import Prepared
from qlightning.layers.layer import Twin
from qlightning.layers.on_codes import encoded
from qlightning.numerics.learned import Static


@torch.no_grad()
def prepare(layer: Twin) -> None:
    """Make the quantized weight that the layer's compiled code would make in every micro-batch."""
    quantizer, weight = layer.quantizer("weight"), layer.weights().get("weight")
    if quantizer is None or weight is None or "adapter" not in layer.places or not (quantizer.acts and quantizer.kept):
        return
    if quantizer.rounding.key() is not None or (isinstance(quantizer.scale, Static) and quantizer.scale.moving):
        return
    if hasattr(weight, "placements") or quantizer.kept.prepared is not None:
        return
    matrix, on_codes = layer.effective("weight"), layer.on_codes()
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    state = quantizer.grid(matrix)
    values = layer.laid_out(quantizer.values(matrix, state, None))
    codes = None
    if on_codes is not None and on_codes.acts("fprop", layer.quantizer("input"), quantizer):
        codes = encoded(quantizer, matrix, None, state)
    quantizer.kept.prepared = Prepared(values if dtype is None else values.to(dtype), dtype, codes)
