"""Callbacks that work on what a QATCallback has converted stand behind it, or say so."""

import pytest
from lightning.pytorch import Trainer

from qlightning.callbacks.once_per_step import OncePerStep
from qlightning.callbacks.order import qat_before
from qlightning.callbacks.qat import QATCallback
from qlightning.callbacks.release import Release
from qlightning.callbacks.report import ReportCallback
from qlightning.callbacks.trajectory import TrajectoryCallback
from qlightning.reporting.callback import PageCallback


def quiet(*callbacks):
    return Trainer(
        accelerator="cpu", logger=False, callbacks=list(callbacks), enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip


@pytest.mark.parametrize("kind", [OncePerStep, PageCallback, Release, ReportCallback, TrajectoryCallback])
def test_a_qat_callback_stands_before_it(kit, kind):
    callback, qat = kind(), QATCallback("int4-channel")
    assert qat_before(callback, quiet(qat, callback)) is qat
    for wrong in (quiet(callback, qat), quiet(callback)):
        example = rf"Trainer\(callbacks=\[QATCallback\(weight='int4-g128'\), {kind.__name__}\(\)\]\)"
        with pytest.raises(ValueError, match=f"a QATCallback before it has converted: {example}"):
            callback.setup(wrong, kit.Net(), "fit")
