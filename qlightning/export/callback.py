"""ExportCallback: the artifact at the end of the fit."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from qlightning.callbacks.qat import is_rehearsal
from qlightning.evaluation.modes import eval_mode
from qlightning.export.artifact import check_free
from qlightning.export.commands import dtype_named, export_module, make_target
from qlightning.export.verify import Proof


class ExportCallback(Callback):
    """Writes the trained model as a self-contained folder when the fit ends, and proves it equal.

    Example::

        Trainer(callbacks=[QATCallback(weight="int4-g128"), ExportCallback("compressed-tensors", "model/")])

    The proof runs validation batches, or random inputs where there is no validation data. What is exported is the
    module as the fit leaves it; `qlightning export` does the same for any checkpoint.

    Args:
        format: Name of a target: "plain", "compressed-tensors", "torchao", "bitsandbytes" ...
        out: The folder to be made.
        dtype: In which the artifact computes, "float32" or "bfloat16"; as trained when left out.
        drop: What may be lost where the target has no place for it: placements, or "codes".
        force: Replace an earlier export at `out`.
        batches: How many batches the proof runs.
        options: Options of the target.
        tokenizer: Folder of the tokenizer that goes with the model, to be copied beside it.

    Attributes:
        proof: Of the last export.

    Raises:
        ValueError: From the constructor for an unknown format or option, when the fit begins if `out` exists, when it
            ends if something would be lost or the proof fails.
    """

    def __init__(
        self,
        format: str,
        out: str,
        *,
        dtype: str | None = None,
        drop: Sequence[str] = (),
        force: bool = False,
        batches: int = 2,
        options: dict[str, Any] | None = None,
        tokenizer: str | None = None,
    ) -> None:
        make_target(format, options)
        dtype_named(dtype)
        self.format, self.out, self.dtype, self.drop, self.force = format, out, dtype, list(drop), force
        self.batches, self.options, self.tokenizer = batches, options, tokenizer
        self.proof: Proof | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_free(Path(self.out), force=self.force)  # now, and not after a day of training

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_rehearsal(trainer):
            return
        if trainer.is_global_zero:
            with _as_served(pl_module):
                self.proof = export_module(
                    pl_module,
                    self.format,
                    self.out,
                    data=_held_out(trainer),
                    dtype=self.dtype,
                    drop=self.drop,
                    force=self.force,
                    batches=self.batches,
                    options=self.options,
                    tokenizer=self.tokenizer,
                    source=f"step {trainer.global_step}",
                )
            rank_zero_info(f"ExportCallback: {self.format} in {self.out}\n{self.proof.text()}")
        trainer.strategy.barrier("export")


def _held_out(trainer: Trainer) -> Iterable[Any] | None:
    """The first validation loader, or None."""
    loaders = trainer.val_dataloaders
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    first: Iterable[Any] | None = loaders[0] if isinstance(loaders, list | tuple) and loaders else loaders
    return first or None


@contextmanager
def _as_served(module: LightningModule) -> Iterator[None]:
    """The module in eval mode on the CPU, where artifacts are compared; afterwards everything is as before."""
    device = module.device
    with eval_mode(module):
        module.cpu()
        try:
            yield
        finally:
            module.to(device)
