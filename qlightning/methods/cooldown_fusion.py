"""Cooldown fusion: quantization begins where the learning rate begins to decay, at the compute-optimal share."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from qlightning.callbacks.phase import Spec
from qlightning.callbacks.qat import QATCallback
from qlightning.evaluation.scaling_law import plan_qat
from qlightning.methods.method import Method
from qlightning.schedules.learning_rate import Schedule, WarmupStableDecay


class CooldownFusion(Method):
    """One learning rate curve for float training and QAT: warmup, stable, and the only decay while quantized.

    The float phase has no cooldown of its own, and QAT no warmup; optimizers keep what they remember. When it begins is
    planned from the model's size, the token budget and the bits: QAT gets the share exp(-a / ln S) of the tokens, S
    tokens per byte of the quantized weights, a = 6.7297.

    Paper: Compute-Optimal Quantization-Aware Training (Dremov, Grangier, Katharopoulos and Hannun, ICLR 2026, arXiv
    2509.22935).

    Deviations: share and schedule are from secondary sources. The shape of the decay is a straight line. The paper
    reports gains from the fusion for 4 and 6 bits and claims nothing for quantized inputs. The module's own schedule
    gives way to the fused one for the length of the fit; it must be an attribute of the module (as in every task here).

    Args:
        bits: Bits per weight, for the plan.
        params: Parameters of the model.
        tokens: Tokens of the whole run.
        start: When quantization begins, an optimizer step (int) or a share of the run (float), in place of a plan.
        weight: Spec of weights, where no other method says it; for example "int4-channel-lsq".
        warmup: Length of the warmup, in steps (int) or as a share of the run (float).
        floor: The learning rate at the end, in units of the peak.
    """

    def __init__(
        self,
        bits: float = 4,
        *,
        params: float | None = None,
        tokens: float | None = None,
        start: int | float | None = None,
        weight: Spec | None = None,
        warmup: int | float = 0.05,
        floor: float = 0.0,
    ) -> None:
        self.bits, self.params, self.tokens, self.start = bits, params, tokens, start
        self.weight, self.warmup, self.floor = weight, warmup, floor

    def quantization(self) -> dict[str, Any]:
        placed = {} if self.weight is None else {"weight": self.weight}
        return {**placed, "start": self.begins()}

    def begins(self) -> int | float:
        """When quantization begins.

        Raises:
            ValueError: It is neither given nor can it be planned.
        """
        if self.start is not None:
            return self.start
        if self.params is None or self.tokens is None:
            raise ValueError(
                "when quantization begins depends on the size of the model and the length of the run: write "
                "CooldownFusion(bits=4, params=86e6, tokens=2e9), or say it, CooldownFusion(start=0.8)"
            )
        return plan_qat(params=self.params, tokens=self.tokens, bits=self.bits).start

    def extras(self) -> list[Callback]:
        return [FusedCooldown(WarmupStableDecay(self.warmup, "qat", self.floor))]


class FusedCooldown(Callback):
    """Gives a module another learning rate schedule for the length of a fit.

    Args:
        schedule: The schedule; its moment "qat" is the step at which the QATCallback begins to quantize.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._own: tuple[str, Schedule] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        kept = {name: value for name, value in vars(pl_module).items() if isinstance(value, Schedule)}
        if len(kept) != 1:
            raise ValueError(
                f"{type(pl_module).__name__} keeps {len(kept)} learning rate schedules as attributes, and the cooldown "
                "can be fused with QAT in just one: write self.schedule = Constant() in its constructor and use it in "
                "configure_optimizers, as qlightning.tasks do"
            )
        ((name, own),) = kept.items()
        qat = next((found for found in trainer.callbacks if isinstance(found, QATCallback)), None)  # type: ignore[attr-defined]
        if qat is None:
            raise ValueError(
                "there is no QATCallback whose start the cooldown could be fused with: write "
                "Trainer(callbacks=[*CooldownFusion().callbacks()]), or compose(LSQ(), CooldownFusion())"
            )
        self.schedule.bind(lambda: qat.timeline(trainer).start)
        setattr(pl_module, name, self.schedule)
        self._own = name, own
        rank_zero_info(f"CooldownFusion: {self.schedule!r} in place of the module's {own!r}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._give_back(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._give_back(pl_module)

    def _give_back(self, pl_module: LightningModule) -> None:
        if self._own is not None:
            name, own = self._own
            setattr(pl_module, name, own)
            self._own = None
        self.schedule.bind(None)
