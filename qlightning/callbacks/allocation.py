"""AllocationCallback: bits by layer, found when quantization begins, inside the budget.

Quantizers exist from conversion on, at the finest candidate; what is found only changes their format. So optimizers,
sharding and checkpoints know everything from the start, and a resumed run has its bits from the checkpoint.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from qlightning.allocation.program import Allocation, Cost, allocate
from qlightning.allocation.sensitivity import measure_sensitivity
from qlightning.callbacks.averages import tell_averages
from qlightning.callbacks.batches import CalibrationBatches
from qlightning.callbacks.stages import load_in_stage
from qlightning.layers.coverage import public_name
from qlightning.layers.layer import Twin
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.spec import describe, parse, rebuild, unparse
from qlightning.optim.weights import weights_of


def staged(candidates: Sequence[str | Quantizer]) -> Quantizer:
    """The quantizer to convert with, for `QATCallback(weight=...)`: the finest candidate, which can become each other.

    Raises:
        ValueError: There are fewer than two, or one cannot become another in mid-training.
    """
    quantizers = [parse(spec) if isinstance(spec, str) else spec for spec in candidates]
    if len(quantizers) < 2:
        raise ValueError(f"candidates={list(candidates)!r}: at least two, for example ['int2-channel', 'int4-channel']")
    finest = max(quantizers, key=lambda quantizer: quantizer.format.bits)
    shared = finest.granularity
    smallest = getattr(shared, "rows", 1), getattr(shared, "size", getattr(shared, "columns", 8))
    for quantizer in quantizers:
        trial = copy.deepcopy(finest)
        trial.build(smallest)  # a scale that is state must be there to change
        trial.become(quantizer)
    built = copy.deepcopy(finest)
    built.stages = (finest, *(quantizer for quantizer in quantizers if quantizer is not finest))
    return built


class AllocationCallback(Callback):
    """Measures every layer at every candidate when quantization begins, and gives each the bits that the budget allows.

    Stands after a QATCallback whose weight is `staged(candidates)`. One layer at a time becomes a candidate while the
    others stay at the finest; the loss is that of `training_step`, in eval mode, on the first batches of the training
    data (all of `datamodule.calibration_dataloader()`, where there is one).

    Args:
        candidates: Specs of weights with one granularity and kind of scale.
        budget: Bits per weight of the quantized layers, scales and zero points included; or, of "bit_operations": as
            many of them as if all these weights had so many bits.
        of: What the budget is of, "bytes" or "bit_operations".
        batches: Number of batches the loss is measured on.

    Attributes:
        allocation: The spec of every layer, once found.
    """

    def __init__(
        self,
        candidates: Sequence[str | Quantizer] = ("int2-channel", "int4-channel", "int8-channel"),
        budget: float = 4.0,
        *,
        of: Cost = "bytes",
        batches: int = 4,
    ) -> None:
        if not budget > 0 or batches < 1 or of not in ("bytes", "bit_operations"):
            raise ValueError(
                f"budget={budget}, of={of!r}, batches={batches}: for example AllocationCallback(budget=4.0, "
                "of='bytes', batches=4), in bits per weight"
            )
        staged(candidates)
        self.candidates = [parse(spec) if isinstance(spec, str) else spec for spec in candidates]
        self.budget, self.of, self.batches = budget, of, batches
        self.allocation: dict[str, str] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.allocation = {}
            pl_module.load_state_dict = load_in_stage(pl_module)  # type: ignore[method-assign]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.allocation or not any(True for _ in weights_of(pl_module)):
            return
        found = self._find(trainer, pl_module)
        rules = {name: describe(spec) for name, spec in found.rules.items() if isinstance(spec, Quantizer)}
        self.allocation = trainer.strategy.broadcast(rules)
        tell_averages(trainer, pl_module, list(self._apply(pl_module)))
        rank_zero_info(
            f"AllocationCallback: {found.cost:,} {self.of}, predicted increase of the loss {found.increase:.3g}\n"
            + "\n".join(f"  {name}  {_shown(spec)}" for name, spec in self.allocation.items())
        )

    def _find(self, trainer: Trainer, pl_module: LightningModule) -> Allocation:
        for weight in weights_of(pl_module):
            if not isinstance(weight.quantizer, Quantizer) or not any(
                map(weight.quantizer.deploys_like, self.candidates)
            ):
                raise ValueError(
                    f"{weight.name} is quantized with {weight.quantizer!r}, which is no candidate: write "
                    "QATCallback(weight=staged(candidates)) and AllocationCallback(candidates), or a method, "
                    "IntegerAllocation(candidates, budget=4.0).callbacks()"
                )
        with _silent(pl_module), trainer.precision_plugin.train_step_context():
            options = measure_sensitivity(
                pl_module,
                _training_loss,
                CalibrationBatches(trainer, self.batches),
                candidates=self.candidates,
                others="quantized",
            )
        if self.of == "bytes":
            unit = sum(weight.parameter.numel() for weight in weights_of(pl_module)) / 8
        else:  # by one bit
            unit = sum(row[0].bit_operations / self.candidates[0].format.bits for row in options.values())
        return allocate(options, budget=self.budget * unit, of=self.of)

    @torch.no_grad()
    def _apply(self, pl_module: LightningModule) -> Iterator[Quantizer]:
        """Let every quantizer become what was found for its layer; settles scales that are state."""
        done: set[int] = set()
        for name, layer in pl_module.named_modules():
            for prefix in layer.weights() if isinstance(layer, Twin) else ():
                assert isinstance(layer, Twin)
                quantizer = layer.quantizer(prefix)
                if (
                    not isinstance(quantizer, Quantizer)
                    or id(quantizer) in done
                    or public_name(name) not in self.allocation
                ):
                    continue
                done.add(id(quantizer))
                chosen = rebuild(self.allocation[public_name(name)])
                if not quantizer.deploys_like(chosen):
                    quantizer.become(chosen)
                    quantizer.initialize(layer.weights()[prefix].detach())
                    yield quantizer

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        vars(pl_module).pop("load_state_dict", None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        vars(pl_module).pop("load_state_dict", None)

    def state_dict(self) -> dict[str, Any]:
        return {"allocation": dict(self.allocation)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.allocation = dict(state_dict["allocation"])


def _shown(described: str) -> str:
    quantizer = rebuild(described)
    return unparse(quantizer) or repr(quantizer)


def _training_loss(module: Any, batch: Any) -> Tensor:
    output = module.training_step(batch, 0)
    loss = output["loss"] if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise ValueError(f"{type(module).__name__}.training_step returned no loss to measure layers by")
    return loss


@contextmanager
def _silent(module: LightningModule) -> Iterator[None]:
    """Without what training_step logs."""
    own = {name: vars(module).get(name) for name in ("log", "log_dict")}
    for name in own:
        setattr(module, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for name, value in own.items():
            delattr(module, name)
            if value is not None:
                setattr(module, name, value)
