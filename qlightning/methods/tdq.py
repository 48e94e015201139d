"""TDQ: the step of activation quantizers is a small learned function of the diffusion time step."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlightning.layers.convert import quantizers_of
from qlightning.layers.scheme import Scheme
from qlightning.methods.method import Method
from qlightning.numerics import ClippedSTE, Int, Learned, LSQStep, PerTensor, Quantizer, gradients
from qlightning.numerics.conditioned import Conditioned
from qlightning.numerics.formats import Format
from qlightning.numerics.granularity import Shape
from qlightning.numerics.per_sample import PerSample
from qlightning.numerics.scales import Grid, Ship

SILU_MINIMUM = -0.2784645


def embedding(t_B: Tensor, features: int) -> Tensor:
    """Sines and cosines of time steps at geometric frequencies, (B,) -> (B, features), as denoisers have them."""
    half = features // 2
    frequencies = torch.exp(torch.arange(half, device=t_B.device) * (-math.log(10_000.0) / half))
    angles = t_B.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def _grid(scale: Tensor, lowest: float | None, format: Format) -> Grid:
    return Grid(scale) if lowest is None else Grid(scale, format.low - lowest / scale)


class TimeMLP(Conditioned):
    """softplus(MLP(embedding of t)): four linear layers, at first a constant.

    The initial step is (|mean| + spread * std) / codes over what was observed, per sample and then averaged; the last
    layer begins with weight 0 and the bias that gives it, so that the step is the same for every t at first.

    Args:
        features: Of the embedding.
        hidden: Width of the layers.
        dropout: Before the last layer, in training.
        spread: Standard deviations that the initial range covers.
        lowest: Smallest value of the input, the lower end of its range, for an asymmetric format.
    """

    total: Tensor

    def __init__(
        self,
        *,
        features: int = 128,
        hidden: int = 64,
        dropout: float = 0.2,
        spread: float = 3.0,
        lowest: float | None = None,
    ) -> None:
        super().__init__(None)
        self.features, self.hidden, self.dropout, self.spread, self.lowest = features, hidden, dropout, spread, lowest
        self.real_zero = lowest is not None

    def create(self, shape: Shape) -> None:
        sizes = [self.features, self.hidden, self.hidden, self.hidden, 1]
        for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            layer = nn.Linear(fan_in, fan_out, dtype=torch.float32)
            self.register_parameter(f"w{i}", nn.Parameter(layer.weight.detach()))
            self.register_parameter(f"b{i}", nn.Parameter(layer.bias.detach()))
        self.register_buffer("total", torch.zeros(1, dtype=torch.float32))

    @torch.no_grad()
    def observe(self, blocks: Tensor, format: Format) -> None:
        x = blocks.float()
        codes = format.high if self.lowest is None else format.high - format.low
        self.total += ((x.mean(-1).abs() + self.spread * x.std(-1)) / codes).mean()
        self.count += 1

    @torch.no_grad()
    def settle(self) -> None:
        self.check_observed()
        first = (self.total / self.count).clamp(min=1e-8)
        self.get_parameter("w3").zero_()
        self.get_parameter("b3").copy_(first + torch.log(-torch.expm1(-first)))  # the inverse of softplus
        self.ready = True

    def merge(self, reduce: Callable[[Tensor], Tensor]) -> None:
        for tensor in (self.count, self.total):
            tensor.copy_(reduce(tensor.clone()))

    def reset(self) -> None:
        self.count.zero_()
        self.total.zero_()

    def step_at(self, t_B: Tensor) -> Tensor:
        """The step at each time step, (B,) -> (B, 1), above 0."""
        t_B = t_B.to(self.total.device)
        if self.training:
            return self._network(t_B)
        # one by one, since products round differently for other batch sizes and a table must hold the very steps
        once, row = torch.unique(t_B, return_inverse=True)
        return torch.cat([self._network(t.view(1)) for t in once])[row]

    def _network(self, t_B: Tensor) -> Tensor:
        x = embedding(t_B, self.features)
        for i in range(3):
            x = F.relu(F.linear(x, self.get_parameter(f"w{i}"), self.get_parameter(f"b{i}")))
        x = F.dropout(x, self.dropout, self.training)
        step = F.softplus(F.linear(x, self.get_parameter("w3"), self.get_parameter("b3")))
        return step.clamp(min=torch.finfo(torch.float32).smallest_normal)  # softplus reaches 0 in float32

    def forward(self, blocks: Tensor, format: Format, ship: Ship) -> Grid:
        return _grid(ship(self.step_at(self.steps(blocks.shape[0]))), self.lowest, format)


class TimeTable(Conditioned):
    """What a TimeMLP says at the time steps of one sampler, as it is deployed.

    Args:
        timesteps: The sampler's, ascending.
        lowest: As of the TimeMLP.
    """

    learned = False
    values: Tensor

    def __init__(self, timesteps: Sequence[int], *, lowest: float | None = None) -> None:
        super().__init__(None)
        self.timesteps, self.lowest = list(timesteps), lowest
        self.real_zero = lowest is not None

    def create(self, shape: Shape) -> None:
        self.register_buffer("values", torch.ones((len(self.timesteps), 1), dtype=torch.float32))
        self.register_buffer("known", torch.tensor(self.timesteps), persistent=False)

    def forward(self, blocks: Tensor, format: Format, ship: Ship) -> Grid:
        steps = self.steps(blocks.shape[0]).to(self.values.device)
        known = self.get_buffer("known")
        row = torch.searchsorted(known, steps.long().contiguous()).clamp(max=len(known) - 1)
        if not torch.compiler.is_compiling() and not bool((known[row] == steps).all()):
            raise ValueError(f"no scale for time steps {steps.tolist()}: export a table for them, tables(model, steps)")
        return _grid(ship(self.values[row]), self.lowest, format)

    def observe(self, blocks: Tensor, format: Format) -> None:
        raise ValueError("a table of scales is deployed and observes nothing: calibrate the model that it was made of")

    def settle(self) -> None:
        raise ValueError("a table of scales is deployed and settles nothing: train the model that it was made of")

    def merge(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Nothing was observed."""

    def reset(self) -> None:
        """Nothing was observed."""


@torch.no_grad()
def tables(module: nn.Module, timesteps: Sequence[int]) -> int:
    """Replace the networks of a trained model by tables for a sampler's time steps, in place.

    Another number of steps needs another table of the trained model, and no training.

    Args:
        module: A model trained by TDQ.
        timesteps: All that the sampler will ask for.

    Returns:
        How many tables there are.

    Raises:
        ValueError: The model has no such networks.
    """
    ordered, made = sorted({int(t) for t in timesteps}), 0
    for _, quantizer in quantizers_of(module.eval()):
        scale = quantizer.scale
        if isinstance(scale, TimeMLP):
            table = TimeTable(ordered, lowest=scale.lowest)
            table.build((1, 1), quantizer.format)
            table.to(scale.get_buffer("total").device)
            table.values.copy_(scale.step_at(torch.tensor(ordered)))
            table.ready = True
            quantizer.scale, made = table, made + 1
    if not made:
        raise ValueError("no layer has a time-conditioned step: train with Trainer(callbacks=TDQ().callbacks())")
    return made


class TDQ(Method):
    """Activation steps of a diffusion model as small networks of the time step, deployed as a table per step.

    Paper: Temporal Dynamic Quantization for Diffusion Models (So et al., NeurIPS 2023, arXiv 2306.02316). Width,
    dropout, initial ranges and the handling of SiLU follow a public copy of the code.

    Deviations: the last layer of each network begins at zero, so that training starts from the calibrated constant.
    The initial range uses |mean| and not the mean, and comes from `calibration` steps of training, not from 100 random
    time steps. The training variant, not the one that only trains the networks (from memory). The lowest value of a
    SiLU is not rescaled under dropout.

    Args:
        bits: Bits of weights, one learned step per tensor.
        input_bits: Bits of layer inputs.
        features: Of the time step's embedding; the paper takes the denoiser's base channels.
        hidden: Width of the networks.
        dropout: In the networks, in training.
        silu: Names (globs) of layers whose input is the output of a SiLU, which has a smallest value.
        calibration: Steps in which ranges are observed, as in QATCallback.
    """

    domain = "denoising"

    def __init__(
        self,
        bits: int = 8,
        input_bits: int = 4,
        *,
        features: int = 128,
        hidden: int = 64,
        dropout: float = 0.2,
        silu: Sequence[str] = (),
        calibration: int = 8,
    ) -> None:
        self.bits, self.input_bits, self.features, self.hidden = bits, input_bits, features, hidden
        self.dropout, self.silu, self.calibration = dropout, list(silu), calibration

    def quantization(self) -> dict[str, Any]:
        weight = Quantizer(Int(self.bits), PerTensor(), scale=Learned(LSQStep()), gradient=gradients.LSQ())
        signed, positive = (Scheme(weight, input=self._input(silu=silu)) for silu in (False, True))
        rules = {"*": signed, **dict.fromkeys(self.silu, positive)}
        return {"rules": rules, "calibration": self.calibration, "scale_lr": 1.0}

    def _input(self, *, silu: bool) -> Quantizer:
        sizes: dict[str, Any] = {"features": self.features, "hidden": self.hidden, "dropout": self.dropout}
        scale = TimeMLP(**sizes, spread=16.0, lowest=SILU_MINIMUM) if silu else TimeMLP(**sizes)
        format = Int(self.input_bits, symmetric=not silu, range="full" if silu else "narrow")
        return Quantizer(format, PerSample(), scale=scale, gradient=ClippedSTE())
