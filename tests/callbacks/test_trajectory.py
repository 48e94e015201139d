"""The record of step sizes and flips: against what the weights were, bounded, and the same in a resumed run."""

import itertools

import pytest
import torch
from lightning.pytorch import Callback

from qlightning import QATCallback, TrajectoryCallback
from qlightning.callbacks.trajectory import read_samples
from qlightning.methods.fairy2i import PhaseSum
from qlightning.optim import weights_of


class Seen(Callback):
    """Codes and step sizes of every weight before every step, by hand."""

    def __init__(self):
        self.codes, self.steps = [], []

    def on_train_batch_start(self, trainer, module, *args):
        self._take(module)

    def on_train_end(self, trainer, module):
        self._take(module)

    def _take(self, module):
        found = [(w.name, w.quantizer.quantize(w.matrix())) for w in weights_of(module)]
        self.codes.append({name: quantized.codes for name, quantized in found})
        self.steps.append({name: quantized.scale.flatten().sort().values for name, quantized in found})


class Shaky:
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.15, momentum=0.5)


def shaky(kit):
    return type("ShakyNet", (Shaky, kit.Net), {})()


@pytest.mark.parametrize("spec", ["int4-channel-lsq", "int3-g8", "ternary"])
def test_what_is_recorded_is_what_happened(kit, spec):
    seen, record = Seen(), TrajectoryCallback(every=3)
    kit.fit(shaky(kit), QATCallback(spec), record, seen, max_steps=8)
    assert list(record.samples) == ["net.0.weight", "net.2.weight", "net.4.weight"]
    flips = [
        {name: float((a[name] != b[name]).float().mean()) for name in a} for a, b in itertools.pairwise(seen.codes)
    ]
    for name, samples in record.samples.items():
        assert [sample.step for sample in samples] == [0, 3, 6]
        for sample in samples:
            step = int(sample.step)
            assert sample.flips == pytest.approx(flips[step][name])
            steps = seen.steps[step][name]
            assert sample.median == pytest.approx(float(steps.quantile(0.5)), rel=0.2)
            assert float(steps[0]) <= sample.low <= sample.median <= sample.high <= float(steps[-1])
    assert any(sample.flips > 0 for samples in record.samples.values() for sample in samples)


def test_recording_changes_nothing(kit):
    plain, watched = shaky(kit), shaky(kit)
    kit.fit(plain, QATCallback("int4-lsq-sr", "int8-tensor-lsq", calibration=2), max_steps=5)
    kit.fit(watched, QATCallback("int4-lsq-sr", "int8-tensor-lsq", calibration=2), TrajectoryCallback(1), max_steps=5)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


def test_it_begins_with_quantization_and_follows_settled_inputs(kit):
    record = TrajectoryCallback(every=2)
    qat = QATCallback("int4-channel", "int8-tensor-lsq", start=4, calibration=2)
    module = kit.Net()
    kit.fit(module, qat, record, max_steps=8)
    assert [sample.step for sample in record.samples["net.0.weight"]] == [4, 6]
    assert [sample.step for sample in record.samples["net.0.input"]] == [4, 6]
    last = record.samples["net.0.input"][-1]
    assert last.low == last.median == last.high  # one step size for the tensor
    assert last.flips != last.flips  # no codes are kept of inputs


def test_the_record_is_bounded(kit):
    record = TrajectoryCallback(every=1, keep=5)
    kit.fit(kit.Net(), QATCallback("int4-channel"), record, max_steps=18)
    assert record.interval == 8
    assert [sample.step for sample in record.samples["net.0.weight"]] == [0, 8, 16]


def test_of_large_weights_some_elements_are_watched(kit):
    record = TrajectoryCallback(every=1, elements=7)
    kit.fit(shaky(kit), QATCallback("int4-channel"), record, max_steps=4)
    shares = [sample.flips * 7 for sample in record.samples["net.2.weight"]]  # every 37th of 256
    assert shares == pytest.approx([round(share) for share in shares])


def test_what_has_no_single_code_has_step_sizes_all_the_same(kit):
    record = TrajectoryCallback(every=1)
    module = kit.Net()
    kit.fit(module, QATCallback(PhaseSum(stages=2)), record, max_steps=2)
    last = record.samples["net.2.weight"][-1]
    assert last.flips != last.flips
    assert 0 < last.low <= last.median <= last.high


def test_accumulated_gradients_are_one_step(kit):
    record = TrajectoryCallback(every=1)
    kit.fit(shaky(kit), QATCallback("int3-g8"), record, max_steps=3, accumulate_grad_batches=2)
    assert [sample.step for sample in record.samples["net.0.weight"]] == [0, 1, 2]
    assert all(any(s[i].flips > 0 for s in record.samples.values()) for i in range(3))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
def test_a_resumed_run_has_the_same_record(kit):
    whole, resumed = (TrajectoryCallback(every=1, keep=6) for _ in range(2))
    folder = kit.folder / "run"
    kit.fit(kit.Net(), QATCallback("int4-lsq", start=2), whole, kit.every_step(folder), max_steps=11)
    kit.fit(kit.Net(), QATCallback("int4-lsq", start=2), resumed, ckpt_path=folder / "step=5.ckpt", max_steps=11)
    assert resumed.samples == whole.samples
    assert resumed.interval == whole.interval == 2
    saved = torch.load(folder / "step=11.ckpt", weights_only=True)["callbacks"]["TrajectoryCallback"]
    assert read_samples(saved) == whole.samples


def test_a_new_run_begins_a_new_record(kit):
    record = TrajectoryCallback(every=1)
    for _ in range(2):
        kit.fit(kit.Net(), QATCallback("int4-channel"), record, max_steps=3)
        assert len(record.samples["net.0.weight"]) == 3


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="for example TrajectoryCallback"):
        TrajectoryCallback(0)
