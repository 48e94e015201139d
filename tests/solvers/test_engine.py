"""The engine: what every solver may rely on."""

import copy
import io

import pytest
import torch
from torch import nn

from qlightning.capture import find_blocks, run_batch, run_step, sites_of
from qlightning.layers.convert import convert, quantizers_of, restore
from qlightning.layers.swap import convert_like
from qlightning.numerics.spec import parse
from qlightning.solvers import GPTQ, LDLQ, RTN, BlockSolver, SiteSolution, SiteSolver, calibrate


class Nothing(SiteSolver):
    """Leaves every weight as it is."""

    def __init__(self, *, stream="q", refresh="group"):
        super().__init__(stream=stream, refresh=refresh, commit="values", batches=16, seed=0)
        self.seen = {}

    def solve(self, weight, moments, *, quantizer, generator):
        self.seen[len(self.seen)] = (weight.clone(), moments)
        return SiteSolution(weight.float(), on_grid=False)


def test_a_solver_that_does_nothing_changes_nothing(kind, small):
    make, batches = kind
    model = make()
    model.train()
    model.get_submodule(next(iter(find_blocks(model)))).eval()
    flags = {name: m.training for name, m in model.named_modules()}
    plain = small.logits(make(None).eval())
    random = torch.get_rng_state()
    report = calibrate(model, batches(), Nothing())
    assert {name: m.training for name, m in model.named_modules() if name in flags} == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(small.logits(model.eval()), plain)
    assert {row.name for row in report.sites} == {site.name for site in sites_of(model)}
    assert all(block.error == 0 for block in report.blocks)


def test_switches_caches_and_buffers_are_as_before(small):
    model = small.llama({"*": {"weight": "int3-g8", "input": "int8-token"}})
    switched_off = next(q for n, q in quantizers_of(model) if "layers.1" in n and "weight" in n)
    switched_off.enabled = False
    assert model.config.use_cache
    calibrate(model, small.tokens(), RTN())
    assert model.config.use_cache
    assert [q for _, q in quantizers_of(model) if not q.enabled] == [switched_off]
    net = small.convnet()
    net.train()
    calibrate(net, small.rows(), RTN())
    assert int(net[3].num_batches_tracked) == 0


@pytest.mark.parametrize("spec", ["int3-g8", "int4-lsq", "int4-asym-learned", "nvfp4", "mxfp4-g8", "ternary"])
def test_rtn_is_direct_rounding(small, spec):
    spec = parse("int4-g8") if spec == "mxfp4-g8" else spec
    spec = parse("nvfp4-g8") if spec == "nvfp4" else spec
    model = small.llama(spec)
    before = {site.name: (site.weight.clone(), copy.deepcopy(site.quantizer)) for site in sites_of(model)}
    calibrate(model, small.tokens(), RTN())
    for site in sites_of(model):
        weight, quantizer = before[site.name]
        assert torch.equal(site.weight, quantizer(weight).detach())
        assert torch.equal(site.quantizer(site.weight).detach(), site.weight)


@pytest.mark.parametrize("commit", ["values", "residual"])
@pytest.mark.parametrize("spec", ["int3-g8", "int4-g8-asym-learned"])
def test_the_first_training_forward_is_the_frozen_model(small, spec, commit):
    model = small.llama(spec)
    before = {site.name: site.weight.clone() for site in sites_of(model)}
    parameters = dict(model.named_parameters())
    calibrate(model, small.tokens(), GPTQ(commit=commit))
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())
    frozen = restore(copy.deepcopy(model))
    for site in sites_of(model):
        values = site.quantizer(site.weight).detach()
        frozen.get_submodule(site.name).weight.data.copy_(values)
        nearest = copy.deepcopy(site.quantizer)
        nearest.initialize(before[site.name])
        step = float(nearest.grid(site.weight).step.detach().max())
        assert torch.equal(site.weight, values) == (commit == "values")
        if commit == "residual":  # never farther from the float weight than the values are
            assert float((site.weight - values).abs().max()) <= 0.4901 * step
            assert ((site.weight - before[site.name]).abs() <= (values - before[site.name]).abs() + 1e-6).all()
    model.train()
    assert torch.equal(small.logits(model), small.logits(frozen.eval()))


def test_a_checkpoint_of_a_calibrated_model_describes_itself(small):
    model = small.llama()
    calibrate(model, small.tokens(), GPTQ())
    again = small.llama(None)
    convert_like(again, model.state_dict())
    again.load_state_dict(model.state_dict())
    assert torch.equal(small.logits(again.eval()), small.logits(model.eval()))


@pytest.mark.parametrize("solver", [GPTQ(), LDLQ(greedy=1, rounding="stochastic", order="activation")], ids=["g", "l"])
def test_resume_gives_the_weights_of_an_uninterrupted_run(small, solver):
    whole, states = small.llama(), []

    def save(state):
        file = io.BytesIO()
        torch.save(state, file)
        states.append(file)

    report = calibrate(whole, small.tokens(), solver, on_block=save)
    assert len(states) == 2
    states[0].seek(0)
    resumed = small.llama()
    state = torch.load(states[0], weights_only=True)
    again = calibrate(resumed, small.tokens(), solver, state=state)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert [(r.name, r.before, r.after) for r in again.sites] == [(r.name, r.before, r.after) for r in report.sites]
    assert again.blocks == report.blocks
    with pytest.raises(ValueError, match="its data are"):
        calibrate(small.llama(), small.tokens()[:2], solver, state=state)
    with pytest.raises(ValueError, match="its solver are"):
        calibrate(small.llama(), small.tokens(), RTN(), state=state)


def test_moments_do_not_depend_on_batching_or_order(kind):
    make, batches = kind
    seen = []
    for data in (batches(2), batches(6), batches(1)[::-1]):
        solver = Nothing()
        calibrate(make(), data, solver)
        seen.append(solver.seen)
    assert len(seen[0]) == len(sites_of(make()))
    for i, (weight, moments) in seen[0].items():
        for other in seen[1:]:
            again, theirs = other[i]
            assert torch.equal(weight, again)
            torch.testing.assert_close(
                moments.gram, theirs.gram, rtol=1e-5, atol=1e-6 * float(moments.gram.abs().max())
            )
            torch.testing.assert_close(moments.absmax, theirs.absmax, rtol=1e-5, atol=1e-6)
            assert moments.tokens == theirs.tokens


def inputs_of(model, site, data):
    """What a layer gets in a plain forward pass."""
    seen = []
    hook = site.layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in data:
            run_step(model, batch)
    hook.remove()
    return seen


def test_streams_are_those_of_the_float_and_of_the_calibrated_model(small):
    float_model, data = small.llama(None).eval(), small.tokens()
    for stream in ("fp", "q"):

        class Half(Nothing):
            def solve(self, weight, moments, *, quantizer, generator):
                super().solve(weight, moments, quantizer=quantizer, generator=generator)
                return SiteSolution(weight.float() / 2, on_grid=False)

        for refresh in ("group", "block"):
            model, solver = small.llama(), Half(stream=stream, refresh=refresh)
            report = calibrate(model, data, solver)
            name = "model.layers.1.mlp.down_proj"
            moments = solver.seen[[row.name for row in report.sites].index(name)][1]
            reference = copy.deepcopy(float_model)
            if stream == "q":
                for row in report.sites:
                    if "layers.0" in row.name or (refresh == "group" and row.name != name):
                        reference.get_submodule(row.name).weight.data.div_(2)
            place = type("Place", (), {"layer": reference.get_submodule(name)})
            rows = torch.cat(inputs_of(reference, place, data)).flatten(0, 1).double()
            torch.testing.assert_close(moments.gram[0], rows.T @ rows, rtol=1e-4, atol=1e-6)


def test_the_float_pass_sees_no_quantizer(small):
    """Block 0 of both streams is the same; the report's error of a block is that of a plain comparison."""
    model, data = small.llama(), small.tokens()
    plain = small.llama(None).eval()
    report = calibrate(model, data, RTN())
    outputs = {}
    for name, m in (("fp", plain), ("q", model.eval())):
        hook = m.model.layers[1].register_forward_hook(
            lambda mod, a, out, name=name: outputs.setdefault(name, []).append(out)
        )
        with torch.no_grad():
            for batch in data:
                m(**batch)
        hook.remove()
    fp, q = torch.cat(outputs["fp"]).double(), torch.cat(outputs["q"]).double()
    assert report.blocks[1].error == pytest.approx(float((q - fp).square().sum() / fp.square().sum()), rel=1e-6)


@pytest.mark.parametrize("solver", [GPTQ(), GPTQ(order="activation"), LDLQ(greedy=2)], ids=["gptq", "order", "ldlq"])
def test_solvers_beat_rounding_in_every_model(kind, solver):
    make, batches = kind
    model = make()
    report = calibrate(model, batches(), solver)
    rows = [row for row in report.sites if row.after is not None]
    assert len(rows) == len(sites_of(model))
    assert all(row.after <= row.before * 1.02 for row in rows)
    assert sum(row.after for row in rows) < 0.9 * sum(row.before for row in rows)
    for site in sites_of(model):
        assert torch.equal(site.quantizer(site.weight).detach(), site.weight)
    table = report.table()
    assert all(row.name in table for row in rows)


def test_static_input_scales_are_settled(small):
    model = small.llama({"*": {"weight": "int4", "input": "int8-tensor-ema"}})
    calibrate(model, small.tokens(), RTN())
    assert all(quantizer.ready for _, quantizer in quantizers_of(model))
    assert torch.isfinite(small.logits(model.eval())).all()


def test_a_lightning_module_runs_its_training_step():
    from lightning.pytorch import LightningModule

    class Net(LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
            self.noises = []

        def training_step(self, batch):
            x, y = batch
            noise = torch.randn_like(x)
            self.noises.append(noise)
            loss = (self.body(x + 0.1 * noise) - y).square().mean()
            self.log("train_loss", loss)
            return loss

    module = Net()
    convert(module, "int3")
    data = [(torch.randn(16, 8), torch.randn(16, 2)) for _ in range(3)]
    calibrate(module, data, GPTQ(batches=2, seed=3))
    assert "log" not in vars(module)
    distinct = {float(noise.sum()) for noise in module.noises}
    assert len(distinct) == 2  # batch i draws the same noise whenever it runs


def test_weights_whose_inputs_cannot_be_seen_are_reported():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)])})
    convert(model, "int4")
    report = calibrate(model, [torch.randn(2, 5, 8)], GPTQ(), forward=lambda m, x: m["layers"][0](x))
    notes = {row.name: row.note for row in report.sites}
    assert "only the layer knows" in notes["layers.0.self_attn.in_proj_weight"]
    assert notes["layers.0.linear1"] == ""


def test_tied_weights_are_solved_once(small):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    convert(model, "int3", tied="share")
    data = torch.randn(32, 8)
    report = calibrate(model, [data], GPTQ())
    assert [row.name for row in report.sites if row.after is not None] == ["2"]
    assert all("share" in row.note for row in report.sites if row.name in ("0", "1"))
    assert model[0].quantizer("weight").enabled
    together = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8))
    together[0][1].weight = together[0][0].weight
    convert(together, "int3", tied="share")
    report = calibrate(together, [data], GPTQ())
    assert [row.name for row in report.sites if row.after is not None] == ["0.0", "1"]


class Scaled(BlockSolver):
    def __init__(self):
        super().__init__(targets=("fp", "q"), batches=4, seed=0)
        self.tasks = []

    def solve(self, task, *, generator):
        assert torch.is_grad_enabled()
        assert not any(p.requires_grad for p in task.block.parameters())
        self.tasks.append(task)
        with torch.no_grad():
            assert torch.equal(task.run(task.inputs["fp"][0]), task.targets["fp"][0])
            assert torch.equal(task.run(task.inputs["q"][0]), task.targets["q"][0])


def test_block_solvers_get_inputs_and_targets(small):
    model, solver = small.llama(), Scaled()
    wants_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    report = calibrate(model, small.tokens(), solver)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wants_grad
    first, second = solver.tasks
    assert torch.equal(first.inputs["fp"][0][0][0], first.inputs["q"][0][0][0])
    assert not torch.equal(second.inputs["fp"][0][0][0], second.inputs["q"][0][0][0])
    assert report.blocks[0].error > 0


def test_errors_name_the_corrected_call(small):
    with pytest.raises(ValueError, match=r"qlightning\.convert"):
        calibrate(small.llama(None), small.tokens(), RTN())
    with pytest.raises(ValueError, match="no calibration data"):
        calibrate(small.llama(), [], RTN())
    with pytest.raises(ValueError, match="'q' or 'fp'"):
        GPTQ(stream="float")
    with pytest.raises(ValueError, match="at least one"):
        GPTQ(batches=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8)).to(dtype)
    convert(model, "int4-g8")
    report = calibrate(model, [torch.randn(64, 16, dtype=dtype)], GPTQ())
    assert report.sites[0].after < report.sites[0].before


def test_blocks_can_be_confined(small):
    model = small.llama()
    report = calibrate(model, small.tokens(), RTN(), blocks=["model.layers.0"])
    assert {row.name.split(".")[2] for row in report.sites} == {"0"}
    assert list(find_blocks(model)) == ["model.layers.0", "model.layers.1"]


def test_random_numbers_of_a_batch_are_its_own():
    drawn = []
    for seed in (0, 1, 0):
        run_batch(nn.Linear(1, 1), torch.zeros(1), lambda m, b: drawn.append(float(torch.rand(()))), seed)
    assert drawn[0] == drawn[2] != drawn[1]
