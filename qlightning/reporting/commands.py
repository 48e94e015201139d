"""`qlightning report` as a function."""

from pathlib import Path

from lightning.pytorch import LightningModule

from qlightning.export.artifact import check_free
from qlightning.export.checkpoint import read_lightning, trained_in
from qlightning.reporting.drawing import PAGE, draw, write
from qlightning.reporting.report import Report, report_on
from qlightning.reporting.run import run_of


def report_checkpoint(
    checkpoint: str | Path, *, model: str | type[LightningModule] | None = None, logs: str | Path | None = None
) -> Report:
    """The facts of a checkpoint and of the run that wrote it.

    Args:
        checkpoint: A Lightning checkpoint file.
        model: The module's class or its dotted path; not needed for qlightning's own tasks.
        logs: Folder with the run's metrics.csv or TensorBoard event files; the checkpoint's folder and the one above,
            when not given.

    Raises:
        ValueError: There is no such file or folder, the module cannot be built, or nothing in it is quantized.
    """
    folder = Path(checkpoint).absolute().parent
    if logs is not None and not Path(logs).is_dir():
        raise ValueError(f"logs={logs!r} is no folder; write for example --logs lightning_logs/version_0")
    folders = [folder, folder.parent] if logs is None else [Path(logs)]
    saved = read_lightning(checkpoint)
    module = trained_in(saved, model=model)
    title = f"{type(module).__name__}, {Path(checkpoint).absolute().parent.parent.name}/{Path(checkpoint).name}"
    return report_on(module, run_of(saved, module, title=title, folders=folders))


def report_command(
    checkpoint: str, out: str, *, model: str | None = None, logs: str | None = None, force: bool = False
) -> str:
    """`qlightning report`: one page of pictures and numbers, and the pictures as PNG.

    Args:
        checkpoint: A Lightning checkpoint file.
        out: The folder to be made.
        model: Dotted path of the LightningModule's class; not needed for qlightning's own tasks.
        logs: Folder with the run's metrics.csv or TensorBoard event files; found beside the checkpoint when left out.
        force: Replace an earlier report at `out`.
    """
    check_free(Path(out).absolute(), force=force)  # before anything is loaded
    report = report_checkpoint(checkpoint, model=model, logs=logs)
    drawn = draw(report)
    write(report, Path(out), drawn, force=force)
    return f"written to {out}: {PAGE}, {', '.join(f'{picture.name}.png' for picture in drawn)}"
