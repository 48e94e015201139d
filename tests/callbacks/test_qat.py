"""Conversion at the right moment, whatever builds the model, and any number of times."""

import copy
import pickle

import pytest
import torch
from torch import nn

from qlightning import QATCallback
from qlightning.callbacks import ReportCallback
from qlightning.layers.convert import quantizers_of, restore
from qlightning.layers.layer import Twin

PLACES = ["Net", "SetupNet", "LazyNet", "EarlyNet"]


def learned(**options):
    return QATCallback("int4-lsq", input="int8-tensor-lsq", calibration=2, **options)


@pytest.mark.parametrize("place", PLACES)
def test_wherever_the_model_is_built(kit, place):
    folder = kit.folder / "checkpoints"
    built: dict[str, int] = {}

    class Watched(getattr(kit, place)):
        def configure_optimizers(self):
            built.update({name: id(p) for name, p in self.named_parameters()})
            return super().configure_optimizers()

    whole = kit.Record()
    module = Watched()
    trainer = kit.fit(module, learned(start=3), whole, kit.every_step(folder))

    assert [type(module.net[i]).__name__ for i in (0, 2, 4)] == ["QuantLinear"] * 3
    scales = kit.scales(module)
    assert sorted(scales) == sorted(
        f"net.{i}.{what}_quantizer.scale.value" for i in (0, 2, 4) for what in ("weight", "input")
    )
    optimized = [{id(p) for p in group["params"]} for group in trainer.optimizers[0].param_groups]
    now = {name: id(p) for name, p in module.named_parameters()}
    assert now == built
    assert optimized == [{now[name] for name in now if name not in scales}, {now[name] for name in scales}]
    saved = torch.load(folder / "step=8.ckpt")["state_dict"]
    assert set(saved) == set(module.state_dict())
    assert all(torch.equal(saved[name], scale) for name, scale in scales.items())

    resumed = kit.Record()
    again = getattr(kit, place)()
    kit.fit(again, learned(start=3), resumed, kit.every_step(folder), ckpt_path=folder / "step=4.ckpt")
    assert resumed.losses == whole.losses[4:]
    assert all(torch.equal(value, scales[name]) for name, value in kit.scales(again).items())


def test_parameters_stay_the_users(kit):
    module = kit.Net()
    before = dict(module.named_parameters())
    kit.fit(module, learned())
    after = dict(module.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    plain = restore(module)
    assert dict(plain.named_parameters()).keys() == before.keys()
    assert all(type(layer) is not Twin for layer in plain.modules())


@pytest.mark.parametrize("place", PLACES)
def test_a_failed_fit_leaves_a_module_that_can_be_fitted(kit, place):
    module = getattr(kit, place)()
    with pytest.raises(ValueError, match="matches no layer"):
        kit.fit(module, QATCallback("int4-g8", rules={"nett.*": "int8"}))
    assert not any(isinstance(layer, Twin) for layer in module.modules())
    kit.fit(module, QATCallback("int4-lsq", rules={"net.0": "int8"}), max_steps=2)
    assert {name: repr(q) for name, q in quantizers_of(module)}["net.0.weight_quantizer"].startswith("Quantizer(Int(8)")


def test_fit_validate_test_predict_fit(kit):
    module, qat = kit.Net(), learned(start=1)
    trainer = kit.trainer(qat, max_steps=4)
    trainer.fit(module, kit.loader(), kit.held_out())
    scales, outputs = kit.scales(module), kit.outputs(module)
    trainer.validate(module, kit.held_out(), verbose=False)
    trainer.test(module, kit.held_out(), verbose=False)
    predicted = torch.cat(trainer.predict(module, kit.held_out()))
    assert torch.equal(predicted, outputs)
    assert all(torch.equal(value, scales[name]) for name, value in kit.scales(module).items())

    trainer.fit_loop.max_epochs = trainer.fit_loop.epoch_loop.max_steps = 6
    starts = kit.Record(look=lambda trainer, module: kit.scales(module))
    trainer.callbacks.append(starts)
    trainer.fit(module, kit.loader(), kit.held_out())
    assert trainer.global_step == 6
    assert all(torch.equal(value, scales[name]) for name, value in starts.seen[0].items())
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [5, 6]
    changed = kit.scales(module)
    assert not any(torch.equal(value, scales[name]) for name, value in changed.items())


def test_a_new_trainer_goes_on_from_learned_scales(kit):
    module = kit.Net()
    kit.fit(module, learned(), max_steps=4)
    scales = kit.scales(module)
    starts = kit.Record(look=lambda trainer, module: kit.scales(module))
    kit.fit(module, learned(), starts, max_steps=2)
    assert all(torch.equal(value, scales[name]) for name, value in starts.seen[0].items())
    assert all(quantizer.enabled for _, quantizer in quantizers_of(module))


def test_validate_before_fit_shows_round_to_nearest(kit):
    module = kit.Net()
    plain = kit.outputs(module)
    trainer = kit.trainer(QATCallback("int3-g8", start=5))
    (before,) = trainer.validate(module, kit.held_out(), verbose=False)
    rounded = kit.outputs(module)
    assert not torch.equal(rounded, plain)
    _, y = kit.rows(10, seed=8).tensors
    assert before["val_loss"] == pytest.approx(float((rounded - y).square().mean()), rel=1e-5)
    first = kit.Record()
    trainer.callbacks.append(first)
    trainer.fit(module, kit.loader(), kit.held_out())
    alone = kit.Record()
    kit.fit(kit.Net(), alone)
    assert first.losses[:5] == alone.losses[:5]


def test_rules_reach_single_layers(kit):
    module = kit.Net()
    kit.fit(module, QATCallback("int4-g8", rules={"net.4": None, "net.0": {"weight": "int8", "input": "int8-token"}}))
    assert sorted(name for name, _ in quantizers_of(module)) == [
        "net.0.input_quantizer",
        "net.0.weight_quantizer",
        "net.2.weight_quantizer",
    ]


def test_the_coverage_is_logged(kit):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(kit.folder)
    kit.fit(kit.Net(), QATCallback("int4-g8", rules={"net.4": None}), max_steps=2, logger=logger, log_every_n_steps=1)
    logged = (kit.folder / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"coverage/weight_share", "coverage/layers", "coverage/multiply_add_share"} <= set(logged)


def test_the_callback_can_be_copied_and_pickled():
    qat = QATCallback("int4-g8", input="int8-token", rules={"a.*": None}, start=0.5)
    for other in (copy.deepcopy(qat), pickle.loads(pickle.dumps(qat))):
        assert other.rules.keys() == qat.rules.keys()
        assert other.start == 0.5


# --- what cannot work says what would ---


@pytest.mark.parametrize(
    ("arguments", "corrected"),
    [
        ({}, r"QATCallback\(weight='int4-g128'\)"),
        ({"weight": "int4g128"}, "did you mean 'int4"),
        ({"weight": "int4-token"}, "'channel' or group granularity"),
        ({"weight": "int4", "input": "int8-channel"}, "input='int8-token'"),
        ({"weight": "int4", "rules": {"a": {"wieght": "int4"}}}, "'weight': 'int4-g128'"),
        ({"weight": "int4", "start": -1}, "start=-1: .*write steps as 100 or a share of the run as 0.1"),
        ({"weight": "int4", "start": 2.5}, "start=2.5: .*write steps as 2 or a share of the run as 0.1"),
        ({"weight": "int4", "start": True}, "start=True: .*write steps as 100"),
        ({"weight": "int4", "freeze_scales": -0.5}, "freeze_scales=-0.5: .*as 0.1"),
        ({"weight": "int4", "calibration": 0}, r"QATCallback\(calibration=8\)"),
        ({"weight": "int4", "scale_lr": -1.0}, r"QATCallback\(scale_lr=0.1\)"),
        ({"weight": "int4", "scale_lr": float("nan")}, r"QATCallback\(scale_lr=0.1\)"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_meant(arguments, corrected):
    with pytest.raises(ValueError, match=corrected):
        QATCallback(**arguments)


@pytest.mark.parametrize(
    ("arguments", "corrected"),
    [
        ({"weight": "int4-g5"}, r"net.0 \(Linear\): group size 5 does not divide 8 columns.*'channel' always does"),
        ({"weight": "int4", "rules": {"ned.0": None}}, "'ned.0' matches no layer; .*net.0"),
        ({"weight": "int4", "kv_cache": "int8-token"}, "leave kv_cache out of it"),
        ({"weight": "int4", "tied": "both"}, "tied='float' or tied='share'"),
        ({"rules": {"type:Conv2d": "int8"}}, "'type:Conv2d' matches no layer; .*type:Linear"),
        ({"weight": "int4", "start": 8}, "start=8: the run ends at step 8; write for example start=0.5"),
        ({"weight": "int4", "start": 1.0}, "the run ends at step 8; write for example start=0.5"),
        ({"weight": "int4", "freeze_scales": 100}, "the run ends at step 8; write for example freeze_scales=0.5"),
        ({"weight": "int4", "input": "int8-tensor-lsq"}, "net.0.input .*ends at step 8; .*calibration=2"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_or_run(kit, arguments, corrected):
    module = kit.Net()
    with pytest.raises(ValueError, match=f"(?s){corrected}"):
        kit.fit(module, QATCallback(**arguments))
    kit.fit(module, QATCallback("int4-g8"))
    assert len(list(quantizers_of(module))) == 3


def test_a_share_of_a_run_without_end(kit):
    for end in ({}, {"max_time": {"seconds": 1}}):
        with pytest.raises(ValueError, match=r"start=0.5: .*start=1000 .*Trainer\(max_steps=10_000\)"):
            kit.fit(kit.Net(), QATCallback("int4-g8", start=0.5), max_steps=-1, max_epochs=-1, **end)


def test_little_coverage(kit):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 100))

        def forward(self, x):
            return x + 0 * self.weight.sum()

    module = kit.Net()
    module.net.insert(0, Odd())
    with pytest.raises(ValueError, match=r"(?s)only 38% .*Odd.*rules=\{'<name>': None\}, or lower min_coverage"):
        kit.fit(module, QATCallback("int4-g8"))
    kit.fit(module, QATCallback("int4-g8", min_coverage=0.3))
    assert len(list(quantizers_of(module))) == 3


def test_nothing_to_convert(kit):
    module = kit.Net()
    module.net = nn.Sequential(nn.LayerNorm(8), nn.ReLU())
    with pytest.raises(ValueError, match=r"(?s)nothing was converted.*write rules that name layers"):
        kit.fit(module, QATCallback("int4-g8"))


def test_nan_weights(kit):
    module = kit.Net()
    module.net[2].weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"net.2 \(Linear\): its weight holds NaN or infinity"):
        kit.fit(module, QATCallback("int4-g8"))
    module.net[2].weight.data[3, 4] = 0.0
    kit.fit(module, QATCallback("int4-g8"))


def test_a_rehearsal_need_not_last_until_the_start(kit):
    module = kit.Net()
    kit.fit(module, QATCallback("int4", input="int8-tensor-lsq", start=1000), max_steps=-1, fast_dev_run=2)
    assert not any(quantizer.enabled for _, quantizer in quantizers_of(module))


def test_a_report_needs_the_callback_before_it(kit):
    for callbacks in ([ReportCallback()], [ReportCallback(), QATCallback("int4-g8")]):
        with pytest.raises(ValueError, match=r"callbacks=\[QATCallback\(weight='int4-g128'\), ReportCallback\(\)\]"):
            kit.fit(kit.Net(), *callbacks)
