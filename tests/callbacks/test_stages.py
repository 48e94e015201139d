"""Bit annealing: formats that change in mid-run, on scales settled anew, with nothing created late."""

import copy

import pytest
import torch
from torch import nn

from qlightning import QATCallback, Quantizer, convert, restore
from qlightning.callbacks.phase import Phase
from qlightning.callbacks.stages import AsConverted, enter_stages, plan_stages
from qlightning.layers.convert import quantizers_of
from qlightning.numerics.formats import Int
from qlightning.numerics.gradients import ClippedSTE
from qlightning.numerics.granularity import PerTensor
from qlightning.numerics.learned import EMA
from qlightning.numerics.spec import parse


def formats(trainer, module):
    return trainer.global_step, {name: repr(quantizer.format) for name, quantizer in quantizers_of(module)}


def test_formats_change_at_their_steps(kit):
    steps, module = kit.Record(look=formats), kit.Net()
    qat = QATCallback(
        "int8-g8",
        input="int8-token",
        rules={"net.4": "int8-g4"},
        start=1,
        anneal={3: "int6-g8", 6: {"input": "int4-token"}},
    )
    kit.fit(module, qat, steps)
    for step, shown in steps.seen:
        assert shown["net.0.weight_quantizer"] == ("Int(8)" if step < 3 else "Int(6)")
        assert shown["net.2.input_quantizer"] == ("Int(8)" if step < 6 else "Int(4)")
        assert shown["net.4.weight_quantizer"] == "Int(8)"
    x, _ = kit.rows(10, seed=8).tensors
    layer = module.net[0]
    wanted = parse("int4-token")(x) @ parse("int6-g8")(layer.weight).T + layer.bias
    assert torch.equal(layer.eval()(x), wanted)


def test_a_later_format_is_what_that_format_alone_is(kit):
    """From the switch on, the losses are those of a run that had the later format from there on."""
    annealed, from_there, before = kit.Record(), kit.Record(), kit.Record()
    kit.fit(kit.Net(), QATCallback("int8-g8", anneal={5: "int3-g8"}), annealed)
    kit.fit(kit.Net(), QATCallback("int8-g8"), before)
    kit.fit(kit.Net(), QATCallback("int8-g8", schedule=[Phase(0, quantize="all", rules={"*": "int3-g8"})]), from_there)
    alone = kit.Record()
    kit.fit(kit.Net(), QATCallback("int3-g8"), alone)
    assert annealed.losses[:5] == before.losses[:5]
    assert annealed.losses[5] != before.losses[5]
    assert from_there.losses == alone.losses


def test_learned_scales_are_settled_anew_and_forgotten(kit):
    """Weights: from the weight as it is. Inputs: the mean of what LSQ would begin with, over the steps before."""
    inputs, weights = [], []

    class Net(kit.Net):
        def training_step(self, batch, batch_idx):
            inputs.append(batch[0])
            weights.append(self.net[0].weight.detach().clone())
            return super().training_step(batch, batch_idx)

    def look(trainer, module):
        state = trainer.optimizers[0].state
        scale = module.net[0].input_quantizer.scale
        return kit.scales(module), float(state.get(scale.value, {"step": -1.0})["step"]), scale.moving

    steps, module = kit.Record(look=look), Net()
    before = {name: id(p) for name, p in module.named_parameters()}
    qat = QATCallback("int8-lsq", input="int8-tensor-lsq", calibration=2)
    qat.schedule.append(("at", Phase(6, rules={"*": {"weight": "int4-lsq", "input": "int4-tensor-lsq"}})))
    kit.fit(module, qat, steps)
    scales, counts, moving = zip(*steps.seen, strict=True)
    weight = 2 * weights[6].abs().mean(1, keepdim=True) / 7**0.5
    assert torch.allclose(scales[6]["net.0.weight_quantizer.scale.value"], weight, rtol=1e-6)
    seen = [2 * x.abs().mean() / 7**0.5 for x in inputs[4:6]]
    assert torch.allclose(scales[6]["net.0.input_quantizer.scale.value"].squeeze(), sum(seen) / 2, rtol=1e-6)
    assert counts == (-1, 1, -1, 1, 2, 3, -1, 1)  # forgotten when they are settled: at 2, and at the change
    assert moving == (False, False, False, False, True, True, False, False)
    after = {name: id(p) for name, p in module.named_parameters()}
    assert {name: after[name] for name in before} == before


def test_a_moving_average_begins_anew_even_when_frozen(kit):
    inputs = []

    class Net(kit.Net):
        def training_step(self, batch, batch_idx):
            inputs.append(batch[0])
            return super().training_step(batch, batch_idx)

    def ema(bits):
        return Quantizer(Int(bits), PerTensor(), scale=EMA(decay=0.5))

    values = kit.Record(look=lambda trainer, module: float(module.net[0].input_quantizer.scale.value))
    qat = QATCallback("int8-g8", input=ema(8), calibration=1, freeze_scales=3, anneal={5: {"input": ema(4)}})
    kit.fit(Net(), qat, values)
    assert values.seen[3] == values.seen[5]  # looked at before the step at which it begins anew
    assert values.seen[6] == pytest.approx(float(inputs[5].abs().max()) / 7.5, rel=1e-6)
    assert values.seen[7] == values.seen[6]


def test_a_gradient_may_change_alone(kit):
    clipped = Quantizer(Int(4), PerTensor(), gradient=ClippedSTE())
    record = kit.Record(look=lambda trainer, module: type(module.net[0].weight_quantizer.gradient).__name__)
    kit.fit(kit.Net(), QATCallback("int4-tensor", anneal={4: clipped}), record)
    assert record.seen == ["STE"] * 4 + ["ClippedSTE"] * 4


def test_what_begins_late_begins_in_the_format_of_then(kit):
    """It never observes for a format in which it will not act."""
    inputs = []

    class Net(kit.Net):
        def training_step(self, batch, batch_idx):
            inputs.append(batch[0])
            return super().training_step(batch, batch_idx)

    steps = kit.Record(look=lambda trainer, module: kit.scales(module))
    qat = QATCallback(
        "int8-g8", input="int8-tensor-lsq", calibration=2, start=5, anneal={3: {"input": "int4-tensor-lsq"}}
    )
    kit.fit(Net(), qat, steps)
    seen = [2 * x.abs().mean() / 7**0.5 for x in inputs[3:5]]
    assert torch.allclose(steps.seen[5]["net.0.input_quantizer.scale.value"].squeeze(), sum(seen) / 2, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
def test_checkpoints_of_every_stage_load_everywhere(kit):
    folder = kit.folder / "run"
    make = lambda: QATCallback("int8-g8", anneal={2: "int6-g8", 4: "int4-g8"})  # noqa: E731
    module, trainer = kit.Net(), None
    trainer = kit.trainer(make(), kit.every_step(folder), max_steps=6)
    trainer.fit(module, kit.loader(), kit.held_out())
    outputs = kit.outputs(module)
    trainer.validate(module, kit.held_out(), verbose=False)  # converts again, in the last stage
    assert torch.equal(kit.outputs(module), outputs)
    for step, bits in ((1, 8), (3, 6), (6, 4)):
        path = folder / f"step={step}.ckpt"
        loaded = kit.Net.load_from_checkpoint(path)
        assert repr(loaded.eval().net[0].weight_quantizer.format) == f"Int({bits})"
        for target, callbacks in ((kit.Net(), [make()]), (module, [make()]), (kit.Net(), [])):
            predicted = kit.trainer(*callbacks).predict(target, kit.held_out(), ckpt_path=path)
            assert torch.equal(predicted[0], loaded(kit.rows(10, seed=8).tensors[0][:4]))
    assert "load_state_dict" not in vars(module)


@pytest.mark.parametrize("spec", ["int{}-lsq", "int{}-g8"])
def test_a_second_run_begins_in_the_first_format_again(kit, spec):
    wide, narrow = spec.format(8), spec.format(4)
    make = lambda: QATCallback(wide, input="int8-tensor-lsq", calibration=1, anneal={2: narrow})  # noqa: E731
    module, steps = kit.Net(), kit.Record(look=formats)
    kit.fit(module, make(), max_steps=4)
    with pytest.raises(ValueError, match=f"annealed to '{narrow}', .*restore"):
        kit.fit(module, QATCallback(wide, input="int8-tensor-lsq"), max_steps=2)
    kit.fit(module, make(), steps, max_steps=4)
    assert [shown["net.2.weight_quantizer"] for _, shown in steps.seen] == ["Int(8)"] * 2 + ["Int(4)"] * 2
    restored = restore(module)
    kit.fit(restored, QATCallback("int2-g8"), max_steps=1)


# --- plans, without a Trainer ---


def planned(rules, *later):
    module = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8))
    convert(module, rules)
    return module, plan_stages(module, rules, list(later))


def test_later_rules_are_laid_over_those_before():
    module, stages = planned(
        {"*": {"weight": "int8-g8", "input": "int8-token"}, "2": "int8-g4"},
        {"*": "int6-g8"},
        {"*": {"input": "int4-token"}},
        {"0": "int4-g8"},  # from here on it decides layer 0
    )
    assert [{name: str(stage) for name, stage in by_name.items()} for by_name in stages] == [
        {"0.weight": "Quantizer(Int(6), PerGroup(8))"},
        {"0.input": "Quantizer(Int(4), PerToken())"},
        {"0.weight": "Quantizer(Int(4), PerGroup(8))"},
    ]
    assert [repr(stage.format) for stage in module[0].weight_quantizer.stages] == ["Int(8)", "Int(6)", "Int(4)"]
    assert module[2].weight_quantizer.stages == ()
    with pytest.raises(ValueError, match="no layer it decides has a weight quantizer"):
        planned({"*": "int8-g8", "0": "int8-g8", "2": "int8-g8"}, {"*": "int4-g8"})


def test_stages_follow_a_state_dict_and_rules_find_the_first():
    module, _ = planned({"*": "int8-g8"}, {"*": "int4-g8"})
    later = copy.deepcopy(module)
    for _, quantizer in quantizers_of(later):
        quantizer.become(quantizer.stages[1])
    enter_stages(module, later.state_dict())
    assert repr(module[0].weight_quantizer.format) == "Int(4)"
    with AsConverted(module):
        convert(module, {"*": "int8-g8"})
        assert repr(module[0].weight_quantizer.format) == "Int(8)"
    assert repr(module[0].weight_quantizer.format) == "Int(4)"
    with pytest.raises(ValueError, match="converted already"):
        convert(module, {"*": "int8-g8"})


@pytest.mark.parametrize(
    ("rules", "later", "message"),
    [
        ({"*": "int8-g8"}, {"*": "int4-g4"}, "'\\*' of a later phase: 0.weight: .*granularity.* stay.*'int8-g8'"),
        ({"*": "int8-lsq"}, {"*": "int4-channel"}, "dynamic scale stays dynamic"),
        ({"*": "int8-g8"}, {"*": {"input": "int4-token"}}, "no layer it decides has a input quantizer; .*rules="),
        ({"*": "int8-g8"}, {"o": "int4-g8"}, "'o' of a later phase gives a new weight format"),
        ({"*": "int8-g8"}, {"*": "int4-g8", "0": "int4-g8", "2": "int4-g8"}, "'\\*' of a later phase"),
    ],
    ids=range(5),
)
def test_what_cannot_come_later(rules, later, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        planned(rules, later)


def test_a_fit_that_cannot_anneal_never_begins(kit):
    module = kit.Net()
    with pytest.raises(ValueError, match=r"of a later phase: net\.0\.weight"):
        kit.fit(module, QATCallback("int8-g8", anneal={4: "int4-g4"}))
    kit.fit(module, QATCallback("int4-g4"), max_steps=1)
