"""Scales that depend on what a model is told beside its input: the time step of a diffusion model.

The model's own forward publishes its time step (`layers/timestep.py`) to all such scales in it before it runs, so that
nobody counts calls: guidance, samplers, validation at random times and a resumed run all see the scale of their step.
"""

from abc import ABC
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from qlightning.numerics.formats import Format
from qlightning.numerics.granularity import Shape
from qlightning.numerics.learned import Static
from qlightning.numerics.scales import Grid, Measured, Ship, zero_point


class Conditioned(Static, ABC):
    """A scale that is a learned function of a time step, for blocks with one sample each (`PerSample`).

    Attributes:
        context: (samples,) or (1,) time steps, of the forward pass that is running; None before the first.
    """

    learned = True
    context: Tensor | None = None

    def steps(self, samples: int) -> Tensor:
        """(samples,) time steps of a batch.

        Raises:
            ValueError: None was published, or as many as suit another batch.
        """
        if self.context is None:
            raise ValueError(
                f"{type(self).__name__} was told no time step: call the converted model whose forward has a `timestep` "
                "and not layers in it, or say qlightning.numerics.conditioned.publish(model, timestep) before"
            )
        if self.context.numel() not in (1, samples):
            raise ValueError(
                f"{self.context.numel()} time steps were published for a batch of {samples}: give the model one, or "
                "one for every sample"
            )
        return self.context.expand(samples)


def conditioned(module: nn.Module) -> Iterator[Conditioned]:
    """The conditioned scales in a module."""
    return (scale for scale in module.modules() if isinstance(scale, Conditioned))


def publish(module: nn.Module, timestep: Tensor | float) -> None:
    """Tell all conditioned scales in a module the time step, or that of each sample, of the pass that follows."""
    for scale in conditioned(module):
        scale.context = torch.as_tensor(timestep).detach().reshape(-1)


class StepTable(Conditioned):
    """A learned step (and lower end) for each of a sampler's steps: vectors of length T.

    A time step t of `timesteps` belongs to row floor(t * T / timesteps): for a sampler of T evenly spaced steps, its
    own one. A sampler of fewer steps uses the rows that its steps fall into.

    Args:
        rows: T, the number of the sampler's steps.
        timesteps: Number of the model's time steps.
        source: The rule that gives the initial step, of all rows alike; absmax (or min-max) when not given.
    """

    value: nn.Parameter
    lower: nn.Parameter | None
    total_value: Tensor
    total_lower: Tensor | None

    def __init__(self, rows: int, *, timesteps: int = 1000, source: Measured | None = None) -> None:
        super().__init__(source)
        if not 1 <= rows <= timesteps:
            raise ValueError(
                f"StepTable({rows}, timesteps={timesteps}): from 1 row to one for every time step, for example "
                "StepTable(100, timesteps=1000)"
            )
        self.rows, self.timesteps = rows, timesteps

    def create(self, shape: Shape) -> None:
        self.value = nn.Parameter(torch.ones((self.rows, 1), dtype=torch.float32))
        lower = nn.Parameter(torch.zeros((self.rows, 1), dtype=torch.float32)) if self.offset else None
        self.register_parameter("lower", lower)
        self.register_buffer("total_value", torch.zeros(1, dtype=torch.float32))
        self.register_buffer("total_lower", torch.zeros(1, dtype=torch.float32) if self.offset else None)

    def row(self, samples: int) -> Tensor:
        """(samples,) rows of a batch's time steps."""
        steps = self.steps(samples).to(self.value.device)
        return (steps.float() * self.rows / self.timesteps).long().clamp(0, self.rows - 1)

    @torch.no_grad()
    def observe(self, blocks: Tensor, format: Format) -> None:
        scale, lower = self.measure(blocks.reshape(1, -1), format)
        self.total_value += scale.flatten()
        if self.total_lower is not None and lower is not None:
            self.total_lower += lower.flatten()
        self.count += 1

    @torch.no_grad()
    def settle(self) -> None:
        self.check_observed()
        self.value.copy_((self.total_value / self.count).expand_as(self.value))
        if self.lower is not None and self.total_lower is not None:
            self.lower.copy_((self.total_lower / self.count).expand_as(self.lower))
        self.ready = True

    def merge(self, reduce: Callable[[Tensor], Tensor]) -> None:
        for tensor in (self.count, self.total_value, self.total_lower):
            if tensor is not None:
                tensor.copy_(reduce(tensor.clone()))

    def reset(self) -> None:
        for tensor in (self.count, self.total_value, self.total_lower):
            if tensor is not None:
                tensor.zero_()

    def forward(self, blocks: Tensor, format: Format, ship: Ship) -> Grid:
        row = self.row(blocks.shape[0])
        scale = ship(self.value[row].abs())
        if self.lower is None:
            return Grid(scale)
        exact = zero_point(self.lower[row], scale, format)
        return Grid(scale, exact + (exact.clamp(format.low, format.high) - exact).detach())
