"""What is not finite never reaches the weights, and is named."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging

from qlightning import FiniteCallback, QATCallback, Raise, RestoreLastGood, SkipStep
from qlightning.layers.convert import quantizers_of
from qlightning.numerics.formats import Int
from qlightning.numerics.granularity import PerTensor
from qlightning.numerics.learned import EMA
from qlightning.numerics.quantizer import Quantizer


class Breaks(Callback):
    """Makes the inputs or the gradient of one layer infinite, in the given batches of the run."""

    def __init__(self, *batches, gradient=None, scale=None, loss=math.inf):
        self.batches, self.gradient, self.scale, self.loss = batches, gradient, scale, loss
        self.batch = -1

    def on_train_batch_start(self, trainer, module, batch, index):
        self.batch += 1
        if self.batch in self.batches and self.gradient is None and self.scale is None:
            batch[0].fill_(self.loss)
        if self.batch in self.batches and self.scale is not None:
            module.net[2].weight_quantizer.scale.value.data.mul_(self.scale)

    def on_after_backward(self, trainer, module):
        if self.batch in self.batches and self.gradient is not None:
            module.get_parameter(self.gradient).grad[0] = math.nan


class Copy(Callback):
    """Weights, the optimizer's memory, buffers and the step at the end of each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, *args):
        state = trainer.optimizers[0].state_dict()["state"]
        memory = {f"{i}.{name}": value.clone() for i, known in state.items() for name, value in known.items()}
        kept = {name: value.clone() for name, value in module.state_dict().items()}
        self.seen.append((trainer.global_step, kept | memory))


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


EMA8 = Quantizer(Int(8), PerTensor(), scale=EMA(decay=0.8))
QAT = {"weight": "int4-lsq", "input": EMA8, "start": 2, "calibration": 1}


def fit(kit, policy, *callbacks, qat=QAT, **options):
    module = kit.Net(dropout=0.1)
    trainer = kit.fit(module, QATCallback(**qat), *callbacks, FiniteCallback(policy), **{"max_steps": 8, **options})
    return module, trainer


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (
            Breaks(3),
            r"step 3: not finite: the loss; gradient of net\.4\.weight.* more, nearest the loss first; take a smaller"
            r".*\. Run once more, it begins before net, whose input is not finite",
        ),
        (Breaks(3, gradient="net.2.weight"), r"step 3: not finite: gradient of net\.2\.weight; take .*SkipStep\(\)\)$"),
        (
            Breaks(3, scale=math.nan),
            r"step 3: not finite: the loss; scale of net\.2\.weight; gradient of.*begins in net\.2\b",
        ),
    ],
    ids=["loss", "gradient", "scale"],
)
def test_an_error_that_names_the_layer(kit, breaks, message):
    with pytest.raises(ValueError, match=message):
        fit(kit, Raise(), breaks, accumulate_grad_batches=1)


def test_nothing_happens_where_all_is_finite(kit):
    torch.manual_seed(0)
    watched, _ = fit(kit, Raise())
    torch.manual_seed(0)
    module = kit.Net(dropout=0.1)
    kit.fit(module, QATCallback(**QAT), max_steps=8)
    assert equal(watched.state_dict(), module.state_dict())


@pytest.mark.filterwarnings("ignore:FiniteCallback. left out step 4")
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("how", [{}, {"gradient": "net.2.weight"}], ids=["loss", "gradient"])
def test_a_step_that_is_left_out(kit, accumulated, how):
    """Weights, the optimizer's memory and observed ranges stay; the step counts."""
    copies, steps = Copy(), 8
    fit(kit, SkipStep(), Breaks(4 * accumulated, **how), copies, accumulate_grad_batches=accumulated, max_steps=steps)
    ends = dict(reversed(copies.seen))  # what was when the step had just been made
    assert max(ends) == steps
    for step in range(2, steps):
        assert equal(ends[step], ends[step + 1]) == (step == 4), step


@pytest.mark.filterwarnings("ignore:FiniteCallback. left out")
def test_patience_ends(kit):
    fit(kit, SkipStep(patience=2), Breaks(3, 4))
    with pytest.raises(ValueError, match=r"step 5: not finite: .*, and in the 2 steps before"):
        fit(kit, SkipStep(patience=2), Breaks(3, 4, 5))


@pytest.mark.filterwarnings("ignore:FiniteCallback. left out")
def test_a_run_that_left_out_steps_resumes_exactly(kit):
    def run(folder, begin, **options):
        record = kit.Record()
        callbacks = QATCallback(**QAT), Breaks(*(b - begin for b in (3, 4, 6))), record
        kit.fit(kit.Net(), *callbacks, FiniteCallback(SkipStep(2)), kit.every_step(folder), max_steps=8, **options)
        return [(step, repr(loss)) for step, loss in record.losses]

    whole = run(kit.folder, 0)
    assert run(kit.folder, 4, ckpt_path=kit.folder / "step=4.ckpt") == whole[4:]


# --- going back ---


@pytest.mark.filterwarnings("ignore:FiniteCallback. back to step")
@pytest.mark.parametrize("every", [1, 3])
def test_going_back(kit, every):
    """From step 7 to the last kept one, whose state the next batch finds; and then to the end of the run."""
    copies = Copy()
    scheduled = type("Scheduled", (kit.Net,), {"configure_optimizers": with_schedule})
    module = scheduled()
    callbacks = QATCallback(**QAT), Breaks(7), FiniteCallback(RestoreLastGood(every=every)), copies
    trainer = kit.fit(module, *callbacks, max_steps=10)
    kept = 6 // every * every
    steps = [step for step, _ in copies.seen]
    assert steps == [*range(1, 8), kept, *range(kept + 1, 11)]
    assert equal(copies.seen[7][1], copies.seen[kept - 1][1])
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 10
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.02 * 0.9**10)
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == 10


def with_schedule(self):
    optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@pytest.mark.filterwarnings("ignore:FiniteCallback. back to step 1 from step 3")
def test_going_back_before_a_change_of_format(kit):
    """The phase is entered once more, from the weights as they were."""
    qat = {"weight": "int8-lsq", "anneal": {3: "int4-lsq"}, "start": 1}
    acting = kit.Record(look=lambda trainer, module: (trainer.global_step, module.net[2].weight_quantizer.format.bits))
    callbacks = QATCallback(**qat), Later(), acting, FiniteCallback(RestoreLastGood(every=1))
    module = kit.Net()
    kit.fit(module, *callbacks, max_steps=6)
    assert acting.seen == [(0, 8), (1, 8), (2, 8), (3, 4), (1, 8), (2, 8), (3, 4), (4, 4), (5, 4)]
    assert all(quantizer.enabled for _, quantizer in quantizers_of(module))


class Later(Breaks):
    """Breaks batch 3, when no step since 1 has been kept."""

    def __init__(self):
        super().__init__(3)

    def on_train_start(self, trainer, module):
        policy = next(c.policy for c in trainer.callbacks if isinstance(c, FiniteCallback))
        keep = policy.good
        policy.good = lambda t, m, before: keep(t, m, before) if t.global_step in (1, 4, 5) else None


@pytest.mark.filterwarnings("ignore:FiniteCallback. back to step")
def test_it_does_not_go_back_for_ever(kit):
    with pytest.raises(ValueError, match=r"step 4: not finite: .* 3 times after going back to step 4"):
        fit(kit, RestoreLastGood(every=2), Breaks(*range(5, 50), gradient="net.0.weight"), max_steps=20)
    with pytest.raises(ValueError, match="before any step was good"):
        fit(kit, RestoreLastGood(), Breaks(0, gradient="net.0.weight"))


def test_averages_are_not_taken_back(kit):
    with pytest.raises(ValueError, match=r"average of StochasticWeightAveraging; write SkipStep\(\)"):
        fit(kit, RestoreLastGood(), StochasticWeightAveraging(0.01, swa_epoch_start=1))


# --- scales ---


@pytest.mark.parametrize(("factor", "what"), [(1e-5, "collapsed"), (1e5, "exploded")])
def test_scales_that_run_away_are_reported_once(kit, factor, what):
    with pytest.warns(UserWarning, match=rf"scale of net\.2\.weight has {what}") as seen:
        fit(kit, Raise(), Breaks(5, scale=factor), qat={"weight": "int4-lsq"})
    assert len([w for w in seen if "FiniteCallback" in str(w.message)]) == 1


def test_it_stands_behind(kit):
    with pytest.raises(ValueError, match="put it behind"):
        kit.fit(kit.Net(), FiniteCallback(), QATCallback("int4-lsq"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FiniteCallback(limit=1.0), "FiniteCallback\\(limit=1000.0\\)"),
        (lambda: SkipStep(0), "SkipStep\\(patience=10\\)"),
        (lambda: RestoreLastGood(0), "RestoreLastGood\\(every=100\\)"),
    ],
    ids=["limit", "patience", "every"],
)
def test_wrong_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_host_waits_once_per_step(kit, monkeypatch):
    waits = []
    for name in ("tolist", "item", "__bool__", "__float__"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, own=own: (waits.append(1), own(self, *a))[1])
    callback, module = FiniteCallback(), kit.Net()
    trainer = kit.trainer()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    trainer.strategy._optimizers = [optimizer]
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    callback._losses = [torch.tensor(1.0), torch.tensor(2.0)]
    callback.on_before_optimizer_step(trainer, module, optimizer)
    assert len(waits) == 1
