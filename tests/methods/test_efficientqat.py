"""EfficientQAT: codes stay bitwise, steps learn by the closed form. Block-AP itself: tests/solvers/test_block_ap.py."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from qlightning import solvers
from qlightning.capture import sites_of
from qlightning.data.loader import Loader
from qlightning.methods import LSQ, EfficientQAT, compose


def test_what_it_determines() -> None:
    given = {"epochs": 1, "weight_lr": 1e-5, "quant_lr": 1e-4, "held_out": 0.1, "batches": 4}
    asked = EfficientQAT(3, granularity=128, **given).quantization()
    assert asked["init"] == solvers.BlockAP(**given)
    assert asked["scale_lr"] == 1.0
    with pytest.raises(ValueError, match="EfficientQAT determines weight"):
        compose(EfficientQAT(), LSQ())


def test_the_gradient_of_a_step_is_the_closed_form() -> None:
    """dL/ds_g = sum over the group of dL/dw * (q - z), whatever the step has become."""
    torch.manual_seed(0)
    quantizer = EfficientQAT(2, granularity=8).quantization()["weight"]
    quantizer.build((4, 16))
    quantizer.initialize(torch.randn(4, 16))
    w = quantizer(torch.randn(4, 16)).detach()
    before = quantizer.quantize(w)
    step, lower = quantizer.learned()
    with torch.no_grad():
        step.mul_(torch.rand_like(step) + 0.5)
    g = torch.randn(4, 16)
    d_step, d_lower = torch.autograd.grad(quantizer(w), [step, lower], g)
    codes, _, zero, _ = quantizer.quantize(w)
    assert torch.equal(codes, before.codes)
    assert torch.equal(zero, before.zero_point)
    places = codes.view(4, 2, 8).float() - zero.view(4, 2, 1).float()
    torch.testing.assert_close(d_step.flatten(), (g.view(4, 2, 8) * places).sum(-1).flatten())
    assert not d_lower.any()


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 8))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.layers(batch) - batch[:, :8]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


class Codes(Callback):
    """The stored codes and zero points, and the other parameters, at every step."""

    def __init__(self) -> None:
        self.codes: list[list[torch.Tensor]] = []
        self.steps: list[torch.Tensor] = []
        self.rest: list[list[torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        stored = [site.quantizer.quantize(site.weight) for site in sites_of(pl_module)]
        self.codes.append([t.clone() for q in stored for t in (q.codes, q.zero_point)])
        self.steps.append(torch.cat([q.scale.flatten() for q in stored]).clone())
        steps = {id(site.quantizer.scale.value) for site in sites_of(pl_module)}
        self.rest.append([p.detach().clone() for p in pl_module.parameters() if id(p) not in steps])
        if len(self.codes) > 1:
            assert {id(p) for p in pl_module.parameters() if p.grad is not None} <= steps
            assert sum(p.requires_grad for p in pl_module.parameters()) == len(sites_of(pl_module))


@pytest.mark.parametrize("epochs", [0, 2])
def test_in_the_fit_only_steps_move(epochs: int) -> None:
    module, codes = Net(), Codes()
    method = EfficientQAT(2, granularity=8, epochs=epochs, weight_lr=1e-2, quant_lr=1e-2, batches=4, held_out=0)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", max_steps=4, callbacks=[*method.callbacks(), codes], enable_checkpointing=False, **quiet
    )
    trainer.fit(module, Loader(list(torch.randn(32, 16, generator=torch.Generator().manual_seed(0))), batch_size=8))
    for later in codes.codes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(later, codes.codes[0], strict=True))
    for later in codes.rest[1:]:
        assert all(torch.equal(a, b) for a, b in zip(later, codes.rest[0], strict=True))
    assert not torch.equal(codes.steps[-1], codes.steps[0])
    assert all(p.requires_grad for p in module.parameters())  # as the user had them
    initial, weights = Net(), [site.weight for site in sites_of(module)]
    assert not torch.equal(weights[0], initial.layers[0].weight)
