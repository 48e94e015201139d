"""How large a model is when it is deployed."""

from torch import nn

from qlightning.layers.layer import Twin
from qlightning.numerics.tensor_quantizer import TensorQuantizer


def float_bytes(module: nn.Module) -> int:
    """Bytes of the parameters as they are trained, without quantizers; shared ones count once."""
    return sum(p.numel() * p.element_size() for p in _own_parameters(module).values())


def deployed_bytes(module: nn.Module) -> int:
    """Bytes of a converted model as it is served: packed codes, scales, zero points; other parameters as they are."""
    total, packed = 0, set[int]()
    for layer in module.modules():
        if not isinstance(layer, Twin):
            continue
        for prefix, matrix in layer.weights().items():
            quantizer, parameter = layer.quantizer(prefix), getattr(layer, prefix)
            if quantizer is None or quantizer.released or id(parameter) in packed:
                continue
            packed.add(id(parameter))
            total += quantizer.stored_bytes(tuple(matrix.shape), parameter.dtype)
    rest = (p for key, p in _own_parameters(module).items() if key not in packed)
    return total + sum(p.numel() * p.element_size() for p in rest)


def _own_parameters(module: nn.Module) -> dict[int, nn.Parameter]:
    """Parameters by id, without those of quantizers."""
    learned = {id(p) for child in module.modules() if isinstance(child, TensorQuantizer) for p in child.parameters()}
    return {id(p): p for p in module.parameters() if id(p) not in learned}
