"""Bits found when quantization begins: as measured by hand, inside the budget, kept by checkpoints."""

import copy

import pytest
import torch
from torch import nn

from qlightning import QATCallback, convert, restore
from qlightning.allocation import allocate, measure_sensitivity
from qlightning.callbacks.allocation import AllocationCallback, finest
from qlightning.evaluation.size import deployed_bytes
from qlightning.layers.convert import quantizers_of
from qlightning.numerics import parse
from qlightning.solvers import AdaQuant, calibrate

LSQ = ["int2-channel-lsq", "int4-channel-lsq", "int8-channel-lsq"]
DYNAMIC = ["int2-g8", "int3-g8", "int8-g8"]


def bits(module: nn.Module) -> list[int]:
    return [quantizer.format.bits for _, quantizer in quantizers_of(module)]


@pytest.mark.parametrize("candidates", [LSQ, DYNAMIC], ids=["lsq", "dynamic"])
def test_what_is_found_is_what_is_measured_by_hand(kit, candidates):
    finder, module = AllocationCallback(candidates, 11.0, batches=3), kit.Net()
    qat = QATCallback(finest(candidates))
    start = kit.Record(look=lambda trainer, module: (bits(module), kit.scales(module)))
    kit.fit(module, qat, finder, start, max_steps=2)

    plain = kit.Net()
    convert(plain, parse(candidates[-1]))
    batches = [batch for _, batch in zip(range(3), kit.loader(), strict=False)]
    options = measure_sensitivity(
        plain, lambda m, batch: m.loss(batch), batches, candidates=[parse(c) for c in candidates], others="quantized"
    )
    weights = sum(p.numel() for name, p in plain.named_parameters() if name.endswith("weight"))
    by_hand = allocate(options, budget=11.0 / 8 * weights)
    expected = [by_hand.choices[names].spec.format.bits for names in options]
    assert bits(module) == expected
    assert start.seen[0][0] == expected
    fresh = kit.Net()
    convert(fresh, by_hand.rules)
    for name, scale in kit.scales(fresh).items():  # settled for their bits
        assert torch.equal(start.seen[0][1][name], scale), name
    assert len(set(expected)) > 1
    biases = 4 * sum(p.numel() for name, p in plain.named_parameters() if name.endswith("bias"))
    assert deployed_bytes(module) - biases == by_hand.cost <= 11.0 / 8 * weights


def test_it_waits_for_quantization_to_begin_and_settles_scales_from_then(kit):
    finder = AllocationCallback(LSQ, 9.0)
    seen = kit.Record(look=lambda trainer, module: (bits(module), dict(finder.allocation)))
    module = kit.Net()
    kit.fit(module, QATCallback(finest(LSQ), start=3), finder, seen, max_steps=5)
    assert [found for _, found in seen.seen[:3]] == [{}] * 3
    assert seen.seen[0][0] == [8, 8, 8]
    assert len(seen.seen[3][1]) == 3
    assert seen.seen[3][0] == bits(module) != [8, 8, 8]
    assert all(quantizer.enabled and quantizer.ready for _, quantizer in quantizers_of(module))


@pytest.mark.parametrize("candidates", [LSQ, DYNAMIC], ids=["lsq", "dynamic"])
def test_a_resumed_run_has_its_bits_from_the_checkpoint(kit, candidates):
    def run(**options):
        torch.manual_seed(0)
        record, finder, module = kit.Record(), AllocationCallback(candidates, 9.5), kit.Net(dropout=0.3)
        callbacks = QATCallback(finest(candidates), start=2), finder, record, kit.every_step(kit.folder)
        kit.fit(module, *callbacks, max_steps=6, **options)
        return record.losses, finder, module

    losses, finder, module = run()
    for step in (1, 4):
        again, found, resumed = run(ckpt_path=kit.folder / f"step={step}.ckpt")
        assert again == losses[step:]
        assert found.allocation == finder.allocation
        assert bits(resumed) == bits(module)
    loaded = kit.Net.load_from_checkpoint(kit.folder / "step=6.ckpt")
    assert bits(loaded) == bits(module)
    assert torch.equal(kit.outputs(loaded), kit.outputs(module))


def test_the_run_does_not_notice_the_measuring(kit):
    """With one affordable candidate only, the run is that candidate's, bit for bit."""
    plain, measured = kit.Record(), kit.Record()
    torch.manual_seed(0)
    kit.fit(kit.Net(dropout=0.3), QATCallback("int2-g8"), plain, max_steps=4)
    torch.manual_seed(0)
    finder = AllocationCallback(DYNAMIC, 6.001)
    kit.fit(kit.Net(dropout=0.3), QATCallback(finest(DYNAMIC)), finder, measured, max_steps=4)
    assert measured.losses == plain.losses


def test_the_same_trainer_tests_the_module_and_averages_know(kit):
    """QATCallback converts again for every stage; inputs keep their quantizers."""
    from lightning.pytorch.callbacks import EMAWeightAveraging

    module, finder, average = kit.Net(), AllocationCallback(LSQ, 9.5), EMAWeightAveraging(decay=0.5)
    qat = QATCallback(finest(LSQ), input="int8-token")
    trainer = kit.trainer(qat, finder, average, max_steps=3)
    trainer.fit(module, kit.loader(), kit.held_out())
    found = {name: quantizer.format.bits for name, quantizer in quantizers_of(module)}
    assert len(set(found.values())) > 1
    (result,) = trainer.test(module, kit.held_out(), verbose=False)
    assert result["test_loss"] > 0
    assert {name: quantizer.format.bits for name, quantizer in quantizers_of(module)} == found
    assert [name for name in found if "input" in name] == [f"net.{i}.input_quantizer" for i in (0, 2, 4)]


def test_bit_operations(kit):
    finder, module = AllocationCallback(DYNAMIC, 2.5, of="bit_operations", batches=1), kit.Net()
    kit.fit(module, QATCallback(finest(DYNAMIC)), finder, max_steps=1)
    macs = [8 * 16, 16 * 16, 16 * 4]
    assert sum(m * b for m, b in zip(macs, bits(module), strict=True)) <= 2.5 * sum(macs)
    assert len(set(bits(module))) > 1


def test_what_cannot_work(kit):
    with pytest.raises(ValueError, match=r"AllocationCallback\(budget=4\.0"):
        AllocationCallback(budget=0)
    with pytest.raises(ValueError, match="that a QATCallback quantizes"):
        kit.fit(kit.Net(), AllocationCallback(DYNAMIC, 9.0), max_steps=1)
    with pytest.raises(ValueError, match="is no candidate: write QATCallback"):
        kit.fit(kit.Net(), QATCallback("int4-g8"), AllocationCallback(DYNAMIC, 9.0), max_steps=1)
    with pytest.raises(ValueError, match="cannot be met"):
        kit.fit(kit.Net(), QATCallback(finest(DYNAMIC)), AllocationCallback(DYNAMIC, 1.0), max_steps=1)
    module = kit.Net()
    kit.fit(module, QATCallback(finest(DYNAMIC)), AllocationCallback(DYNAMIC, 7.0), max_steps=1)
    assert "load_state_dict" not in vars(module)
    restore(module)


def test_a_solver_finds_what_is_measured_and_trained_on(kit):
    """Layers are those of the solver at the chosen bits, before the first step."""
    candidates = ["int2-channel-asym-learned", "int8-channel-asym-learned"]
    solver = AdaQuant(steps=4, weight_lr=1e-2, held_out=0.0, batches=2)
    finder, module = AllocationCallback(candidates, 9.0, batches=2, solver=solver), kit.Net()
    start = kit.Record(look=lambda trainer, module: copy.deepcopy(module))
    kit.fit(module, QATCallback(finest(candidates)), finder, start, max_steps=1)
    assert len(set(bits(module))) > 1
    versions = {}
    for spec in candidates:
        plain = kit.Net()
        convert(plain, parse(candidates[1]))
        for quantizer, layer in ((m.weight_quantizer, m) for m in plain.modules() if hasattr(m, "weight_quantizer")):
            if not quantizer.deploys_like(parse(spec)):
                quantizer.become(parse(spec))
            quantizer.initialize(layer.weight)
        calibrate(plain, list(kit.loader())[:2], solver)
        versions[parse(spec).format.bits] = plain
    for name, layer in start.seen[0].named_modules():
        if hasattr(layer, "weight_quantizer"):
            wanted = versions[layer.weight_quantizer.format.bits].get_submodule(name)
            assert torch.equal(layer.weight, wanted.weight)
            assert torch.equal(layer.weight_quantizer(layer.weight), wanted.weight_quantizer(wanted.weight))
    with pytest.raises(ValueError, match="int4-channel-asym-learned"):
        AllocationCallback(["int2-channel", "int8-channel"], solver=solver)
