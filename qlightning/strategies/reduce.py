"""A reduce-scatter of gradients in eight bits: FSDP2's, with codes on the wire.

Each rank rounds what it has for another rank to int8, up or down at random so that the expectation is the gradient, in
blocks with a scale each; the codes are exchanged, and every rank adds up its own part in float32. What one rank adds is
off by less than one step, absmax / 127 of its block; the mean over R ranks by less than the mean of R steps, and right
on average. After low-precision communication in HALO (S81, arXiv 2501.02625), which keeps gradients in 16 bits.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import pad

from qlightning.numerics.formats import Int
from qlightning.numerics.granularity import PerGroup
from qlightning.numerics.quantizer import Quantized, Quantizer
from qlightning.numerics.rounding import Stochastic, fold
from qlightning.numerics.scales import Grid


class EightBitReduceScatter:
    """Reduces gradients as int8 codes, stochastically rounded; see `FSDPModule.set_custom_reduce_scatter`.

    Args:
        block: Neighbouring elements that share a scale.
        seed: Of the random numbers, which also depend on the step, the rank and the place in the backward pass.
    """

    def __init__(self, *, block: int = 256, seed: int = 0) -> None:
        self.block, self.seed = block, seed
        rounding = Stochastic(seed=seed)
        self.quantizer = Quantizer(
            Int(8, range="narrow"), PerGroup(block), rounding=rounding, scale_dtype=torch.float32
        )
        self._calls = 0

    def begin(self, step: int) -> None:
        """Start the random numbers of a backward pass: a resumed run draws those of the run it goes on with."""
        self.quantizer.rounding.step.fill_(step)  # type: ignore[union-attr,operator]
        self._calls = 0

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """FSDP2 asks for its buffers."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """Sum (or average) over the ranks of `group` into `output_tensor` this rank's part of `input_tensor`.

        Args:
            output_tensor: (elements,).
            input_tensor: (ranks * elements,), the part of every rank.
            group: The ranks.
            op: ReduceOp.SUM or ReduceOp.AVG.
            async_op: FSDP2 never asks for it.

        Raises:
            ValueError: Another operation.
        """
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise ValueError(
                f"gradients in eight bits are summed or averaged, not reduced by {op}: write gradients='full'"
            )
        ranks, elements = dist.get_world_size(group), output_tensor.numel()
        parts = pad(input_tensor.view(ranks, elements).float(), (0, -elements % self.block))
        codes, scale = self._rounded(parts, dist.get_rank(group))
        received = [torch.empty_like(tensor) for tensor in (codes, scale)]
        for mine, theirs in zip((codes, scale), received, strict=True):
            dist.all_to_all_single(theirs, mine, group=group)
        summed = self.quantizer.dequantize(Quantized(*received), torch.float32).sum(0)[:elements]
        output_tensor.copy_(summed / ranks if op == dist.ReduceOp.AVG else summed)

    def _rounded(self, parts: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """(codes, scales) of every rank's part. A part that is not finite is not finite when it arrives."""
        self._calls += 1
        grid = Grid(*self.quantizer.grid(parts))
        key = fold(fold(self.quantizer.rounding.key(), self._calls), rank + 1)
        codes, scale, *_ = self.quantizer.stored(parts, grid, key)
        return codes, scale


def reduce_with(module: nn.Module, reduce: EightBitReduceScatter) -> None:
    """Let every unit of a sharded module reduce its gradients so.

    Raises:
        ValueError: Parameters have several dtypes, for which FSDP2 takes no other reduction than its own.
    """
    floating = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    if len(floating) > 1:
        raise ValueError(
            f"parameters of {' and '.join(sorted(map(str, floating)))} are reduced apart, which FSDP2 does not do with "
            "EightBitReduceScatter: leave gradients= out, or keep one dtype, Trainer(precision='bf16-mixed')"
        )
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.set_custom_reduce_scatter(reduce)  # type: ignore[arg-type]  # it has the methods FSDP2 calls
