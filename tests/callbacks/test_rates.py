"""Learning rates that phases multiply, and what optimizers remember at a switch."""

import copy

import pytest
import torch

from qlightning import QATCallback
from qlightning.callbacks.optimizers import SCALES, Rates
from qlightning.callbacks.phase import Phase


def scheduled(kit, factor):
    class Scheduled(kit.Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return Scheduled()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.5),
        lambda p: torch.optim.AdamW(p, lr=0.02),
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.02), capturable=False, foreach=False),
    ],
    ids=["sgd", "adamw", "tensor"],
)
def test_a_factor_is_a_learning_rate_and_nobody_sees_it(make):
    """Half the rate by a factor is half the rate by hand, bit for bit; scales have a factor of their own."""

    def run(groups, factors, by_hand):
        optimizer = make(groups)
        rates = Rates([optimizer], lambda scales: factors[scales])
        for group, factor in zip(optimizer.param_groups, by_hand, strict=True):
            group["lr"] = group["lr"] * factor
        shown = [copy.deepcopy(group["lr"]) for group in optimizer.param_groups]
        for _ in range(3):
            for group in groups:
                group["params"][0].grad = group["params"][0].detach() * 0.3 + 0.1
            optimizer.step()
            assert [group["lr"] for group in optimizer.param_groups] == shown
        rates.remove()
        return [group["params"][0].detach() for group in groups]

    def parameters():
        return [
            {"params": [torch.nn.Parameter(torch.ones(3))]},
            {"params": [torch.nn.Parameter(torch.ones(3))], SCALES: True},
        ]

    factored = run(parameters(), {False: 0.5, True: 0.25}, (1.0, 1.0))
    by_hand = run(parameters(), {False: 1.0, True: 1.0}, (0.5, 0.25))
    full = run(parameters(), {False: 1.0, True: 1.0}, (1.0, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(factored, by_hand, strict=True))
    assert not torch.equal(factored[0], full[0])


def test_rates_come_back_after_an_error_and_when_let_go():
    class Nested(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)  # from here on SGD.step calls hooks, also when nested
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = Nested([weight], lr=0.5)
    rates = Rates([optimizer], lambda scales: 0.5)
    weight.grad = torch.ones(1)
    optimizer.step()
    assert (weight.item(), optimizer.param_groups[0]["lr"]) == (0.75, 0.5)

    def closure():
        assert optimizer.param_groups[0]["lr"] == 0.25
        raise RuntimeError

    with pytest.raises(RuntimeError):
        optimizer.step(closure)
    rates.restore()
    assert optimizer.param_groups[0]["lr"] == 0.5
    rates.remove()
    optimizer.step()
    assert weight.item() == 0.25


def test_an_optimizer_that_sets_its_own_rate():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    optimizer.param_groups[0]["lr"] = None  # as transformers' Adafactor has it
    with pytest.raises(ValueError, match="SGD sets its learning rate itself"):
        Rates([optimizer], lambda scales: 0.5)


def test_phases_multiply_what_the_scheduler_says(kit):
    """Against plain training with the product written into the schedule; the scheduler sees nothing."""
    folder = kit.folder / "run"
    phases = [Phase(0, quantize="all"), Phase(3, lr=0.5), Phase(5, lr=0.1)]
    factored, plain = kit.Record(), kit.Record()
    kit.fit(
        scheduled(kit, lambda step: 0.8**step),
        QATCallback("int4-g8", schedule=phases),
        factored,
        kit.every_step(folder),
    )
    product = lambda step: 0.8**step * (1.0 if step < 3 else 0.5 if step < 5 else 0.1)  # noqa: E731
    kit.fit(scheduled(kit, product), QATCallback("int4-g8"), plain)
    assert [loss for _, loss in factored.losses] == pytest.approx([loss for _, loss in plain.losses], rel=1e-5)
    saved = torch.load(folder / "step=6.ckpt")
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.02 * 0.8**6)
    assert saved["lr_schedulers"][0]["_last_lr"] == pytest.approx([0.02 * 0.8**6])


@pytest.mark.parametrize("choice", ["keep", "reset"])
def test_what_optimizers_remember_at_a_switch(kit, choice):
    """S18: moments and step counts are kept, for the same Parameter objects, or forgotten."""
    look = lambda trainer, module: {  # noqa: E731
        name: float(trainer.optimizers[0].state.get(p, {"step": 0})["step"]) for name, p in module.named_parameters()
    }
    steps = kit.Record(look=look)
    module = kit.Net()
    before = {name: id(p) for name, p in module.named_parameters()}
    phases = [Phase(0, lr=1.0), Phase(3, quantize="all", optimizer=choice)]
    trainer = kit.fit(module, QATCallback("int4-g8", schedule=phases), steps, max_steps=6)
    # Record looks behind the switch: entry 3 is what the first quantized step begins with
    expected = [0, 1, 2, 3, 4, 5] if choice == "keep" else [0, 1, 2, 0, 1, 2]
    assert steps.seen == [dict.fromkeys(before, step) for step in expected]
    assert {name: id(p) for name, p in module.named_parameters()} == before
    assert {id(p) for p in trainer.optimizers[0].state} == set(before.values())
