"""How large a model is when it is deployed."""

from typing import NamedTuple

from torch import nn

from qlightning.layers.coverage import public_name
from qlightning.layers.layer import Twin
from qlightning.numerics.tensor_quantizer import TensorQuantizer


class Size(NamedTuple):
    """One parameter.

    Attributes:
        name: Its dotted name; of a shared one, the first.
        elements: How many numbers it holds.
        trained: Bytes as it is trained.
        served: Bytes as it is served: packed codes, scales and zero points where it is quantized.
    """

    name: str
    elements: int
    trained: int
    served: int


def sizes(module: nn.Module) -> dict[int, Size]:
    """Every parameter of a plain or converted model by its id, without those of quantizers."""
    packed: dict[int, int] = {}
    for layer in module.modules():
        if not isinstance(layer, Twin):
            continue
        for prefix, matrix in layer.weights().items():
            quantizer, parameter = layer.quantizer(prefix), getattr(layer, prefix)
            if quantizer is None or quantizer.released or id(parameter) in packed:
                continue
            packed[id(parameter)] = quantizer.stored_bytes(tuple(matrix.shape), parameter.dtype)
    learned = {id(p) for child in module.modules() if isinstance(child, TensorQuantizer) for p in child.parameters()}
    found: dict[int, Size] = {}
    for name, p in module.named_parameters():
        if id(p) not in learned:
            trained = p.numel() * p.element_size()
            found[id(p)] = Size(public_name(name), p.numel(), trained, packed.get(id(p), trained))
    return found


def float_bytes(module: nn.Module) -> int:
    """Bytes of the parameters as they are trained, without quantizers; shared ones count once."""
    return sum(size.trained for size in sizes(module).values())


def deployed_bytes(module: nn.Module) -> int:
    """Bytes of a converted model as it is served: packed codes, scales, zero points; other parameters as they are."""
    return sum(size.served for size in sizes(module).values())
