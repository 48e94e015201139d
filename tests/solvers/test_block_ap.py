"""Block-AP: without training it is rounding, with training blocks come closer, and weights end on the grid."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qlightning.capture import sites_of
from qlightning.layers.convert import convert
from qlightning.numerics import Int, Learned, PerGroup, Quantizer
from qlightning.numerics.floats import Float
from qlightning.numerics.microscaling import TwoLevel
from qlightning.numerics.scales import Grid
from qlightning.solvers import RTN, BlockAP, calibrate
from qlightning.solvers.block_ap import StepAndZero
from qlightning.solvers.fixed import fix_scales
from qlightning.solvers.learning import cosine
from qlightning.solvers.solver import BlockTask

FROZEN = Quantizer(Int(2, symmetric=False), PerGroup(8), scale=Learned(rounding="frozen"))


def errors(report):
    return [block.error for block in report.blocks]


def test_without_training_it_is_rounding_to_nearest(small) -> None:
    for spec in ("int2-g8-asym", "int3-g8", FROZEN):
        ours, theirs = small.llama(spec), small.llama(spec)
        report = calibrate(ours, small.tokens(), BlockAP(epochs=0))
        calibrate(theirs, small.tokens(), RTN())
        for one, other in zip(sites_of(ours), sites_of(theirs), strict=True):
            assert torch.equal(one.weight, other.weight)
            assert torch.equal(one.quantizer(one.weight).detach(), other.weight)
        assert all(row.changed == 0 for row in report.sites)


@pytest.mark.parametrize("spec", ["int2-g8-asym", FROZEN, "int3-lsq"], ids=range(3))
def test_blocks_come_closer_and_weights_lie_on_the_grid(small, spec) -> None:
    model = small.llama(spec)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "quantizer" not in name}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    start = calibrate(small.llama(spec), small.tokens(), BlockAP(epochs=0))
    report = calibrate(model, small.tokens(1), BlockAP(epochs=8, weight_lr=4e-3, quant_lr=4e-3, held_out=0))
    assert errors(report)[0] < 0.8 * errors(start)[0]
    assert all(row.changed > 0 for row in report.sites)
    owned = {f"{site.name}.weight" for site in sites_of(model)}
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]) == (name not in owned)
            assert parameter.requires_grad == wanted[name]
            assert parameter.grad is None
    for site in sites_of(model):
        assert not isinstance(site.quantizer.scale, StepAndZero)
        assert torch.equal(site.quantizer(site.weight).detach(), site.weight)
        stored = site.quantizer.dequantize(site.quantizer.quantize(site.weight), torch.float32)
        assert torch.equal(stored, site.weight)


def task_of(streams, targets, spec="int2-asym"):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    convert(block, spec)
    fix_scales(block)
    for site in sites_of(block):
        site.quantizer.enabled = False
    block.requires_grad_(False)
    calls = {name: [((x,), {}) for x in xs] for name, xs in streams.items()}
    return BlockTask(block, [[site] for site in sites_of(block)], calls, {"fp": targets})


def test_it_learns_on_the_quantized_stream_with_two_rates() -> None:
    """The same steps of torch's AdamW on the formula written out."""
    g = torch.Generator().manual_seed(0)
    xs, ys = [torch.randn(16, 8, generator=g)], [torch.randn(16, 4, generator=g)]
    task = task_of({"q": xs, "fp": [torch.full((16, 8), 1e3)]}, ys)
    weights = [site.weight.clone().requires_grad_() for site in sites_of(task.block)]
    biases = [task.block[i].bias.detach().clone() for i in (0, 2)]
    grids = [site.quantizer.grid(site.weight) for site in sites_of(task.block)]
    steps = [grid.scale.clone().requires_grad_() for grid in grids]
    zeros = [grid.zero_point.clone().requires_grad_() for grid in grids]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "lr": 1e-2}, {"params": [*steps, *zeros], "lr": 3e-2}], weight_decay=0.0
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: cosine(t / 3, 0.05))

    def through(x, value):
        return x + (value - x).detach()

    def quantized(w, s, z):
        s, z = through(s, s.clamp(1e-4, 1e4)), through(z, z.round().clamp(-2, 1))
        return s * ((through(w / s, (w / s).round()) + z).clamp(-2, 1) - z)

    for _ in range(3):
        first, second = (quantized(*parts) for parts in zip(weights, steps, zeros, strict=True))
        loss = F.mse_loss(F.linear(F.relu(F.linear(xs[0], first, biases[0])), second, biases[1]), ys[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    with torch.enable_grad():
        BlockAP(epochs=3, weight_lr=1e-2, quant_lr=3e-2, held_out=0).solve(task, generator=torch.Generator())
    for site, parts in zip(sites_of(task.block), zip(weights, steps, zeros, strict=True), strict=True):
        torch.testing.assert_close(site.weight, quantized(*parts).detach(), rtol=1e-4, atol=1e-6)


def test_of_a_block_the_best_epoch_is_kept() -> None:
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(4, 8, generator=g) for _ in range(4)]
    task = task_of({"q": xs}, [torch.randn(4, 4, generator=g) for _ in xs])
    nearest = [site.quantizer(site.weight).detach() for site in sites_of(task.block)]
    seen = []
    task.block.register_forward_pre_hook(lambda m, args: seen.append(torch.is_grad_enabled()))
    with torch.enable_grad():
        solver = BlockAP(epochs=50, weight_lr=5.0, quant_lr=0.0, held_out=0.25, patience=2)
        said = solver.solve(task, generator=torch.Generator())
    assert seen.count(True) < 50 * 3  # it ended early
    assert seen.count(True) % 3 == 0  # the fourth batch is never learned from
    share = float(next(iter(said.values())).removesuffix(" of the held-out error of rounding to nearest"))
    assert share <= 1
    same = [torch.equal(site.weight, values) for site, values in zip(sites_of(task.block), nearest, strict=True)]
    assert all(same) == (share == 1)


def test_steps_and_zero_points_have_straight_through_clamps() -> None:
    scale = StepAndZero(Grid(torch.tensor([[1e-6], [0.5]]), torch.tensor([[-7.0], [0.4]])))
    grid = scale(torch.zeros(2, 4), Int(2, symmetric=False), lambda step: step)
    assert grid.scale.flatten().tolist() == pytest.approx([1e-4, 0.5])
    assert grid.zero_point.flatten().tolist() == [-2, 0]
    (grid.scale * 3 + grid.zero_point * 5).sum().backward()
    assert scale.step.grad.flatten().tolist() == [3, 3]
    assert scale.zero.grad.flatten().tolist() == [5, 5]
    assert StepAndZero(Grid(torch.ones(1, 1))).zero is None


def test_half_precision_weights_learn_through_float32_masters() -> None:
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(16, 8, generator=g, dtype=torch.bfloat16)]
    task = task_of({"q": xs}, [torch.randn(16, 4, generator=g)])
    task.block.bfloat16()
    with torch.enable_grad():
        BlockAP(epochs=40, weight_lr=1e-4, quant_lr=0.0, held_out=0).solve(task, generator=torch.Generator())
    for site in sites_of(task.block):
        assert site.weight.dtype == torch.bfloat16
        assert torch.equal(site.quantizer(site.weight).detach(), site.weight)


def test_both_streams_are_one_for_the_first_block(small) -> None:
    tasks = []

    class Watched(BlockAP):
        def solve(self, task, *, generator):
            tasks.append(task)
            return super().solve(task, generator=generator)

    calibrate(small.llama("int2-g8-asym"), small.tokens(), Watched(epochs=0))
    same = [
        all(torch.equal(q[0][0], fp[0][0]) for q, fp in zip(task.inputs["q"], task.inputs["fp"], strict=True))
        for task in tasks[:2]
    ]
    assert same == [True, False]
    for task in tasks:  # targets are the float block on the float stream
        for site in (site for group in task.groups for site in group):
            assert site.quantizer.enabled


def test_resume(small) -> None:
    whole, states, solver = small.llama(FROZEN), [], BlockAP(epochs=1, weight_lr=1e-3)
    calibrate(whole, small.tokens(), solver, on_block=states.append)
    again = small.llama(FROZEN)
    calibrate(again, small.tokens(), solver, state=states[0])
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_wrong_arguments(small) -> None:
    with pytest.raises(ValueError, match=r"write for example BlockAP\(epochs=2"):
        BlockAP(floor=2.0)
    with pytest.raises(ValueError, match=r"for example BlockAP\(held_out=0.1, patience=2\)"):
        BlockAP(patience=0)
    with pytest.raises(ValueError, match="trains one step per group"):
        calibrate(small.llama(Quantizer(Float(2, 1), PerGroup(8), scale=TwoLevel())), small.tokens(), BlockAP(epochs=0))
