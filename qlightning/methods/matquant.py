"""MatQuant: one 8-bit model whose top bits are good models of fewer bits."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from qlightning.callbacks.extra_loss import ExtraLoss, loss_in, own_step
from qlightning.layers.layer import SUFFIX, Twin
from qlightning.layers.rules import Rules
from qlightning.losses.soft import KL
from qlightning.losses.taps import ITSELF, Taps, sites
from qlightning.methods.method import Method
from qlightning.numerics.formats import Format, Round
from qlightning.numerics.granularity import granularity_of
from qlightning.numerics.quantizer import Quantizer


class Sliced(Format):
    """The top bits of an unsigned integer of `stored` bits, on the stored grid: multiples of 2^(stored - bits).

    S(q) = clamp(floor(q / 2^(stored - bits) + 1/2), 0, 2^bits - 1) * 2^(stored - bits): rounded with carry and not
    merely shifted. Codes are counted from the lowest stored one, -2^(stored - 1), so that zero points stay in range.

    >>> Sliced(2).snap(torch.tensor([-128.0, -90.0, 0.0, 127.0]), torch.round) + 128
    tensor([  0.,  64., 128., 192.])

    Args:
        bits: Bits that are kept.
        stored: Bits that are stored.
        extra: Keep the code 2^bits too, to which the largest values carry ("Extra-Precision"): bits + 1 to store.
    """

    symmetric = False
    code_dtype = torch.int16

    def __init__(self, bits: int, *, stored: int = 8, extra: bool = False) -> None:
        if not 1 <= bits <= stored <= 8:
            raise ValueError(f"Sliced({bits}, stored={stored}): 1 to `stored` bits of at most 8, for example Sliced(4)")
        self.kept, self.stored, self.extra = bits, stored, extra
        self.unit = 2 ** (stored - bits)
        self.low, self.high = -float(2 ** (stored - 1)), float(2 ** (stored - 1) - 1)
        self.bound = (self.high - self.low) / 2
        self.bits = bits + (extra and bits < stored)

    def arguments(self) -> dict[str, Any]:
        changed = {"stored": self.stored} if self.stored != 8 else {}
        return {"bits": self.kept, **changed, **({"extra": True} if self.extra else {})}

    def snap(self, v: Tensor, rounding: Round) -> Tensor:
        stored = rounding(v).clamp_(self.low, self.high) - self.low
        top = torch.floor(stored / self.unit + 0.5)
        return (top if self.extra else top.clamp(max=2**self.kept - 1)) * self.unit + self.low

    def encode(self, q: Tensor) -> Tensor:
        return ((q - self.low) / self.unit).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32) * self.unit + self.low

    def values(self) -> list[float]:
        return [float(k * self.unit + self.low) for k in range(2**self.kept + (self.extra and self.kept < self.stored))]


def set_bits(module: nn.Module, bits: Mapping[str, int] | int) -> dict[str, int]:
    """Keep so many of the stored bits in each layer, without training ("Mix'n'Match").

    Args:
        module: A model trained by MatQuant. A Trainer that validates it afterwards must not hold the QATCallback of its
            training, which would ask for the bits that were trained.
        bits: By name glob, the last that matches deciding as in QATCallback's rules; a number for all.

    Returns:
        The bits of each layer.

    Raises:
        ValueError: There is no such layer, or it has no nested weight.
    """
    found = {name: q for name, layer in module.named_modules() for q in _nested(layer)}
    if not found:
        raise ValueError("no layer has nested weights: train with Trainer(callbacks=MatQuant().callbacks())")
    by_pattern = {"*": bits} if isinstance(bits, int) else dict(bits)
    rules = Rules({pattern: f"int{n}" if n > 1 else "binary" for pattern, n in by_pattern.items()})
    chosen = {}
    for name, quantizer in found.items():
        pattern, scheme = rules.decide(name, "")
        if scheme is not None:
            quantizer.become(_at(quantizer, by_pattern[pattern]))
        assert isinstance(quantizer.format, Sliced)
        chosen[name] = quantizer.format.kept
    rules.check_used(dict.fromkeys(found, ""), {})
    return chosen


def _nested(layer: nn.Module) -> Iterator[Quantizer]:
    quantizer = layer.quantizer("weight") if isinstance(layer, Twin) else None
    if isinstance(quantizer, Quantizer) and isinstance(quantizer.format, Sliced):
        yield quantizer


def _at(quantizer: Quantizer, bits: int) -> Quantizer:
    """The same quantizer at other bits, with the present one's switches."""
    assert isinstance(quantizer.format, Sliced)
    other = copy.deepcopy(quantizer)
    other.format = Sliced(bits, stored=quantizer.format.stored, extra=quantizer.format.extra)
    return other


class NestedLosses(ExtraLoss):
    """The loss at lower bits of the same weights, on the same batch: sum of weights[r] * loss at r bits.

    The task's own loss is that at the highest bits. A layer's backward asks the quantizer it ran with, so each
    precision has a quantizer object of its own, which sits in its place while that precision runs.

    Args:
        weights: By number of bits; the highest is what the module computes otherwise.
        codistill: Share of the loss at lower bits that is the divergence from the highest bits' output.
    """

    def __init__(self, weights: Mapping[int, float], *, codistill: float = 0.0) -> None:
        self.highest, *self.lower = sorted(weights, reverse=True)
        super().__init__(weight=1.0, name="nested", task_weight=weights[self.highest])
        self.weights, self.codistill = dict(weights), codistill
        self._layers: list[Twin] = []

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._layers = [layer for layer in pl_module.modules() if isinstance(layer, Twin) and any(_nested(layer))]
        if not self._layers:
            raise ValueError("no layer has nested weights: write Trainer(callbacks=MatQuant().callbacks())")

    @contextmanager
    def watch(
        self, trainer: Trainer, pl_module: LightningModule, arguments: tuple[Any, ...], options: Mapping[str, Any]
    ) -> Iterator[Callable[[], Tensor]]:
        (itself,) = sites(pl_module, ITSELF)
        with Taps([itself] if self.codistill else []) as highest:
            yield lambda: self._sum(pl_module, arguments, options, highest)

    def _sum(
        self, pl_module: LightningModule, arguments: tuple[Any, ...], options: Mapping[str, Any], highest: Taps
    ) -> Tensor:
        if not any(quantizer.enabled for layer in self._layers for quantizer in _nested(layer)):
            return torch.zeros((), device=pl_module.device)  # all precisions are the float model still
        (itself,) = sites(pl_module, ITSELF)
        terms = []
        for bits in self.lower:
            with self._running_at(bits), Taps([itself] if self.codistill else []) as taps:
                loss = loss_in(own_step(pl_module)(*arguments, **options))
            if self.codistill:
                (student,), (teacher,) = taps.outputs(itself, trained=True), highest.outputs(itself, trained=True)
                loss = (1 - self.codistill) * loss + self.codistill * KL()(student, teacher.detach())
            terms.append(self.weights[bits] * loss)
        return torch.stack(terms).sum()

    @contextmanager
    def _running_at(self, bits: int) -> Iterator[None]:
        place = f"weight{SUFFIX}"
        own = [layer._modules[place] for layer in self._layers]
        try:
            for layer, quantizer in zip(self._layers, own, strict=True):
                assert isinstance(quantizer, Quantizer)
                layer._modules[place] = _at(quantizer, bits)
            yield
        finally:
            for layer, quantizer in zip(self._layers, own, strict=True):
                layer._modules[place] = quantizer

    def release(self) -> None:
        self._layers = []


class MatQuant(Method):
    """Nested bits: weights trained so that the top 4 and the top 2 bits of their 8 are good weights too.

    Paper: Matryoshka Quantization (Nair et al., ICML 2025, arXiv 2502.06786). Formulas and default weights are from
    memory.

    Deviations: every linear layer is nested unless `layers` names some (the paper: the feed-forward ones). The base is
    QAT with min-max ranges (zero included, zero points rounded), not OmniQuant. Each step runs the module once per
    precision; activations of all of them live until backward.

    Args:
        bits: Precisions that are trained together; the first is what is stored.
        weights: Of their losses, in the same order.
        codistill: Share of the loss at lower bits that is the KL divergence from the highest bits' output.
        extra: Keep the overflow code of each slice ("Extra-Precision").
        granularity: What shares a range: "channel" or a group size.
        layers: Name globs of the layers that are nested, for example ["*.mlp.*"]; all when not given.
        start: When quantization begins, as in QATCallback.
    """

    def __init__(
        self,
        bits: tuple[int, ...] = (8, 4, 2),
        weights: tuple[float, ...] = (0.1, 0.1, 1.0),
        *,
        codistill: float = 0.0,
        extra: bool = False,
        granularity: Literal["channel"] | int = "channel",
        layers: list[str] | None = None,
        start: int | float = 0,
    ) -> None:
        self.bits, self.weights, self.codistill, self.extra = tuple(bits), tuple(weights), codistill, extra
        self.granularity, self.layers, self.start = granularity, layers, start
        if len(self.bits) != len(self.weights) or len(self.bits) < 2 or list(self.bits) != sorted(self.bits)[::-1]:
            raise ValueError(
                f"MatQuant(bits={bits}, weights={weights}): falling numbers of bits with a weight each, for example "
                "MatQuant(bits=(8, 4, 2), weights=(0.1, 0.1, 1.0))"
            )

    def quantization(self) -> dict[str, Any]:
        highest = self.bits[0]
        weight = Quantizer(Sliced(highest, stored=highest, extra=self.extra), granularity_of(self.granularity))
        if self.layers is None:
            return {"weight": weight, "start": self.start}
        return {"rules": dict.fromkeys(self.layers, weight), "start": self.start, "min_coverage": 0.0}

    def extras(self) -> list[Callback]:
        return [NestedLosses(dict(zip(self.bits, self.weights, strict=True)), codistill=self.codistill)]
