"""Metrics over a whole held-out set, apart for validation and test."""

import copy

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class HeldOut(nn.Module):
    """What a task measures on held-out data: updated batch by batch, read and emptied when the set is through.

    Not logged by handing the metrics to `self.log`: there Lightning empties them in inference mode, and a `fit` after a
    `validate` then fails on its first batch ("Inplace update to inference tensor").

    Args:
        metrics: The metrics by name.
    """

    def __init__(self, **metrics: Metric) -> None:
        super().__init__()
        self.metrics = nn.ModuleDict(
            {f"{stage}_{name}": copy.deepcopy(m) for stage in ("val", "test") for name, m in metrics.items()}
        )

    def update(self, stage: str, **values: Tensor | tuple[Tensor, ...]) -> None:
        """Take in a batch: for each metric, by name, its argument or a tuple of its arguments."""
        for name, arguments in values.items():
            metric = self._metric(f"{stage}_{name}")
            metric.update(*(arguments if isinstance(arguments, tuple) else (arguments,)))

    def finish(self, stage: str) -> dict[str, Tensor]:
        """All values of the stage, by `<stage>_<name>` and over all processes; the metrics are empty afterwards."""
        names = [name for name in self.metrics if name.startswith(f"{stage}_")]
        values = {name: self._metric(name).compute() for name in names}
        with torch.inference_mode(False):
            for name in names:
                self._metric(name).reset()
        return values

    def _metric(self, name: str) -> Metric:
        metric = self.metrics[name]
        assert isinstance(metric, Metric)
        return metric
