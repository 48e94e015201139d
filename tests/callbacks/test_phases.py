"""Phases: what acts when, and that range, scale and switch move together."""

import itertools

import pytest
import torch
from lightning.pytorch import Callback

from qlightning import QATCallback, Quantizer
from qlightning.callbacks.phase import Phase
from qlightning.layers.convert import quantizers_of
from qlightning.numerics.formats import Int
from qlightning.numerics.gradients import LSQ
from qlightning.numerics.granularity import PerTensor
from qlightning.numerics.learned import EMA, Learned
from qlightning.numerics.scales import LSQStep
from qlightning.numerics.spec import parse


def learned(**options):
    return QATCallback("int4-lsq", input="int8-tensor-lsq", **{"calibration": 2, **options})


class Inputs(Callback):
    """What went into the first layer in training, step by step, with its weight before each step."""

    def __init__(self) -> None:
        self.batches, self.weights = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch[0])
        self.weights.append(pl_module.net[0].weight.detach().clone())


def acting(trainer, module):
    return trainer.global_step, frozenset(name for name, quantizer in quantizers_of(module) if quantizer.enabled)


WEIGHTS = frozenset(f"net.{i}.weight_quantizer" for i in (0, 2, 4))
ALL = WEIGHTS | frozenset(f"net.{i}.input_quantizer" for i in (0, 2, 4))


@pytest.mark.parametrize(
    ("start", "weights_from", "all_from"),
    [(0, 0, 2), (1, 1, 2), (2, 2, 2), (5, 5, 5), (0.5, 4, 4), (0.1, 1, 2), (0.0, 0, 2)],
)
def test_what_acts_when(kit, start, weights_from, all_from):
    steps = kit.Record(look=acting)
    kit.fit(kit.Net(), learned(start=start), steps)
    for step, names in steps.seen:
        assert names == (frozenset() if step < weights_from else WEIGHTS if step < all_from else ALL)


def test_dynamic_scales_need_no_calibration(kit):
    steps = kit.Record(look=acting)
    kit.fit(kit.Net(), QATCallback("int4-g8", input="int8-token", calibration=100), steps)
    assert {names for _, names in steps.seen} == {ALL}


@pytest.mark.parametrize(
    "scheme", [{"weight": "int4-g8"}, {"weight": "int4-lsq", "input": "int8-tensor-lsq", "calibration": 2}]
)
def test_before_the_switch_it_is_the_float_run(kit, scheme):
    quantized, plain = kit.Record(), kit.Record()
    before, unconverted = kit.Net(dropout=0.3), kit.Net(dropout=0.3)
    torch.manual_seed(1)
    kit.fit(before, QATCallback(**scheme, start=5), quantized, max_steps=6)
    torch.manual_seed(1)
    kit.fit(unconverted, plain, max_steps=6)
    assert quantized.losses[:5] == plain.losses[:5]
    assert quantized.losses[5] != plain.losses[5]

    before, unconverted = kit.Net(dropout=0.3), kit.Net(dropout=0.3)
    torch.manual_seed(1)
    kit.fit(before, QATCallback(**scheme, start=5), max_steps=5, fast_dev_run=5)
    torch.manual_seed(1)
    kit.fit(unconverted, max_steps=5, fast_dev_run=5)
    assert all(torch.equal(before.get_parameter(name), p) for name, p in unconverted.named_parameters())
    assert torch.equal(kit.outputs(before), kit.outputs(unconverted))


def test_scales_at_the_switch_by_hand(kit):
    """LSQ's step of the weight as it is at step 5, and the mean of LSQ's steps of the inputs at steps 3 and 4."""
    module, seen = kit.Net(), Inputs()
    scales = kit.Record(look=lambda trainer, module: kit.scales(module))
    kit.fit(module, learned(start=5), scales, seen)
    # Record looks after the callback's own on_train_batch_start: entry 5 is the scale just set, before it is trained.
    weight = seen.weights[5]
    wanted = 2 * weight.abs().mean(1, keepdim=True) / 7**0.5
    assert torch.allclose(scales.seen[5]["net.0.weight_quantizer.scale.value"], wanted, rtol=1e-6)
    inputs = [2 * x.abs().mean() / 127**0.5 for x in seen.batches[3:5]]
    assert torch.allclose(scales.seen[5]["net.0.input_quantizer.scale.value"].squeeze(), sum(inputs) / 2, rtol=1e-6)


def test_inputs_observe_the_first_steps_when_quantization_begins_at_once(kit):
    module, seen = kit.Net(), Inputs()
    scales = kit.Record(look=lambda trainer, module: kit.scales(module))
    kit.fit(module, learned(start=0, calibration=3), scales, seen)
    inputs = [2 * x.abs().mean() / 127**0.5 for x in seen.batches[:3]]
    assert torch.allclose(scales.seen[3]["net.0.input_quantizer.scale.value"].squeeze(), sum(inputs) / 3, rtol=1e-6)


def test_a_second_run_that_begins_in_float_observes_anew(kit):
    module, seen = kit.Net(), Inputs()
    kit.fit(module, learned(start=0))
    scales = kit.Record(look=lambda trainer, module: kit.scales(module))
    kit.fit(module, learned(start=5), scales, seen)
    inputs = [2 * x.abs().mean() / 127**0.5 for x in seen.batches[3:5]]
    assert torch.allclose(scales.seen[5]["net.0.input_quantizer.scale.value"].squeeze(), sum(inputs) / 2, rtol=1e-6)


def test_an_average_that_goes_on_by_hand(kit):
    """EMA: mean over what it observed first, then decay * past + (1 - decay) * absmax, and nothing once frozen."""
    module, seen = kit.Net(), Inputs()
    ema = Quantizer(Int(8), PerTensor(), scale=EMA(decay=0.75))
    values = kit.Record(look=lambda trainer, module: float(module.net[0].input_quantizer.scale.value))
    kit.fit(module, QATCallback("int4-g8", input=ema, start=3, calibration=2, freeze_scales=6), values, seen)
    steps = [float(x.abs().max() / 127.5) for x in seen.batches]
    wanted, value = [], 1.0
    for step in range(8):
        wanted.append(value)  # before step
        if step == 1:
            value = steps[1]
        elif 1 < step < 6:
            value = 0.75 * value + 0.25 * steps[step]
    assert values.seen == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("make", ["adam", "momentum"])
def test_frozen_scales_do_not_move_by_a_bit(kit, make):
    class Fast(kit.Net):
        def configure_optimizers(self):
            if make == "adam":
                return torch.optim.Adam(self.parameters(), lr=0.05, weight_decay=0.1)
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.95)

    steps = kit.Record(look=lambda trainer, module: (kit.scales(module), module.net[0].weight.detach().clone()))
    ema = Quantizer(Int(8), PerTensor(), scale=EMA())
    qat = QATCallback("int4-lsq", input="int8-tensor-lsq", rules={"net.4": {"weight": "int8", "input": ema}}, **ROUND)
    averages = kit.Record(look=lambda trainer, module: float(module.net[4].input_quantizer.scale.value))
    module = Fast()
    kit.fit(module, qat, steps, averages, max_steps=10)
    scales, weights = zip(*steps.seen, strict=True)
    for name, frozen in scales[6].items():
        assert not torch.equal(frozen, scales[5][name])
        assert all(torch.equal(later[name], frozen) for later in scales[7:])
        assert torch.equal(kit.scales(module)[name], frozen)
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(weights))
    assert averages.seen[5] != averages.seen[6] == averages.seen[9] == float(module.net[4].input_quantizer.scale.value)


ROUND = {"start": 2, "calibration": 2, "freeze_scales": 6}


def test_scales_frozen_at_once_are_those_of_the_switch(kit):
    steps = kit.Record(look=lambda trainer, module: kit.scales(module))
    module = kit.Net()
    kit.fit(module, learned(start=3, freeze_scales=0), steps)
    assert all(torch.equal(value, steps.seen[3][name]) for name, value in kit.scales(module).items())


def test_held_out_data_is_not_observed(kit):
    """Validation in the middle of calibration leaves the statistics, and so every later loss, as they were."""
    with_validation, without = kit.Record(), kit.Record()
    kit.fit(kit.Net(), learned(start=4), with_validation, val_check_interval=1)
    kit.fit(kit.Net(), learned(start=4), without, limit_val_batches=0)
    assert with_validation.losses == without.losses


def test_validation_does_not_move_the_random_numbers(kit):
    class Noisy(kit.Net):
        def validation_step(self, batch, batch_idx):
            torch.randn(3)

    with_validation, without = kit.Record(), kit.Record()
    for record, options in ((with_validation, {"val_check_interval": 2}), (without, {"limit_val_batches": 0})):
        torch.manual_seed(3)
        kit.fit(Noisy(dropout=0.5), QATCallback("int4-g8"), record, **options)
    assert with_validation.losses == without.losses


def test_stochastic_rounding_draws_anew_for_each_batch(kit):
    def look(trainer, module):
        quantizer = module.net[0].weight_quantizer
        return int(quantizer.rounding.step), quantizer(torch.linspace(-1, 1, 128).view(16, 8))

    draws = kit.Record(look=look)
    kit.fit(kit.Net(), QATCallback("int4-g8-sr"), draws, accumulate_grad_batches=2, max_steps=3)
    steps, values = zip(*draws.seen, strict=True)
    assert steps == (1, 2, 3, 4, 5, 6)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(values, 2))


def test_recomputed_layers_observe_once(kit):
    class Checkpointed(kit.Net):
        def forward(self, x):
            if not torch.is_grad_enabled():
                return super().forward(x)
            return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)

    plain, checkpointed = kit.Record(), kit.Record()
    kit.fit(kit.Net(), learned(start=3), plain)
    module = Checkpointed()
    kit.fit(module, learned(start=3), checkpointed)
    assert plain.losses == checkpointed.losses
    assert float(module.net[0].input_quantizer.scale.count) == 2


def test_frozen_parts_in_eval_mode_are_calibrated(kit):
    class Backbone(kit.Net):
        def __init__(self):
            super().__init__()
            self.net[0].requires_grad_(False)

        def on_train_batch_start(self, batch, batch_idx):
            self.net[0].eval()

    steps = kit.Record(look=acting)
    kit.fit(Backbone(), learned(start=3), steps)
    assert steps.seen[3] == (3, ALL)


# --- a schedule of phases ---


FIVE = [
    Phase(0, observe="input"),
    Phase(2, quantize="weight"),
    Phase(4, quantize="input"),
    Phase(6, train="scales", lr=0.5),
    Phase(8, train="weights"),
]


def test_five_phases(kit):
    """Calibrate -> weights -> activations -> learn scales -> freeze."""

    def look(trainer, module):
        weights = {name: p.detach().clone() for name, p in module.named_parameters() if "quantizer" not in name}
        observes = {name for name, quantizer in quantizers_of(module) if quantizer.observing}
        return acting(trainer, module)[1], observes, weights, kit.scales(module)

    steps, seen = kit.Record(look=look), Inputs()
    kit.fit(kit.Net(), QATCallback("int4-lsq", input="int8-tensor-lsq", schedule=FIVE), steps, seen, max_steps=10)
    acts, observes, weights, scales = zip(*steps.seen, strict=True)
    assert acts == (frozenset(),) * 2 + (WEIGHTS,) * 2 + (ALL,) * 6
    assert observes == (ALL - WEIGHTS,) * 4 + (set(),) * 6
    for step, (now, then) in enumerate(itertools.pairwise(weights)):
        moved = {name for name in now if not torch.equal(now[name], then[name])}
        assert moved == (set() if step in (6, 7) else set(now)), step
    for step, (now, then) in enumerate(itertools.pairwise(scales)):
        moved = {name.partition("_")[0].rpartition(".")[2] for name in now if not torch.equal(now[name], then[name])}
        wanted: dict[int, set[str]] = {
            1: {"weight"},
            2: {"weight"},
            3: {"weight", "input"},
            **{step: {"weight", "input"} for step in range(4, 8)},
        }
        assert moved == wanted.get(step, set()), step
    # what the inputs' scales were settled on: only what was seen with quantized weights
    inputs = [2 * x.abs().mean() / 127**0.5 for x in seen.batches[2:4]]
    assert torch.allclose(scales[4]["net.0.input_quantizer.scale.value"].squeeze(), sum(inputs) / 2, rtol=1e-6)


def test_a_schedule_without_observe_calibrates_as_start_does(kit):
    """The last `calibration` steps before they act; here the weights' switch lies in the middle of them."""
    steps, seen = kit.Record(look=lambda trainer, module: kit.scales(module)), Inputs()
    phases = [Phase(0), Phase(3, quantize="weight"), Phase(5, quantize="all")]
    kit.fit(kit.Net(), QATCallback("int4-lsq", input="int8-tensor-lsq", calibration=4, schedule=phases), steps, seen)
    inputs = [2 * x.abs().mean() / 127**0.5 for x in seen.batches[3:5]]
    assert torch.allclose(steps.seen[5]["net.0.input_quantizer.scale.value"].squeeze(), sum(inputs) / 2, rtol=1e-6)


@pytest.mark.parametrize("shorthand", [{"start": 3}, {"start": 0.25, "freeze_scales": 6}, {"ramp": 3}], ids=str)
def test_shorthands_and_phases_are_one(kit, shorthand):
    phases = [phase for _, phase in learned(**shorthand).schedule]
    losses = [kit.Record(), kit.Record()]
    for qat, record in zip((learned(**shorthand), learned(schedule=phases)), losses, strict=True):
        kit.fit(kit.Net(), qat, record)
    assert losses[0].losses == losses[1].losses


# --- strength (S18) ---


def test_a_ramp_by_hand(kit):
    """The first layer's output in training is that of w + lambda (Q(w) - w); in evaluation of Q(w)."""
    x, _ = kit.rows(10, seed=8).tensors

    def look(trainer, module):
        layer, weight = module.net[0], module.net[0].weight.detach()
        deployed = parse("int4-g8")(weight)
        shown, strength = layer(x), layer.weight_quantizer.strength
        layer.eval()
        evaluated = layer(x)
        layer.train()
        wanted = {
            k: torch.nn.functional.linear(x, weight.lerp(deployed, k), layer.bias) for k in (0.0, 0.25, 0.5, 0.75)
        }
        full = torch.nn.functional.linear(x, deployed, layer.bias)
        enabled = layer.weight_quantizer.enabled
        assert torch.allclose(evaluated, full if enabled else wanted[0.0], atol=1e-6)
        if not enabled or strength is None:
            return [None if enabled else 0.0, torch.allclose(shown, full if enabled else wanted[0.0], atol=1e-6)]
        return [float(strength), torch.allclose(shown, wanted[float(strength)], atol=1e-6)]

    steps = kit.Record(look=look)
    kit.fit(kit.Net(), QATCallback("int4-g8", start=2, ramp=3), steps)
    assert steps.seen == [[k, True] for k in (0.0, 0.0, 0.25, 0.5, 0.75, None, None, None)]


@pytest.mark.filterwarnings("ignore:.*average")
def test_a_ramp_beside_an_average(kit):
    """An averaged copy pairs buffers with the module's, which has one more per quantizer while it ramps."""
    from lightning.pytorch.callbacks import EMAWeightAveraging

    plain, averaged = kit.Record(), kit.Record()
    kit.fit(kit.Net(), learned(start=2, ramp=3), plain, limit_val_batches=0)
    kit.fit(kit.Net(), learned(start=2, ramp=3), EMAWeightAveraging(decay=0.5), averaged, limit_val_batches=0)
    assert plain.losses == averaged.losses


def test_learned_offsets_are_settled_and_frozen_too(kit):
    module = kit.Net()
    steps = kit.Record(look=lambda trainer, module: kit.scales(module))
    step = Quantizer(Int(4), scale=Learned(LSQStep()), gradient=LSQ())
    offset = Quantizer(Int(4, symmetric=False), PerTensor(), scale=Learned(), gradient=LSQ())
    kit.fit(module, QATCallback(step, input=offset, **ROUND), steps)
    names = [name for name in steps.seen[0] if name.endswith("lower")]
    assert len(names) == 3
    moving = [name for name in names if not torch.equal(steps.seen[2][name], steps.seen[6][name])]
    assert "net.0.input_quantizer.scale.lower" in moving
    assert all(torch.equal(steps.seen[6][name], value) for name, value in kit.scales(module).items())
