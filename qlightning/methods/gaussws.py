"""GaussWS: weights trained under noise as large as a rounding step, whose number of bits is learned per block."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from qlightning.callbacks.extra_loss import ExtraLoss
from qlightning.layers.convert import quantizers_of
from qlightning.methods.method import Method
from qlightning.numerics.formats import Format, Round
from qlightning.numerics.granularity import PerBlock, Shape
from qlightning.numerics.learned import Static
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.rounding import Random, uniform
from qlightning.numerics.scales import Grid, Ship
from qlightning.numerics.statistics import absmax

_TAILS = (0.0013498980316300946, 0.15865525393145707)  # P(N(0, 1) > 3) and P(N(0, 1) > 1)


class RoundedNormal(Random):
    """In training v + R with R = round(N(0, 1) / 2); nearest in eval mode.

    P(R = 0) = 0.683, P(R = +-1) = 0.157 each, P(R = +-2) = 0.0013 each: few distinct small integers, so that the sum is
    nearly always exact in the weight's own dtype. Values beyond +-2 (probability 6e-7) are left out. One uniform number
    per element decides.
    """

    def round(self, position: Tensor, key: Tensor | None) -> Tensor:
        if key is None:
            return torch.round(position)
        u, (two, one) = uniform(position, key), _TAILS
        noise = (u < one).float() + (u < two).float() - (u >= 1 - one).float() - (u >= 1 - two).float()
        return position + noise


class Integers(Format):
    """All integers: nothing saturates, since the scale covers the largest magnitude of its block.

    Args:
        bits: Bits of a stored code.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.high = float(2 ** (bits - 1) - 1)
        self.low = -self.high - 1
        self.bound = self.high
        self.code_dtype = torch.int8 if bits <= 8 else torch.int16

    def snap(self, v: Tensor, rounding: Round) -> Tensor:
        return rounding(v)

    def encode(self, q: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and q.numel() and float(q.abs().max()) > self.high:
            raise ValueError(f"a block has learned more bits than its codes of {self.bits} bits hold: decay them more")
        return q.to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32)

    def values(self) -> list[float]:
        return [float(v) for v in range(int(self.low), int(self.high) + 1)]


class LearnedBits(Static):
    """max|w| * 2^(1 - b) per block with a learned number of bits b = target + value * (first - target).

    Args:
        first: Bits at the start, where value is 1.
        target: Bits at the end, where it is 0.
    """

    learned = True
    value: nn.Parameter

    def __init__(self, *, first: float = 6.0, target: float = 4.0) -> None:
        super().__init__(None)
        self.first, self.target = first, target

    def create(self, shape: Shape) -> None:
        self.value = nn.Parameter(torch.ones(shape, dtype=torch.float32))

    def bits(self) -> Tensor:
        """The present number of bits per block, (..., 1)."""
        return self.target + self.value * (self.first - self.target)

    def observe(self, blocks: Tensor, format: Format) -> None:
        self.count.fill_(1)  # the range is that of the block at hand; nothing is gathered

    def settle(self) -> None:
        self.ready = True

    def merge(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Nothing was gathered."""

    def reset(self) -> None:
        self.count.zero_()

    def forward(self, blocks: Tensor, format: Format, ship: Ship) -> Grid:
        return Grid(ship(absmax(blocks.detach()) * torch.exp2(1 - self.bits())))


class BitDecay(ExtraLoss):
    """Pulls the learned bits to their target: adds weight * sum over layers of mean |value| over the layer's blocks.

    Args:
        weight: Strength of the pull.
    """

    def __init__(self, *, weight: float) -> None:
        super().__init__(weight=weight, name="bits")
        self._scales: list[LearnedBits] = []

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._scales = [q.scale for _, q in quantizers_of(pl_module) if isinstance(q.scale, LearnedBits)]
        if not self._scales:
            raise ValueError("no layer has learned bits: write Trainer(callbacks=GaussWS().callbacks())")

    @contextmanager
    def watch(
        self, trainer: Trainer, pl_module: LightningModule, arguments: tuple[Any, ...], options: Mapping[str, Any]
    ) -> Iterator[Callable[[], Tensor]]:
        yield lambda: torch.stack([scale.value.abs().mean() for scale in self._scales]).sum()

    def release(self) -> None:
        self._scales = []


class GaussWS(Method):
    """Pseudo-quantization: training adds rounded Gaussian noise of a rounding step's size, so no gradient is made up.

    Paper: Gaussian Weight Sampling for Scalable, Efficient and Stable Pseudo-Quantization Training (Ahn and Yoo, 2025,
    arXiv 2505.11170). The form of the exponent, the block size, the first bits and the decay of bits are from memory.

    Deviations: the sum W + R max|W| 2^(1 - b) is made in float32 and then cast to the weight's dtype. What is deployed
    is W rounded to that step in integers, not cast to a floating-point format of about as many bits; evaluation runs
    it, not the noisy weight. With accumulated gradients every micro-batch has noise of its own. The numbers of bits
    learn at QATCallback's `scale_lr`; the weight of their decay is ours.

    Args:
        first_bits: Bits at the start.
        target_bits: Bits that training decays to.
        block: Side of the square blocks that share a range and a number of bits.
        decay: Weight of the pull to `target_bits` in the loss, per layer; 0 leaves it out.
        start: When noise begins, as in QATCallback.
    """

    def __init__(
        self,
        first_bits: float = 6.0,
        target_bits: float = 4.0,
        *,
        block: int = 32,
        decay: float = 0.1,
        start: int | float = 0,
    ) -> None:
        self.first_bits, self.target_bits, self.block = first_bits, target_bits, block
        self.decay, self.start = decay, start
        if not 1 <= target_bits <= first_bits <= 7:
            raise ValueError(
                f"GaussWS(first_bits={first_bits}, target_bits={target_bits}): codes are stored in 8 bits, which cover "
                "+-2^(bits - 1) up to 7 bits; write for example GaussWS(first_bits=6, target_bits=4)"
            )

    def quantization(self) -> dict[str, Any]:
        weight = Quantizer(
            Integers(8),
            PerBlock(self.block, self.block),
            scale=LearnedBits(first=self.first_bits, target=self.target_bits),
            rounding=RoundedNormal(),
            scale_dtype=torch.float32,
        )
        return {"weight": weight, "start": self.start}

    def extras(self) -> list[Callback]:
        return [BitDecay(weight=self.decay)] if self.decay else []
