"""PageCallback: the page of `qlightning report` at the end of a fit, and its pictures in the run's loggers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from qlightning.callbacks.order import qat_before
from qlightning.callbacks.qat import QATCallback, is_rehearsal
from qlightning.evaluation.modes import eval_mode
from qlightning.export.artifact import check_free
from qlightning.layers.sharding import is_sharded
from qlightning.reporting.drawing import PAGE, draw, write
from qlightning.reporting.figures import Picture
from qlightning.reporting.loggers import log_report
from qlightning.reporting.report import Report, report_on
from qlightning.reporting.run import run_of


class PageCallback(Callback):
    """Writes the page of `qlightning report` when the fit ends, and logs its pictures to W&B and TensorBoard.

    Loggers get pictures, histograms of the weights on their grids, and the SQNR of every weight, at the end and, if so
    wished, every few epochs; loggers without pictures get the numbers. Stands after the QATCallback, and after a
    TrajectoryCallback, whose curves it shows.

    Args:
        folder: The folder of the page to be made; `report` in the run folder of the Trainer when not given.
        every_n_epochs: Log every so many epochs too; None for the end of the fit alone.
        force: Replace an earlier report in `folder`.

    Raises:
        ValueError: From the constructor for what cannot be meant; when the fit begins, if `folder` exists.
    """

    def __init__(self, folder: str | None = None, *, every_n_epochs: int | None = None, force: bool = False) -> None:
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ValueError(
                f"every_n_epochs={every_n_epochs}: at least 1, for example PageCallback(every_n_epochs=5), or None"
            )
        self.folder, self.every_n_epochs, self.force = folder, every_n_epochs, force
        self._logged = -1
        self._log_dir: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        qat_before(self, trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logged = -1
        self._log_dir = trainer.log_dir  # which asks all processes, so that the first alone must not ask
        if not is_rehearsal(trainer):
            check_free(self._out(trainer).absolute(), force=self.force)  # now, and not after a day of training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if any(map(is_sharded, pl_module.parameters())):
            raise ValueError(
                "the weights are sharded, and PageCallback() looks at whole ones: train with Trainer(strategy='ddp') "
                "or on one device, or leave it out and run `qlightning report` on a checkpoint"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if due and trainer.is_global_zero and not is_rehearsal(trainer):
            report = self._report(trainer, pl_module)
            self._log(trainer, report, draw(report))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not is_rehearsal(trainer):
            report, out = self._report(trainer, pl_module), self._out(trainer)
            drawn = draw(report)
            if trainer.global_step != self._logged:  # the last epoch's end is the end
                self._log(trainer, report, drawn)
            write(report, out, drawn, force=self.force)
            rank_zero_info(f"PageCallback: written to {out / PAGE}")

    def _out(self, trainer: Trainer) -> Path:
        return Path(self.folder) if self.folder else Path(self._log_dir or trainer.default_root_dir) / "report"

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> Report:
        folders = [] if self._log_dir is None else [Path(self._log_dir)]
        for logger in trainer.loggers:
            logger.save()  # what is logged so far is in its file
        saved = _saved(trainer, qat_before(self, trainer))
        with eval_mode(pl_module), torch.no_grad():
            title = f"{type(pl_module).__name__}, step {trainer.global_step}"
            return report_on(pl_module, run_of(saved, pl_module, title=title, folders=folders))

    def _log(self, trainer: Trainer, report: Report, drawn: list[Picture]) -> None:
        self._logged = trainer.global_step
        for logger in trainer.loggers:
            log_report(logger, report, drawn, step=trainer.global_step)


def _saved(trainer: Trainer, qat: QATCallback) -> Mapping[str, Any]:
    """What a checkpoint would hold of the run, without weights and optimizers."""
    every: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks = {callback.state_key: state for callback in every if (state := callback.state_dict())}
    callbacks[qat.state_key] = qat.described()
    return {"callbacks": callbacks, "global_step": trainer.global_step, "epoch": trainer.current_epoch}
