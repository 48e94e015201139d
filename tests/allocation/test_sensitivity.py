"""Measured sensitivities against quantizing single layers by hand; sizes against what is deployed."""

import copy

import pytest
import torch
from torch import nn

from qlightning import convert, restore
from qlightning.allocation import allocate, measure_sensitivity
from qlightning.evaluation.size import deployed_bytes
from qlightning.layers.convert import quantizers_of


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Conv1d(4, 4, 3, padding=1), nn.ReLU(), nn.Linear(16, 3))


def forward(module, x):
    y = module[1](module[0](x))
    y = module[3](module[2](y.view(-1, 4, 4))).flatten(1)
    return module[4](y)


def loss(module, batch):
    return forward(module, batch).square().mean()


BATCHES = [torch.randn(5, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
CANDIDATES = ["int2-channel", "int4-channel-lsq", "int8-channel", None]


@torch.no_grad()
def by_hand(module, rules):
    module = copy.deepcopy(module).eval()
    if any(rules.values()):
        convert(module, rules, min_coverage=0.0)
    return sum(float(loss(module, batch)) for batch in BATCHES) / 2


def test_every_entry_is_that_layer_alone():
    module = make()
    before = copy.deepcopy(module.state_dict())
    options = measure_sensitivity(module, loss, BATCHES, candidates=CANDIDATES)
    assert list(options) == [("0",), ("2",), ("4",)]
    base = by_hand(module, {})
    for (name,), row in options.items():
        assert [option.spec for option in row] == CANDIDATES
        for option in row:
            expected = by_hand(module, {name: option.spec}) - base
            assert option.increase == pytest.approx(expected, abs=1e-7), (name, option.spec)
        assert row[3].increase == 0.0
        assert abs(row[0].increase) > abs(row[2].increase)
    assert module.training
    assert [type(layer) for layer in module] == [nn.Linear, nn.Dropout, nn.Conv1d, nn.ReLU, nn.Linear]
    assert set(module.state_dict()) == set(before)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_converted_module_beside_its_own_precision_and_in_float():
    plain, module = make(), make()
    convert(module, {"*": "int8-channel-lsq", "4": "int3-channel"})
    own = dict(quantizers_of(module))
    before = copy.deepcopy(module.state_dict())
    rules = {"0": "int8-channel-lsq", "2": "int8-channel-lsq", "4": "int3-channel"}
    beside = measure_sensitivity(module, loss, BATCHES, candidates=["int2-channel", None], others="quantized")
    base = by_hand(plain, rules)
    for (name,), row in beside.items():
        for option in row:
            assert option.increase == pytest.approx(by_hand(plain, {**rules, name: option.spec}) - base, abs=1e-7)
    alone = measure_sensitivity(module, loss, BATCHES, candidates=["int2-channel", None])
    assert alone == measure_sensitivity(plain, loss, BATCHES, candidates=["int2-channel", None])
    assert dict(quantizers_of(module)) == own
    assert all(quantizer.enabled for quantizer in own.values())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_the_same_random_numbers_in_every_evaluation():
    """A noisy loss, as a diffusion model's: the noise is no sensitivity, and the run's generator does not notice."""

    def noisy(module, batch):
        return loss(module, batch) + torch.rand(())

    torch.manual_seed(5)
    state = torch.get_rng_state()
    options = measure_sensitivity(make(), noisy, BATCHES, candidates=["int8-channel", None])
    quiet = measure_sensitivity(make(), loss, BATCHES, candidates=["int8-channel", None])
    for names, row in options.items():
        assert row[0].increase == pytest.approx(quiet[names][0].increase, abs=1e-6)
        assert row[1].increase == 0.0
    make()
    torch.manual_seed(5)
    assert torch.equal(state, torch.get_rng_state())


def test_bytes_are_those_that_are_deployed():
    module = make()
    options = measure_sensitivity(module, loss, BATCHES[:1], candidates=["int3-asym-g4", "int4-channel-lsq", None])
    biases = sum(p.nbytes for name, p in module.named_parameters() if name.endswith("bias"))
    for choice in ((0, 0, 0), (1, 0, 1), (2, 1, 0), (1, 1, 2)):
        fixed = {names: [row[k]] for (names, row), k in zip(options.items(), choice, strict=True)}
        plan = allocate(fixed, budget=10**9)
        converted = make()
        convert(converted, plan.rules, min_coverage=0.0)
        assert plan.cost == deployed_bytes(converted) - biases


def test_bit_operations():
    module = make()
    convert(module, {"*": {"weight": "int8-channel", "input": "int4-token"}, "4": "int8-channel"})
    options = measure_sensitivity(module, loss, BATCHES[:1], candidates=["int2-channel", None])
    assert options["0",][0].bit_operations == 5 * 8 * 16 * 2 * 4
    assert options["2",][0].bit_operations == 5 * 4 * 4 * 4 * 3 * 2 * 4
    assert options["4",][0].bit_operations == 5 * 16 * 3 * 2 * 16
    assert options["4",][1].bit_operations == 5 * 16 * 3 * 32 * 16


def test_layers_that_share_a_weight_are_one():
    module = nn.ModuleDict({"table": nn.Embedding(8, 8), "mid": nn.Linear(8, 8), "head": nn.Linear(8, 8, bias=False)})
    module["head"].weight = module["table"].weight
    convert(module, {"*": "int8-channel", "type:Embedding": "int8-channel"}, tied="share")

    def tied_loss(module, ids):
        return module["head"](module["mid"](module["table"](ids))).square().mean()

    batches = [torch.arange(8)]
    options = measure_sensitivity(module, tied_loss, batches, candidates=["int2-channel", "int8-channel"])
    assert list(options) == [("table", "head"), ("mid",)]
    assert options["table", "head"][0].bytes == 8 * 8 * 2 // 8 + 8 * 4
    plan = allocate(options, budget=10**6)
    assert set(plan.rules) == {"table", "mid", "head"}
    restore(module)
    convert(module, {**plan.rules}, tied="share")


def test_layers_that_are_kept_and_what_cannot_work():
    options = measure_sensitivity(make(), loss, BATCHES, candidates=["int4-channel"], keep=["4"])
    assert list(options) == [("0",), ("2",)]
    with pytest.raises(ValueError, match=r"candidates=\['int4', 'int8'\]"):
        measure_sensitivity(make(), loss, [], candidates=["int4"])
    with pytest.raises(ValueError, match="every candidate is float"):
        measure_sensitivity(make(), loss, BATCHES, candidates=[None])
    with pytest.raises(ValueError, match=r"convert\(module, 'int8'\) first"):
        measure_sensitivity(make(), loss, BATCHES, candidates=["int4"], others="quantized")
    module = make()
    convert(module, "int8")
    with pytest.raises(ValueError, match="keep is said of a plain module"):
        measure_sensitivity(module, loss, BATCHES, candidates=["int4"], keep=["4"])


def test_a_failing_loss_leaves_the_module_as_it_was():
    module = make()
    calls = []

    def failing(module, batch):
        calls.append(1)
        if len(calls) > 6:
            raise RuntimeError("out of memory")
        return loss(module, batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        measure_sensitivity(module, failing, BATCHES, candidates=["int4-channel"])
    assert module.training
    assert type(module[0]) is nn.Linear
