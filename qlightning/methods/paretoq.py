"""ParetoQ: one recipe from four bits down to one, with a grid, a start and gradients for each width."""

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from qlightning.methods.method import Method
from qlightning.numerics import (
    LSQ,
    AbsMax,
    AbsMean,
    Binary,
    Format,
    Gradient,
    Int,
    Learned,
    Measured,
    Quantizer,
    granularity_of,
)
from qlightning.numerics.absmax_over import AbsMaxOver
from qlightning.numerics.bins import Bins
from qlightning.numerics.elastic import ElasticBinary, OverTensor, StretchedElastic
from qlightning.optim.weights import Weight, weights_of


class ParetoQ(Method):
    """Weights of 1 to 4 bits with a learned step per row: elastic binarization, stretched bins, or LSQ, by width.

    One bit: +-alpha, alpha from mean |w|, and its gradient from the signs alone. Ternary and two bits: the middles of 3
    or 4 equal bins of [-alpha, alpha], alpha from max |w|. Three and four bits: LSQ, from max |w| at the largest code.
    Training starts from a float model, and about 90 % of the budget goes into that.

    Paper: ParetoQ: Scaling Laws in Extremely Low-bit LLM Quantization (Liu et al., NeurIPS 2025, arXiv 2502.02631).

    Deviations: the step in use is |alpha| where the authors' code holds alpha above 1e-5; zero counts as positive in
    one bit, where torch's sign gives 0. How far the weights move (section 3: 10 to 20 % for three bits and more,
    about 40 % below) is logged from a sample of each weight.

    Args:
        bits: 1, 1.58 (ternary), 2, 3 or 4.
        granularity: What shares a step: "channel" (the paper's rows) or a group size.
        start: When quantization begins, as in QATCallback; the paper's best split of a budget is 0.9.
        saturation: What the ternary step learns from a value that saturates: "code", 1 as in the authors' code, or
            "exact", the 2/3 that it becomes. They are one and the same for the other widths.
        count: Whether the step's gradient is damped by 1 / sqrt of the elements of the whole "tensor" (the authors'
            code) or of one "row", as in LSQ; after an optimizer of Adam's kind the difference is hardly seen.
    """

    def __init__(
        self,
        bits: float = 2,
        *,
        granularity: Literal["channel"] | int = "channel",
        start: int | float = 0,
        saturation: Literal["code", "exact"] = "code",
        count: Literal["tensor", "row"] = "tensor",
    ) -> None:
        if bits not in (1, 1.58, 2, 3, 4):
            raise ValueError(f"ParetoQ(bits={bits}): write 1, 1.58, 2, 3 or 4; for more bits LSQ(bits=8)")
        if saturation not in ("code", "exact") or count not in ("tensor", "row"):
            raise ValueError(
                f"ParetoQ(saturation={saturation!r}, count={count!r}): write saturation='code' or 'exact', "
                "count='tensor' or 'row'"
            )
        self.bits, self.granularity, self.start = bits, granularity, start
        self.saturation, self.count = saturation, count

    def quantization(self) -> dict[str, Any]:
        return {"weight": self._weight(), "start": self.start, "scale_lr": 1.0}

    def extras(self) -> list[Callback]:
        return [RelativeChange()]

    def _weight(self) -> Quantizer:
        format, source, gradient = self._parts()
        rows = granularity_of(self.granularity)
        damped = OverTensor(gradient) if self.count == "tensor" else gradient
        return Quantizer(format, rows, scale=Learned(source), gradient=damped)

    def _parts(self) -> tuple[Format, Measured, Gradient]:
        if self.bits == 1:
            return Binary(), AbsMean(), ElasticBinary()
        if self.bits == 1.58:
            return Bins(3), AbsMax(), StretchedElastic(beyond=1.0 if self.saturation == "code" else "level")
        if self.bits == 2:
            return Bins(4), AbsMax(), StretchedElastic()
        format = Int(int(self.bits))
        return format, AbsMaxOver(format.high), LSQ()


class RelativeChange(Callback):
    """Logs how far quantized weights have moved since they began to be quantized: sum |W_t - W_0| / sum |W_0|.

    `relative_change/<weight>` for each and `relative_change` over all, every `log_every_n_steps` steps of the Trainer.

    Args:
        samples: Elements of each weight that are watched, evenly spaced; all of them where there are no more.

    Attributes:
        latest: What was logged last, by name.
    """

    def __init__(self, samples: int = 65536) -> None:
        if samples < 1:
            raise ValueError(f"RelativeChange(samples={samples}): at least one, for example RelativeChange(65536)")
        self.samples = samples
        self.latest: dict[str, float] = {}
        self._before: dict[str, Tensor] = {}
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if trainer.global_step == 0:
            self._before, self.latest = {}, {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for weight in weights_of(pl_module):
            if weight.name not in self._before:
                self._before[weight.name] = self._sample(weight).clone()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step == self._step or step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return  # a batch that only adds to the gradients comes to the same step again
        self._step = step
        moved = total = 0.0
        for weight in weights_of(pl_module):
            before = self._before[weight.name]
            change, size = float((self._sample(weight) - before).abs().sum()), float(before.abs().sum())
            self.latest[f"relative_change/{weight.name}"] = change / size if size else 0.0
            moved, total = moved + change, total + size
        if total:
            self.latest["relative_change"] = moved / total
        for logger in trainer.loggers if self.latest else []:
            logger.log_metrics(self.latest, step=step)

    @torch.no_grad()
    def _sample(self, weight: Weight) -> Tensor:
        flat = weight.matrix().flatten()
        return flat[:: -(-flat.numel() // self.samples)].float().cpu()

    def state_dict(self) -> dict[str, Any]:
        return {"before": dict(self._before)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = dict(state_dict["before"])
