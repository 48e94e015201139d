"""AllocationCallback: bits by layer, found when quantization begins, inside the budget.

Quantizers exist from conversion on, at the finest candidate; what is found only changes their format. So optimizers,
sharding and checkpoints know everything from the start, and a resumed run has its bits from the checkpoint.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeGuard

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from qlightning.allocation.program import Allocation, Cost, allocate
from qlightning.allocation.sensitivity import Versions, measure_sensitivity
from qlightning.callbacks.averages import tell_averages
from qlightning.callbacks.batches import CalibrationBatches
from qlightning.callbacks.extra_loss import loss_in
from qlightning.callbacks.loading import load_state_dict
from qlightning.callbacks.phase import Spec
from qlightning.callbacks.qat import QATCallback
from qlightning.callbacks.stages import enter_stages
from qlightning.evaluation.modes import silent
from qlightning.layers.convert import quantizers_of
from qlightning.layers.coverage import kind_of, public_name
from qlightning.layers.layer import Twin
from qlightning.layers.rules import Rules
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.spec import describe, parse, rebuild, unparse
from qlightning.numerics.tensor_quantizer import TensorQuantizer
from qlightning.optim.weights import weights_of
from qlightning.solvers.solver import Solver
from qlightning.solvers.versions import check_static, solve_versions, take_version


def finest(candidates: Sequence[Spec]) -> Quantizer:
    """The candidate with the most bits, for `QATCallback(weight=...)`: it can become each of the others.

    Raises:
        ValueError: There are fewer than two, or one cannot become another in mid-training.
    """
    quantizers = _parsed(candidates)
    if len(quantizers) < 2:
        raise ValueError(f"candidates={list(candidates)!r}: at least two, for example ['int2-channel', 'int4-channel']")
    first = max(quantizers, key=lambda quantizer: quantizer.format.bits)
    shared = first.granularity
    smallest = getattr(shared, "rows", 1), getattr(shared, "size", getattr(shared, "columns", 8))
    for quantizer in quantizers:
        trial = copy.deepcopy(first)
        trial.build(smallest)  # a scale that is state must be there to change
        trial.become(quantizer)
    return copy.deepcopy(first)


def _parsed(candidates: Sequence[Spec]) -> list[Quantizer]:
    parsed = []
    for spec in candidates:
        quantizer = parse(spec) if isinstance(spec, str) else spec
        if not isinstance(quantizer, Quantizer):
            raise ValueError(f"candidate {spec!r} has a format that cannot change in a run: write 'int4-channel', say")
        parsed.append(quantizer)
    return parsed


class AllocationCallback(Callback):
    """Measures every layer at every candidate when quantization begins, and gives each the bits that the budget allows.

    Stands after a QATCallback whose weight is `finest(candidates)`. One layer at a time becomes a candidate while the
    others stay at the finest; the loss is that of `training_step`, in eval mode, on the first batches of the training
    data (all of `datamodule.calibration_dataloader()`, where there is one).

    Args:
        candidates: Specs of weights with one granularity and kind of scale.
        budget: Bits per weight of the quantized layers, scales and zero points included; or, of "bit_operations": as
            many of them as if all these weights had so many bits.
        of: What the budget is of, "bytes" or "bit_operations".
        batches: Number of batches the loss is measured on.
        solver: Finds each weight at each candidate before it is measured, in place of rounding to nearest; what was
            found for the chosen ones is what training goes on from. Candidates then have scales that are state.

    Attributes:
        allocation: The spec of every layer, once found.
    """

    def __init__(
        self,
        candidates: Sequence[Spec] = ("int2-channel", "int4-channel", "int8-channel"),
        budget: float = 4.0,
        *,
        of: Cost = "bytes",
        batches: int = 4,
        solver: Solver | None = None,
    ) -> None:
        if not budget > 0 or batches < 1 or of not in ("bytes", "bit_operations"):
            raise ValueError(
                f"budget={budget}, of={of!r}, batches={batches}: for example AllocationCallback(budget=4.0, "
                "of='bytes', batches=4), in bits per weight"
            )
        finest(candidates)
        self.candidates = _parsed(candidates)
        self.budget, self.of, self.batches, self.solver = budget, of, batches, solver
        if solver is not None:
            check_static(self.candidates)
        self._versions: list[Versions] | None = None
        self.allocation: dict[str, str] = {}

    # --- checkpoints hold any candidate ---

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.allocation = {}
            # bound, so that a deep copy of the module has one of its own
            pl_module.load_state_dict = MethodType(self._load, pl_module)  # type: ignore[method-assign]

    def _load(self, module: LightningModule, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        with self._any_candidate(module):
            enter_stages(module, state_dict)
            return load_state_dict(module, state_dict, *args, **kwargs)

    @contextmanager
    def _any_candidate(self, *modules: nn.Module) -> Iterator[None]:
        offered = [q for module in modules for _, q in quantizers_of(module) if self._is_candidate(q)]
        for quantizer in offered:
            quantizer.stages = tuple(self.candidates)
        try:
            yield
        finally:
            for quantizer in offered:
                quantizer.stages = ()

    def _is_candidate(self, quantizer: TensorQuantizer) -> TypeGuard[Quantizer]:
        return isinstance(quantizer, Quantizer) and any(map(quantizer.deploys_like, self.candidates))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not any(isinstance(callback, QATCallback) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                "AllocationCallback gives bits to the weights that a QATCallback quantizes: "
                "Trainer(callbacks=IntegerAllocation().callbacks()), or a QATCallback beside it"
            )
        if self.allocation:  # from a checkpoint
            self._tell_rules(trainer, pl_module)

    # --- the moment it is found ---

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.allocation or not any(True for _ in weights_of(pl_module)):
            return
        found = self._find(trainer, pl_module)
        rules = {name: describe(spec) for name, spec in found.rules.items() if isinstance(spec, Quantizer)}
        self.allocation = trainer.strategy.broadcast(rules)
        changed = list(self._apply(pl_module))
        with self._any_candidate(*averages_of(trainer)):
            tell_averages(trainer, pl_module, changed)
        self._tell_rules(trainer, pl_module)
        rank_zero_info(
            f"AllocationCallback: {found.cost:,} {self.of}, predicted increase of the loss {found.increase:.3g}\n"
            + "\n".join(f"  {name}  {_shown(spec)}" for name, spec in self.allocation.items())
        )

    def _tell_rules(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the QATCallback convert like this from now on: for `trainer.test` after the fit, say."""
        qat = next(callback for callback in trainer.callbacks if isinstance(callback, QATCallback))  # type: ignore[attr-defined]
        before, layers = Rules(qat.rules), {public_name(name): layer for name, layer in pl_module.named_modules()}
        for name, described in self.allocation.items():
            _, scheme = before.decide(name, kind_of(layers[name]))
            scheme = copy.copy(scheme)
            assert scheme is not None
            scheme.weight = rebuild(described)
            qat.rules = {**qat.rules, name: scheme}

    def _find(self, trainer: Trainer, pl_module: LightningModule) -> Allocation:
        for weight in weights_of(pl_module):
            if not self._is_candidate(weight.quantizer):
                raise ValueError(
                    f"{weight.name} is quantized with {weight.quantizer!r}, which is no candidate: write "
                    "QATCallback(weight=finest(candidates)) and AllocationCallback(candidates), or a method, "
                    "IntegerAllocation(candidates, budget=4.0).callbacks()"
                )
        if self.solver is not None:
            self._versions = self._solve(trainer, pl_module, self.solver)
        with silent(pl_module), trainer.precision_plugin.train_step_context():
            options = measure_sensitivity(
                pl_module,
                lambda module, batch: trainer.strategy.reduce(_training_loss(module, batch), reduce_op="mean"),
                CalibrationBatches(trainer, self.batches),
                candidates=self.candidates,
                others="quantized",
                versions=self._versions,
            )
        if self.of == "bytes":
            unit = sum(weight.parameter.numel() for weight in weights_of(pl_module)) / 8
        else:  # by one bit
            unit = sum(row[0].bit_operations / self.candidates[0].format.bits for row in options.values())
        return allocate(options, budget=self.budget * unit, of=self.of)

    def _solve(self, trainer: Trainer, pl_module: LightningModule, solver: Solver) -> list[Versions]:
        batches = CalibrationBatches(trainer, solver.batches)
        return solve_versions(pl_module, batches, solver, self.candidates)

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
                elif self._versions is None:
                    continue
                if self._versions is not None:
                    index = next(i for i, spec in enumerate(self.candidates) if spec.deploys_like(chosen))
                    take_version(layer, prefix, self._versions[index][id(layer), prefix])
                yield quantizer
        self._versions = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        vars(pl_module).pop("load_state_dict", None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        vars(pl_module).pop("load_state_dict", None)

    def state_dict(self) -> dict[str, Any]:
        return {"allocation": dict(self.allocation)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.allocation = dict(state_dict["allocation"])


def averages_of(trainer: Trainer) -> Iterator[nn.Module]:
    """Averaged copies of the module that callbacks keep."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            yield average.module if isinstance(average, AveragedModel) else average


def _shown(described: str) -> str:
    quantizer = rebuild(described)
    return unparse(quantizer) or repr(quantizer)


def _training_loss(module: Any, batch: Any) -> Tensor:
    loss = loss_in(module.training_step(batch, 0))
    if not isinstance(loss, Tensor):
        raise ValueError(f"{type(module).__name__}.training_step returned no loss to measure layers by")
    return loss
