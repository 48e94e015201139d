"""Pictures and histograms to the loggers of a run: Weights & Biases and TensorBoard."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from qlightning.reporting.figures import Picture
from qlightning.reporting.histogram import Histogram
from qlightning.reporting.report import Report


def log_report(logger: Logger, report: Report, pictures: Sequence[Picture], *, step: int) -> bool:
    """Log the pictures, the histograms of weights and the SQNR of every weight.

    Args:
        logger: One of the trainer's loggers.
        report: The facts.
        pictures: Drawn of them.
        step: The optimizer step.

    Returns:
        Whether the logger takes pictures; one that does not is given the numbers alone.
    """
    numbers = metrics(report)
    if isinstance(logger, WandbLogger):
        _to_wandb(logger, report, pictures, numbers, step)
        return True
    logger.log_metrics(numbers, step=step)
    if isinstance(logger, TensorBoardLogger):
        _to_tensorboard(logger, report, pictures, step)
        return True
    return False


def metrics(report: Report) -> dict[str, float]:
    """Numbers by the names under which they are logged; infinite SQNRs are left out."""
    known = {w.name: w.sqnr for w in report.weights if w.sqnr is not None and abs(w.sqnr) != float("inf")}
    return {
        "report/served_megabytes": report.served / 1e6,
        "report/quantized_share": report.quantized_share,
        **{f"sqnr/{name}": value for name, value in known.items()},
    }


def _to_wandb(
    logger: WandbLogger, report: Report, pictures: Sequence[Picture], numbers: Mapping[str, float], step: int
) -> None:
    import numpy
    import wandb
    from PIL import Image

    entries: dict[str, Any] = dict(numbers)
    for picture in pictures:
        entries[f"report/{picture.name}"] = wandb.Image(Image.open(io.BytesIO(picture.png)), caption=picture.title)
    for name, found in _histograms(report):
        shares = numpy.asarray(found.density) * numpy.diff(found.edges)
        entries[f"on_grid/{name}"] = wandb.Histogram(np_histogram=(shares, numpy.asarray(found.edges)))
    logger.log_metrics(entries, step=step)


def _to_tensorboard(logger: TensorBoardLogger, report: Report, pictures: Sequence[Picture], step: int) -> None:
    import numpy
    from PIL import Image

    writer: Any = logger.experiment
    for picture in pictures:
        pixels = numpy.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB"))
        writer.add_image(f"report/{picture.name}", pixels, step, dataformats="HWC")
    for name, found in _histograms(report):
        edges = numpy.asarray(found.edges)
        shares = numpy.asarray(found.density) * numpy.diff(edges)
        middles = (edges[:-1] + edges[1:]) / 2
        writer.add_histogram_raw(
            f"on_grid/{name}",
            min=float(edges[0]),
            max=float(edges[-1]),
            num=float(shares.sum()),
            sum=float((shares * middles).sum()),
            sum_squares=float((shares * middles**2).sum()),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=shares.tolist(),
            global_step=step,
        )


def _histograms(report: Report) -> list[tuple[str, Histogram]]:
    return [(facts.name, facts.histogram) for facts in report.weights if facts.histogram is not None]
