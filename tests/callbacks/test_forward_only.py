"""A module as it is, trained with forward passes alone."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger

from qlightning import QATCallback
from qlightning.callbacks.cage import CAGECallback
from qlightning.callbacks.forward_only import ForwardOnly
from qlightning.callbacks.oscillation import OscillationCallback


def test_no_backward_no_dropout_and_the_same_batch_twice(kit):
    seen, saved = [], []

    class Watched(kit.Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            seen.append((batch_idx, self.training, loss.requires_grad, float(torch.rand(())), float(loss)))
            return loss

        def backward(self, loss):
            raise AssertionError("backward was called")

    module = Watched(dropout=0.5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        trainer = kit.fit(module, ForwardOnly(1e-3), max_steps=3)
    assert [index for index, *_ in seen] == [0, 0, 1, 1, 2, 2]
    assert not any(training or graph for _, training, graph, *_ in seen)
    assert seen[0][3] == seen[1][3] != seen[2][3]
    assert all(seen[i][4] != seen[i + 1][4] for i in (0, 2, 4))
    assert not saved
    assert not trainer.optimizers[0].state
    assert all(p.grad is None for p in module.parameters())
    assert module.training
    assert "configure_optimizers" not in vars(module)
    assert not {"training_step", "backward"} & set(vars(trainer.strategy))


def test_it_is_the_optimizer_by_hand(kit):
    """The same steps as a loop over the same batches."""
    module, by_hand = kit.Net(), kit.Net()
    kit.fit(module, QATCallback("int4-channel"), ForwardOnly(0.01, 0.05, seed=3), max_steps=6)
    from qlightning import convert
    from qlightning.optim import ZerothOrder

    convert(by_hand, "int4-channel")
    optimizer = ZerothOrder(by_hand.parameters(), 0.01, eps=0.05, seed=3)
    for batch in kit.loader():
        optimizer.step(lambda batch=batch: by_hand.loss(batch))
    for name, value in by_hand.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(module.state_dict()[name], value), name


def test_resume_is_exact(kit):
    def run(**options):
        record = kit.Record()
        callbacks = QATCallback("int4-channel", start=2), ForwardOnly(0.01, 0.05), record
        kit.fit(kit.Net(dropout=0.3), *callbacks, kit.every_step(kit.folder), max_steps=6, **options)
        return record.losses

    torch.manual_seed(0)
    whole = run()
    assert run(ckpt_path=kit.folder / "step=3.ckpt") == whole[3:]


def test_some_parameters_only(kit):
    module = kit.Net()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    kit.fit(module, ForwardOnly(0.01, parameters=("net.2.*", "net.4.weight")), max_steps=2)
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"net.2.weight", "net.2.bias", "net.4.weight"}
    with pytest.raises(ValueError, match=r"no parameter is called 'nothing\.\*'.*'net\.0\.weight'"):
        kit.fit(kit.Net(), ForwardOnly(parameters=("nothing.*",)), max_steps=2)


def test_the_share_of_codes_that_flip_tells_whether_eps_is_large_enough(kit):
    def flips(eps):
        logger = CSVLogger(kit.folder, name=str(eps))
        kit.fit(kit.Net(), QATCallback("int4-channel"), ForwardOnly(1e-4, eps), logger=logger, log_every_n_steps=2)
        logger.save()
        rows = (kit.folder / str(eps) / "version_0" / "metrics.csv").read_text().splitlines()
        column = rows[0].split(",").index("zeroth_order/flips")
        return [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]

    assert len(flips(1e-7)) == 4
    assert max(flips(1e-7)) < 0.01
    assert min(flips(0.1)) > 0.3


def test_what_cannot_work(kit):
    class Manual(kit.Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    qat = QATCallback("int4-lsq", freeze_scales=0.5)
    for module, callbacks, options, message in (
        (Manual(), (), {}, "automatic optimization"),
        (kit.Net(), (), {"accumulate_grad_batches": 2}, "no gradients to accumulate"),
        (kit.Net(), (), {"gradient_clip_val": 1.0}, "no gradients to clip"),
        (kit.Net(), (CAGECallback(),), {}, "CAGECallback acts on gradients"),
        (kit.Net(), (OscillationCallback(dampening=1.0),), {}, "OscillationCallback acts on gradients"),
        (kit.Net(), (qat,), {}, "scales are held by taking their gradients away"),
    ):
        with pytest.raises(ValueError, match=message):
            kit.fit(module, *callbacks, ForwardOnly(), max_steps=2, **options)
        assert isinstance(module, LightningModule)
        assert "configure_optimizers" not in vars(module)
    with pytest.raises(ValueError, match=r"eps=0.* ZerothOrder\(params"):
        ForwardOnly(eps=0.0)
