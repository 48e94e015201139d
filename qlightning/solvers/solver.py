"""The two kinds of solver. Both know neither Trainer nor model: the engine hands them what they need."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from qlightning.capture import Call, Site, device_of, fetched
from qlightning.numerics.part import Part
from qlightning.numerics.quantizer import Quantizer
from qlightning.solvers.moments import Moments
from qlightning.solvers.share import ALONE, Share

StreamName = Literal["q", "fp"]
"""The activations of the model calibrated so far ("q") or of the float model ("fp")."""


class Solver(Part, ABC):
    """What all solvers are asked.

    Attributes:
        final: Whether its solutions lie on no grid of the layer's quantizer, so that training cannot go on from them.

    Args:
        batches: Number of batches of calibration data.
        seed: What random numbers are drawn from: the solver's and those of the forward passes.
    """

    final: ClassVar[bool] = False

    def __init__(self, *, batches: int, seed: int) -> None:
        if batches < 1:
            raise ValueError(f"{type(self).__name__}(batches={batches}): at least one, for example batches=16")
        self.batches, self.seed = batches, seed


class SiteSolution(NamedTuple):
    """What a solver found for one weight.

    Attributes:
        values: float32 (output channels, fan-in), the quantized weight.
        damping: What was added to the diagonal of the Hessian, in units of its mean.
        on_grid: Whether the values lie on the grid of the layer's own quantizer.
        state: What a solution off that grid is stored as, tensors by name.
    """

    values: Tensor
    damping: float = 0.0
    on_grid: bool = True
    state: Mapping[str, Tensor] = {}


class SiteSolver(Solver, ABC):
    """Finds one quantized weight from the moments of its inputs.

    Args:
        stream: Whose activations the moments are of.
        refresh: How often they are taken anew inside a block: for every "group" of weights with one input, after those
            before it have been solved ("true sequential"), or once per "block". Makes no difference to "fp".
        commit: What the trained weight becomes: the solution's "values" (a frozen model, or where training starts), or
            "residual": of the difference to the float weight as much is left as does not change any code (at most 0.49
            steps), so that training starts from the same quantized weight with its sub-step information.
        batches: As for `Solver`.
        seed: As for `Solver`.
    """

    def __init__(
        self,
        *,
        stream: StreamName,
        refresh: Literal["group", "block"],
        commit: Literal["values", "residual"],
        batches: int,
        seed: int,
    ) -> None:
        super().__init__(batches=batches, seed=seed)
        for name, value, known in (
            ("stream", stream, ("q", "fp")),
            ("refresh", refresh, ("group", "block")),
            ("commit", commit, ("values", "residual")),
        ):
            if value not in known:
                raise ValueError(f"{type(self).__name__}({name}={value!r}): write {' or '.join(map(repr, known))}")
        self.stream, self.refresh, self.commit = stream, refresh, commit

    @abstractmethod
    def solve(
        self, weight: Tensor, moments: Moments, *, quantizer: Quantizer, generator: torch.Generator
    ) -> SiteSolution:
        """The quantized weight. Invariant to the scale of the moments.

        Args:
            weight: (output channels, fan-in), of the model's dtype.
            moments: Of the inputs; g groups mean that the output channels are g groups with inputs of their own.
            quantizer: The layer's, with a scale that is settled and stays.
            generator: On the CPU; whatever is drawn is drawn from it.
        """


class BlockTask(NamedTuple):
    """One block to be optimised as a whole.

    Attributes:
        block: The block; its quantizers are off, its parameters frozen, gradients enabled.
        groups: Its quantized weights in the order in which they run, those with one input together.
        inputs: By stream, the block's arguments for every batch of this process, on the CPU.
        targets: By stream, what the float block returns for them: its main output, on the CPU.
        share: Which of all batches these are. All processes solve alike, and must find the same.
    """

    block: nn.Module
    groups: Sequence[Sequence[Site]]
    inputs: Mapping[str, Sequence[Call]]
    targets: Mapping[str, Sequence[Tensor]]
    share: Share = ALONE

    def run(self, call: Call) -> Tensor:
        """The block's main output for stored arguments."""
        args, kwargs = fetched(call, device_of(self.block))
        return main_output(self.block(*args, **kwargs))

    def run_all(self, stream: str) -> None:
        """Run the block on every call of a stream, for what hooks see."""
        for call in self.inputs[stream]:
            self.run(call)


class BlockSolver(Solver, ABC):
    """Optimises chosen parameters of a block against what the float block returns.

    Args:
        targets: Streams on which the float block is run for targets.
        batches: As for `Solver`.
        seed: As for `Solver`.
    """

    def __init__(self, *, targets: Sequence[StreamName], batches: int, seed: int) -> None:
        super().__init__(batches=batches, seed=seed)
        self.targets = tuple(targets)

    @abstractmethod
    def solve(self, task: BlockTask, *, generator: torch.Generator) -> Mapping[str, str] | None:
        """Change parameters and settled scales of the block in place, so that its quantizers do what was found.

        Runs with gradients enabled and every parameter frozen; what it unfreezes is frozen again afterwards. Every
        weight quantizer of the block acts from then on.

        Returns:
            What the report should say of single weights, by name, or None.
        """


def main_output(output: Any) -> Tensor:
    """The first floating-point tensor of what a block returns."""
    from torch.utils._pytree import tree_leaves

    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())
