"""QATCallback(init=...): a solver at the moment at which weights begin to be quantized, once."""

import copy

import pytest
import torch

from qlightning import QATCallback, convert
from qlightning.layers.convert import quantizers_of
from qlightning.solvers import GPTQ, RTN, AdaQuant, calibrate
from qlightning.solvers.fixed import fix_scales


def weights(trainer, module):
    return trainer.global_step, module.net[0].weight.detach().clone()


def test_a_solver_before_the_first_step_is_the_solver_alone(kit):
    """Against the engine on the same batches, without any callback."""
    steps = kit.Record(look=weights)
    kit.fit(kit.Net(), QATCallback("int3-g8", init=GPTQ(batches=4)), steps, max_steps=1)
    alone = kit.Net()
    convert(alone, "int3-g8")
    fix_scales(alone)
    calibrate(alone, list(kit.loader())[:4], GPTQ(batches=4))
    ((_, solved),) = steps.seen
    assert torch.equal(solved, alone.net[0].weight)
    assert not torch.equal(solved, kit.Net().net[0].weight)


def test_layer_wise_calibration_with_quantized_inputs(kit):
    """Weights and biases are those of AdaQuant alone; ranges of inputs are settled on what the fit observes."""
    solver = AdaQuant(steps=8, weight_lr=1e-2, batches=4)
    given = {"weight": "int3-channel-asym", "input": "int8-tensor-lsq"}
    steps = kit.Record(look=lambda trainer, module: copy.deepcopy(module))
    module = kit.Net()
    kit.fit(module, QATCallback(**given, init=solver, calibration=2), steps, max_steps=4)
    alone = kit.Net()
    convert(alone, {"*": given})
    fix_scales(alone)
    calibrate(alone, list(kit.loader())[:4], solver)
    for name in ("0", "2", "4"):
        one, other = (m.net.get_submodule(name) for m in (steps.seen[0], alone))
        assert torch.equal(one.weight, other.weight)
        assert one.bias is None or torch.equal(one.bias, other.bias)
        assert module.net.get_submodule(name).input_quantizer.enabled


@pytest.mark.parametrize("begin", [{"start": 3}, {"schedule": None}], ids=["start", "at-once"])
def test_once_and_at_the_switch(kit, begin):
    steps, plain = kit.Record(look=weights), kit.Record(look=weights)
    module = kit.Net()
    kit.fit(module, QATCallback("int2-g8", init=GPTQ(batches=2), **begin), steps, max_steps=6)
    kit.fit(kit.Net(), QATCallback("int2-g8", **begin), plain, max_steps=6)
    first = begin.get("start", 0)
    assert steps.losses[:first] == plain.losses[:first]
    # looked at behind the switch: where the solver has been the weight is on its grid, and it moves on from there
    for (step, weight), (_, unsolved) in zip(steps.seen, plain.seen, strict=True):
        assert torch.equal(weight, unsolved) == (step < first), step
        if step == first:
            deployed = copy.deepcopy(module.net[0].weight_quantizer)(weight)
            assert torch.equal(weight, deployed)
    moved = [
        float((b - a).abs().max()) for (_, a), (_, b) in zip(steps.seen[first:], steps.seen[first + 1 :], strict=False)
    ]
    assert all(0 < step < 0.1 for step in moved)  # optimizer steps, no second solution


def test_scales_that_followed_their_weight_stay_where_the_solution_was_found(kit):
    module, scales = (
        kit.Net(),
        kit.Record(look=lambda trainer, module: module.net[0].weight_quantizer.scale.value.clone()),
    )
    trainer = kit.fit(module, QATCallback("int4-g8", init=RTN(batches=1), start=2), scales)
    assert torch.equal(scales.seen[2], scales.seen[7])
    assert not torch.equal(scales.seen[1], scales.seen[2])
    trainer.validate(module, kit.held_out(), verbose=False)  # converts again
    assert all(quantizer.enabled for _, quantizer in quantizers_of(module))


def test_a_new_module_is_solved_anew_and_a_fitted_one_is_not(kit):
    qat = QATCallback("int3-g8", init=GPTQ(batches=2))
    first, second, again = kit.Record(look=weights), kit.Record(look=weights), kit.Record(look=weights)
    module = kit.Net()
    kit.fit(module, qat, first, max_steps=2)
    kit.fit(kit.Net(), qat, second, max_steps=2)
    assert torch.equal(first.seen[0][1], second.seen[0][1])
    trained = module.net[0].weight.detach().clone()
    qat = QATCallback("int3-g8", init=GPTQ(batches=2))
    qat._initialized = True
    kit.fit(module, qat, again, max_steps=1)
    assert torch.equal(again.seen[0][1], trained)


def test_in_yaml():
    from jsonargparse import ArgumentParser
    from lightning.pytorch import Callback

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    init = "{class_path: qlightning.solvers.GPTQ, init_args: {batches: 3}}"
    config = parser.parse_string(
        f"callbacks: [{{class_path: qlightning.QATCallback, init_args: {{weight: int4, init: {init}}}}}]"
    )
    (qat,) = parser.instantiate(config).callbacks
    assert qat.init == GPTQ(batches=3)
