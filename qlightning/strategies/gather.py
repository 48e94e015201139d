"""Codes are gathered in the place of weights.

What a sharded weight sends is its codes whenever its quantizer acts at full strength and without random numbers, and
else (before quantization begins, on a ramp, with a moving scale) the weight itself, which its layer then quantizes as
ever: that is decided gather by gather, and nothing is sharded anew. While its layer runs on gathered codes, the
quantizer knows (`TensorQuantizer.gathered`), and learned scales, which nobody needs then, do not travel beside them.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from qlightning.layers.layer import Twin
from qlightning.layers.on_codes import as_matrix
from qlightning.numerics.learned import Static
from qlightning.numerics.packing import pack, unpack
from qlightning.numerics.quantizer import Quantized, Quantizer
from qlightning.numerics.scales import Grid
from qlightning.strategies.codes import Rows, arrived, decoded, encode, on_rows, packing_of
from qlightning.strategies.extension import Extension, Sent, managed_parameters
from qlightning.strategies.pool import OverRanks


class CodeGather(Extension):
    """The all-gather of one quantized weight.

    Args:
        managed: FSDP2's record of the weight.
        quantizer: Of the weight.
        scales: FSDP2's records of the parameters of its scale, by name.
        rows: Which rows of its matrix are here.
        columns: Of its matrix.
        layers: Whose forward runs on it.

    Attributes:
        coded: Whether the last gather moved codes.
    """

    coded: bool = False

    def __init__(
        self,
        managed: Any,
        quantizer: Quantizer,
        *,
        scales: Mapping[str, Any],
        rows: Rows,
        columns: int,
        layers: Sequence[Twin],
    ) -> None:
        super().__init__(managed)
        self.quantizer, self.rows, self.columns = quantizer, rows, columns
        self.scales = {name: ScaleGather(scale, self) for name, scale in scales.items()}
        self.packing = packing_of(quantizer)
        self.on_codes = any(layer.on_codes() is not None for layer in layers)
        self._outs: Sent = ()
        self.pool = OverRanks(self.group, rows.total * columns)
        for layer in layers:
            layer.register_forward_pre_hook(self._tell)
            layer.register_forward_hook(self._take_back, always_call=True)

    def attach(self) -> None:
        super().attach()
        for scale in self.scales.values():
            scale.attach()

    def acts(self) -> bool:
        """Whether the next gather moves codes."""
        quantizer, scale = self.quantizer, self.quantizer.scale
        if not (quantizer.enabled and quantizer.ready and quantizer.full) or quantizer.rounding.key() is not None:
            return False
        if isinstance(scale, Static) and scale.moving and quantizer.training:
            return False
        # A frozen weight's gradient, from which a scale that learns would get its own, is not reduced.
        return self.parameter.requires_grad or not any(s.parameter.requires_grad for s in self.scales.values())

    def sent(self) -> Sent:
        self.coded = self.acts()
        if not self.coded:
            return (self.filled(),)
        with self.on_shard(self.scales_here()):
            grid = self.grid()
            return encode(self.quantizer, self.matrix, self.rows, packing=self.packing, grid=grid)

    def whole(self, outs: Sent, dtype: torch.dtype) -> Tensor:
        if not self.coded:
            return self.joined(outs[0])
        self._outs = outs
        values = decoded(self.quantizer, outs, self._shape, packing=self.packing, dtype=dtype)
        return values.view(self.parameter.shape)

    def _arrived(self) -> Quantized:
        return arrived(self.quantizer, self._outs, self._shape, packing=self.packing)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.rows.total, self.columns

    # --- the quantizer on the shard ---

    @property
    def matrix(self) -> Tensor:
        """The rows that are here (held, columns)."""
        return self.local.reshape(self.rows.held, self.columns)

    def scales_here(self) -> dict[str, Tensor]:
        """The scale's parameters for these rows, outside autograd; one of the whole tensor is gathered."""
        apart = self.quantizer.granularity.shared_rows is not None
        with torch.no_grad():
            return {name: s.local if apart else s.parameter.full_tensor() for name, s in self.scales.items()}

    def on_shard(self, scales: dict[str, Tensor]) -> AbstractContextManager[None]:
        """Inside, the quantizer is that of these rows."""
        return on_rows(self.quantizer, self.rows, scales, self.pool)

    def grid(self) -> Grid:
        """The grid of these rows, inside `on_shard`; every rank calls it alike."""
        return self.quantizer.grid(self.matrix)

    def _tell(self, layer: nn.Module, arguments: Any) -> None:
        if self.coded and not self.acts():
            raise RuntimeError(
                f"{self.quantizer!r} was switched while its weight was unsharded, of which only codes are here: call "
                "reshard() of the unit that it lies in first"
            )
        self.quantizer.gathered = self.coded
        if self.coded and self.on_codes:  # what was received is there as long as the weight is
            codes, scale, *_ = self._arrived()
            self.quantizer.arrived = as_matrix(codes, scale.float())

    def _take_back(self, layer: nn.Module, arguments: Any, output: Any) -> None:
        self.quantizer.gathered, self.quantizer.arrived = False, None


class ScaleGather(Extension):
    """The all-gather of a learned scale, which sends nothing where its weight's codes hold it.

    Args:
        managed: FSDP2's record of the scale.
        weight: The gather of the weight that it belongs to.
    """

    def __init__(self, managed: Any, weight: CodeGather) -> None:
        super().__init__(managed)
        self.weight = weight

    def sent(self) -> Sent:
        # FSDP2 cannot receive nothing at all
        return (self.local.new_zeros(1, dtype=torch.uint8),) if self.weight.acts() else (self.filled(),)

    def whole(self, outs: Sent, dtype: torch.dtype) -> Tensor:
        if outs[0].dtype == torch.uint8:
            return torch.full(self.parameter.shape, torch.nan, dtype=dtype, device=outs[0].device)
        return self.joined(outs[0])


class KeptGather(Extension):
    """The all-gather of a frozen weight that is kept as codes, one to a byte: packed.

    Args:
        managed: FSDP2's record of the weight.
        bits: Of a code, in two's complement.
    """

    coded = True

    def __init__(self, managed: Any, bits: int) -> None:
        super().__init__(managed)
        self.bits = bits

    def sent(self) -> Sent:
        return (pack(self.filled().flatten(1), self.bits),)

    def whole(self, outs: Sent, dtype: torch.dtype) -> Tensor:
        columns = self.parameter[:1].numel()
        return self.joined(unpack(outs[0], self.bits, columns, signed=True))


def gathers_of(module: nn.Module) -> list[CodeGather | KeptGather]:
    """The gathers of all weights of a sharded module that travel as codes."""
    standing = (
        getattr(record.sharded_param._local_tensor, "fsdp_pre_all_gather", None)
        for record in managed_parameters(module)
    )
    owners = (getattr(method, "__self__", None) for method in standing)
    return [owner for owner in owners if isinstance(owner, CodeGather | KeptGather)]
