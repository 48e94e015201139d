"""The quantized weights of a model, as whatever works on them around optimizer steps sees them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qlightning.layers.convert import quantizers_of
from qlightning.layers.coverage import public_name
from qlightning.layers.layer import Twin
from qlightning.layers.sharding import is_sharded, whole
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.tensor_quantizer import State, TensorQuantizer
from qlightning.optim.rows import Rows, shard_like


class Weight(NamedTuple):
    """One weight with its quantizer, which sees it as the matrix (output channels, fan-in).

    Of a sharded weight (FSDP2), matrix, state and values are those of the rows that this process holds, and all
    processes ask for them alike.
    """

    name: str
    layer: Twin
    prefix: str
    parameter: nn.Parameter
    quantizer: TensorQuantizer

    @property
    def rows(self) -> Rows | None:
        """Which rows are here; None where all are."""
        live = getattr(self.layer, self.prefix)
        return Rows.of(self.name, self.layer.weights()[self.prefix], live) if is_sharded(live) else None

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """What the quantizer sees: the weight, with the adapter that is inside the quantizer if there is one."""
        rows, inside = self.rows, self.layer.inside()
        if rows is not None and inside is not None:
            with whole(self.layer):
                return rows.cut(self.matrix())
        matrix = self.layer.weights()[self.prefix].detach() if rows is None else rows.here
        return matrix if inside is None else inside.effective(matrix, inside.tensors())

    @torch.no_grad()
    def state(self, matrix: Tensor) -> State:
        """The grid the next forward pass uses; a moving scale does not observe."""
        rows, quantizer = self.rows, self.quantizer
        if rows is None:
            return quantizer.grid(matrix)
        assert isinstance(quantizer, Quantizer)  # whoever looks at codes on shards has asked for one code per element
        granularity = quantizer.granularity
        if quantizer.scale.static:  # not a function of the values
            with whole(quantizer):
                return rows.cut_grid(self.name, quantizer.grid(matrix), granularity)
        if granularity.shared_rows == 1 and not quantizer.scale.of_tensor:
            return quantizer.grid(matrix)
        with whole(self.layer):
            return rows.cut_grid(self.name, quantizer.grid(self.matrix()), granularity)

    @torch.no_grad()
    def quantized(self) -> Tensor:
        """Q(w) as deployed, with the rounding of this step, of the matrix's shape and dtype."""
        if (rows := self.rows) is not None:
            with whole(self.layer):
                return rows.cut(self.quantized())
        matrix = self.matrix()
        return self.quantizer.on_grid(matrix, self.state(matrix), self.quantizer.rounding.key())

    def like_parameter(self, matrix: Tensor) -> Tensor:
        """A matrix (output channels, fan-in) in the layout of the Parameter."""
        if is_sharded(self.parameter):
            laid_out: Tensor = shard_like(self.parameter, matrix)
            return laid_out
        with torch.enable_grad():  # the adjoint of a permutation is its inverse
            (laid_out,) = torch.autograd.grad(self.layer.weights()[self.prefix], self.parameter, matrix)
        return laid_out


def weights_of(module: nn.Module) -> Iterator[Weight]:
    """The weights whose quantizer acts, shared ones once.

    Raises:
        ValueError: A weight is sharded; the piece one process holds need not contain whole blocks of the scale.
    """
    for weight in weights_in(module):
        if not weight.quantizer.enabled:
            continue
        if hasattr(weight.parameter, "placements") or weight.parameter.dim() < 2:  # a DTensor, or FSDP1's piece
            raise ValueError(
                f"{weight.name} is sharded, and what follows weights from step to step needs whole ones: train with "
                "Trainer(strategy='ddp') or on one device"
            )
        yield weight


def shares_of(module: nn.Module) -> Iterator[Weight]:
    """As `weights_of`, also where FSDP2 has sharded them.

    Raises:
        ValueError: A weight is in pieces that are not rows.
    """
    for weight in weights_in(module):
        if not weight.quantizer.enabled:
            continue
        if weight.parameter.dim() < 2:
            raise ValueError(
                f"{weight.name} is a piece of FSDP1's, which are no rows: train with "
                "Trainer(strategy=QuantizedFSDP()) or Trainer(strategy='ddp')"
            )
        yield weight


def weights_in(module: nn.Module) -> Iterator[Weight]:
    """The weights that have a quantizer, whether it acts or not, shared ones once."""
    seen: set[int] = set()
    for name, layer in module.named_modules():
        if not isinstance(layer, Twin):
            continue
        for prefix in layer.weights():
            quantizer, parameter = layer.quantizer(prefix), getattr(layer, prefix)
            if quantizer is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield Weight(f"{public_name(name)}.{prefix}".lstrip("."), layer, prefix, parameter, quantizer)


def learning_rates(optimizer: Optimizer) -> dict[int, float]:
    """The learning rate of every parameter that an optimizer moves, by the parameter's id."""
    return {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}


def check_quantized(module: nn.Module, call: str) -> None:
    """Raise unless something of a module is quantized.

    Args:
        module: Any module.
        call: The callback that asks, as it stands in the list of callbacks.

    Raises:
        ValueError: Nothing is.
    """
    if not any(True for _ in quantizers_of(module)):
        raise ValueError(
            f"nothing is quantized: write Trainer(callbacks=[QATCallback(weight='int4-g128'), {call}]), in this order"
        )
