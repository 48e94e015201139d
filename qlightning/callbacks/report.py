"""ReportCallback: what quantization did to the model, and what training for it gave back."""

import datetime
import json
import platform
import subprocess
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from qlightning.callbacks.order import qat_before
from qlightning.callbacks.qat import is_rehearsal
from qlightning.evaluation.measure import measure
from qlightning.evaluation.size import deployed_bytes, float_bytes
from qlightning.layers.convert import quantizers_of


class ReportCallback(Callback):
    """Measures held-out data three times: in float and rounded to nearest at the switch, quantized at the end.

    Writes into `folder`: `report.json`, `losses.png` (training and held-out curves with the switch marked) and
    `coverage.txt`; prints the table. Stands after the QATCallback.

    Args:
        folder: Where to write; the run folder of the Trainer when not given.
        loss: Name of the held-out loss as the module logs it; the share recovered is computed from it.
        also: Further logged metrics to show.
        unit: Unit of the loss, shown in the table.
        max_batches: Measure on at most so many validation batches.
    """

    def __init__(
        self,
        folder: str | None = None,
        *,
        loss: str = "val_loss",
        also: Sequence[str] = (),
        unit: str = "",
        max_batches: int | None = None,
    ) -> None:
        self.folder, self.loss, self.also, self.unit, self.max_batches = folder, loss, list(also), unit, max_batches
        self.measured: dict[str, dict[str, float]] = {}
        self.switch: int | None = None
        self.train_losses: list[tuple[int, float]] = []
        self.held_out_losses: list[tuple[int, float]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        qat_before(self, trainer)
        if stage == "fit" and trainer.global_step == 0:  # this callback may have reported on another run
            self.measured, self.switch, self.train_losses, self.held_out_losses = {}, None, [], []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.switch is None:
            self._read(trainer, pl_module, max_batches=1)  # what cannot be measured is said now, not at the switch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        quantizers = [quantizer for _, quantizer in quantizers_of(pl_module)]
        if self.switch is not None or not all(quantizer.enabled for quantizer in quantizers):
            return
        self.switch = trainer.global_step
        with _in_float(quantizers):
            self._measure("float", trainer, pl_module)
        self.measured["float"]["megabytes"] = float_bytes(pl_module) / 1e6
        self._measure("rtn", trainer, pl_module)
        self.measured["rtn"]["megabytes"] = deployed_bytes(pl_module) / 1e6

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, torch.Tensor):
            self.train_losses.append((trainer.global_step, float(loss)))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and self.loss in trainer.callback_metrics:
            self.held_out_losses.append((trainer.global_step, float(trainer.callback_metrics[self.loss])))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.switch is None and is_rehearsal(trainer):
            return
        if self.switch is None:
            raise ValueError(
                f"the run ended at step {trainer.global_step} before all quantizers acted: nothing to report; train "
                "longer, or write an earlier QATCallback(start=...) or a shorter QATCallback(calibration=...)"
            )
        self._measure("qat", trainer, pl_module)
        self.measured["qat"]["megabytes"] = deployed_bytes(pl_module) / 1e6
        folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)  # log_dir asks all processes
        if trainer.is_global_zero:
            self._write(trainer, folder)

    def _measure(self, name: str, trainer: Trainer, pl_module: LightningModule) -> None:
        self.measured[name] = self._read(trainer, pl_module, max_batches=self.max_batches)

    def _read(self, trainer: Trainer, pl_module: LightningModule, *, max_batches: int | None) -> dict[str, float]:
        values = measure(trainer, pl_module, max_batches=max_batches)
        missing = [metric for metric in (self.loss, *self.also) if metric not in values]
        if missing:
            raise ValueError(
                f"the module does not log {', '.join(missing)} in validation, only {', '.join(sorted(values))}; "
                f"write for example ReportCallback(loss={sorted(values)[0]!r})"
            )
        return {"loss": values[self.loss], **{metric: values[metric] for metric in self.also}}

    @property
    def recovered(self) -> float | None:
        """Share of the loss that rounding to nearest added and training took back; None where rounding added none."""
        plain, rounded, trained = (self.measured[name]["loss"] for name in ("float", "rtn", "qat"))
        return (rounded - trained) / (rounded - plain) if rounded > plain else None

    def table(self) -> str:
        """The three measurements side by side."""
        labels = {"loss": f"held-out loss{f' ({self.unit})' if self.unit else ''}", "megabytes": "size (MB)"}
        labels |= {name: name.removeprefix("val_").replace("_", " ") for name in self.also}
        cells = [["", "float", "round-to-nearest", "QAT"]]
        for key in ("loss", *self.also, "megabytes"):
            digits = 2 if key == "megabytes" else 4
            cells.append([labels[key], *(f"{self.measured[name][key]:.{digits}f}" for name in ("float", "rtn", "qat"))])
        cells.append(["share of the gap recovered", "", "", "-" if self.recovered is None else f"{self.recovered:.0%}"])
        widths = [max(len(row[i]) for row in cells) for i in range(4)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in cells
        )

    def _write(self, trainer: Trainer, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        qat = qat_before(self, trainer)
        report = {
            **self.measured,
            "recovered": self.recovered,
            "switch": self.switch,
            "steps": trainer.global_step,
            "coverage": qat.coverage.metrics() if qat.coverage else {},
            "made": _circumstances(),
        }
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        if qat.coverage is not None:
            (folder / "coverage.txt").write_text(qat.coverage.table() + "\n")
        self._draw(folder / "losses.png", end=trainer.global_step)
        rank_zero_info(f"{self.table()}\nwritten to {folder}: report.json, coverage.txt, losses.png")

    def _draw(self, path: Path, *, end: int) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel="optimizer step", ylabel=f"loss{f' ({self.unit})' if self.unit else ''}")
        if self.train_losses:
            axes.plot(*zip(*smoothed(self.train_losses), strict=True), linewidth=1, alpha=0.8, label="training")
        if self.held_out_losses:
            axes.plot(*zip(*self.held_out_losses, strict=True), marker="o", markersize=3, label="held out")
        assert self.switch is not None
        for name, step, marker in (("float", self.switch, "s"), ("rtn", self.switch, "X"), ("qat", end, "D")):
            label = {"float": "float", "rtn": "round-to-nearest", "qat": "QAT"}[name]
            axes.plot(
                step, self.measured[name]["loss"], marker, markersize=8, linestyle="none", label=f"{label}, held out"
            )
        axes.axvline(self.switch, color="gray", linestyle="--", linewidth=1)
        axes.text(self.switch, 1.0, " quantized from here", transform=axes.get_xaxis_transform(), va="top", fontsize=8)
        highest = max(self.measured[name]["loss"] for name in ("float", "rtn", "qat"))
        lowest = min([loss for _, loss in self.train_losses] + [m["loss"] for m in self.measured.values()])
        axes.set_ylim(lowest - 0.05 * (highest - lowest), lowest + 2.0 * (highest - lowest))
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=130)

    def state_dict(self) -> dict[str, Any]:
        return {
            "measured": self.measured,
            "switch": self.switch,
            "train_losses": self.train_losses,
            "held_out_losses": self.held_out_losses,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)


@contextmanager
def _in_float(quantizers: Sequence[Any]) -> Any:
    for quantizer in quantizers:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enabled = True


def smoothed(losses: list[tuple[int, float]], weight: float = 0.9) -> list[tuple[int, float]]:
    """An exponential moving average, so that the curve shows the trend and not the batches."""
    smooth: list[tuple[int, float]] = []
    for step, loss in losses:
        smooth.append((step, loss if not smooth else weight * smooth[-1][1] + (1 - weight) * loss))
    return smooth


def _circumstances() -> dict[str, str]:
    """What a number needs to be made again: date, commit, machine, versions."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown: not run from a git checkout"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "machine": f"{platform.machine()} {platform.system()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }
