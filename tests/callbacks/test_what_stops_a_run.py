"""Phases that do not fit the run, and numbers that no scale can be made of: errors that name the corrected call."""

import pytest
import torch

from qlightning import QATCallback
from qlightning.callbacks.phase import Phase


def learned(**options):
    return QATCallback("int4-lsq", input="int8-tensor-lsq", **{"calibration": 2, **options})


@pytest.mark.parametrize(
    ("scheme", "phases", "corrected"),
    [
        ({"input": "int8-token"}, [Phase(2, quantize="weight")], r"quantizes input,.*Phase\(0.5, quantize='input'\)"),
        ({}, [Phase(0, quantize="all"), Phase(4, train="scales")], "no scale is learned; .*'int4-g32-lsq'"),
        ({}, [Phase(4, quantize="all"), Phase(2, lr=0.1)], r"schedule\[1\] begins at step 2"),
        ({}, [Phase(0, quantize="all"), Phase(8, lr=0.1)], "at=8: the run ends at step 8"),
        ({}, [Phase(4, quantize="all", ramp=4)], "ramp=4: .*ends at step 8; write for example ramp=1"),
    ],
    ids=range(5),
)
def test_a_schedule_that_does_not_fit(kit, scheme, phases, corrected):
    module = kit.Net()
    with pytest.raises(ValueError, match=f"(?s){corrected}"):
        kit.fit(module, QATCallback("int4-g8", **scheme, schedule=phases))
    kit.fit(module, QATCallback("int4-g8"), max_steps=1)


def test_one_callback_says_it_all(kit):
    with pytest.raises(ValueError, match=r"(?s)takes one QATCallback; .*rules=\{'lm_head': 'int8-channel'\}"):
        kit.fit(kit.Net(), QATCallback("int4-g8"), QATCallback("int8-g8", start=4))


def test_a_layer_that_never_ran(kit):
    class Branch(kit.Net):
        def __init__(self):
            super().__init__()
            self.other = torch.nn.Linear(8, 4)

        def forward(self, x):
            return self.other(x) if self.training and self.trainer.global_step > 6 else self.net(x)

    with pytest.raises(ValueError, match=r"^other.input: no input.*step 4;.*calibration=8\).*rules=\{'other': None\}"):
        kit.fit(Branch(), learned(start=4))
    kit.fit(Branch(), learned(start=4, rules={"other": None}))


def test_weights_that_became_nan(kit):
    class Diverging(kit.Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.global_step == 4:
                self.net[2].weight.data[0, 0] = float("nan")

    with pytest.raises(ValueError, match=r"^net.2.weight: its scale is not finite;.* NaN.*gradient_clip_val=1.0"):
        kit.fit(Diverging(), learned(start=4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(kit, bad):
    class Broken(kit.Net):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return super().training_step((torch.where(x == x.max(), bad, x), y), batch_idx)

    with pytest.raises(ValueError, match=r"^net.0.input: its scale is not finite"):
        kit.fit(Broken(), QATCallback("int4-g8", input="int8-tensor-ema", start=4, calibration=2))


def test_an_error_at_the_switch_loses_nothing(kit):
    """The float training before it is in the checkpoint, and a corrected call goes on from there."""
    folder = kit.folder / "run"

    class Branch(kit.Net):
        def __init__(self):
            super().__init__()
            self.other = torch.nn.Linear(8, 4)

    with pytest.raises(ValueError, match=r"other.input"):
        kit.fit(Branch(), learned(start=4), kit.every_step(folder))
    module = Branch()
    module.load_state_dict(torch.load(folder / "step=4.ckpt")["state_dict"])
    plain = kit.outputs(module)
    alone = Branch()
    kit.fit(alone, max_steps=4)
    assert torch.equal(plain, kit.outputs(alone))
