"""Scales are float32 and learned whatever the precision; recomputed layers change nothing.

On a CPU, Lightning turns "16-mixed" into "bf16-mixed" with a warning. So what fp16 adds, a gradient scaler that leaves
steps out, is tested with Lightning's own plugin on the CPU, where torch's scaler and fp16 autocast work.
"""

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.checkpoint import checkpoint

from qlightning import QATCallback, Quantizer
from qlightning.layers.convert import quantizers_of
from qlightning.numerics.formats import Int
from qlightning.numerics.granularity import PerTensor
from qlightning.numerics.learned import EMA

SCHEMES = {
    "learned": {"weight": "int4-lsq", "input": "int8-tensor-lsq", "start": 3, "calibration": 2},
    "followed": {"weight": "int4-g8-sr", "input": Quantizer(Int(8), PerTensor(), scale=EMA()), "calibration": 2},
    "dynamic": {"weight": "int4-g8", "input": "int8-token", "output": "fp8e4m3-token"},
}


class Watch:
    """Dtypes of weights, and dtypes and gradients of scales, at each optimizer step."""

    def on_before_optimizer_step(self, optimizer):
        weights = {self.net[i].weight.dtype for i in (0, 2, 4)}
        scales = [p for _, quantizer in quantizers_of(self) for p in quantizer.parameters()]
        state = {b.dtype for _, quantizer in quantizers_of(self) for b in quantizer.buffers() if b.is_floating_point()}
        gradients = {scale.grad.dtype for scale in scales if scale.grad is not None}
        moving = all(scale.grad is not None and bool(scale.grad.abs().sum() > 0) for scale in scales)
        self.seen.append((weights, {scale.dtype for scale in scales} | state, gradients, moving))


def watched(cls):
    return type("Watched", (Watch, cls), {"seen": []})


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32)]
)
@pytest.mark.parametrize("place", ["Net", "LazyNet"])
def test_scales_stay_float32(kit, place, precision, dtype, scheme):
    module, losses = watched(getattr(kit, place))(), kit.Record()
    kit.fit(module, QATCallback(**SCHEMES[scheme]), losses, precision=precision)
    assert all(torch.isfinite(torch.tensor(loss)) for _, loss in losses.losses)
    for step, (weights, scales, gradients, moving) in enumerate(module.seen):
        assert weights == {dtype}
        assert scales <= {torch.float32}
        assert gradients <= {torch.float32}
        assert moving == (scheme != "learned" or step >= 3)
    assert all(quantizer.enabled for _, quantizer in quantizers_of(module))
    assert kit.outputs(module.to(torch.bfloat16).float()).isfinite().all()


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_resume_in_low_precision(kit, precision):
    def run(resume=None):
        torch.manual_seed(1 if resume is None else 2)
        module, losses = kit.Net(dropout=0.4), kit.Record()
        callbacks = QATCallback(**SCHEMES["learned"]), losses, kit.every_step(kit.folder / "run")
        kit.fit(module, *callbacks, ckpt_path=resume, precision=precision)
        return losses.losses, module

    whole, module = run()
    for step in (1, 3, 6):
        again, resumed = run(kit.folder / "run" / f"step={step}.ckpt")
        assert again == whole[step:]
        assert all(torch.equal(value, kit.scales(module)[name]) for name, value in kit.scales(resumed).items())


def test_bf16_predicts_the_same_after_loading(kit):
    module = kit.Net()
    trainer = kit.fit(module, QATCallback(**SCHEMES["learned"]), kit.every_step(kit.folder), precision="bf16-true")
    wanted = torch.cat(trainer.predict(module, kit.held_out()))
    path = kit.folder / "step=8.ckpt"
    with pytest.warns(UserWarning, match="Be aware that when using `ckpt_path`"):
        predicted = kit.trainer(precision="bf16-true").predict(kit.Net(), kit.held_out(), ckpt_path=path)
    assert wanted.dtype == torch.bfloat16
    assert torch.equal(torch.cat(predicted), wanted)


def test_fp16_on_a_cpu_is_bf16(kit):
    """Lightning's own decision; scales are learned there as well."""
    module = watched(kit.Net)()
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU. Using `precision='bf16-mixed'`"):
        trainer = kit.trainer(QATCallback(**SCHEMES["learned"]), precision="16-mixed")
    trainer.fit(module, kit.loader(), kit.held_out())
    assert trainer.precision == "bf16-mixed"
    assert module.seen[-1] == ({torch.float32}, {torch.float32}, {torch.float32}, True)


def test_a_gradient_scaler(kit):
    """Scales are unscaled, clipped and left out of overflowing steps like every other parameter."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    module, scales = watched(kit.Net)(), kit.Record(look=lambda trainer, module: kit.scales(module))
    qat = QATCallback("int4-lsq", freeze_scales=35)
    kit.fit(module, qat, scales, plugins=[plugin], max_steps=40, gradient_clip_val=0.5)
    moved = [
        any(not torch.equal(after[name], before[name]) for name in before)
        for before, after in zip(scales.seen, scales.seen[1:], strict=False)
    ]
    first = moved.index(True)
    assert 10 < first < 30  # 2^40 is halved until fp16 holds the gradients
    assert moved == [False] * first + [True] * (35 - first) + [False] * 4
    assert all(loss < 100 for _, loss in scales.losses)
    assert scaler.get_scale() == 2.0 ** (40 - first)


# --- activation checkpointing ---


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers(kit, scheme, reentrant):
    class Checkpointed(kit.Net):
        def forward(self, x):
            if not torch.is_grad_enabled():
                return self.net(x)
            x = self.net[0](x)
            return self.net[4](checkpoint(self.net[1:4], x, use_reentrant=reentrant))

    plain, recomputed = kit.Record(), kit.Record()
    modules = []
    for cls, record in ((kit.Net, plain), (Checkpointed, recomputed)):
        torch.manual_seed(1)
        modules.append(cls(dropout=0.4))
        qat = QATCallback(**SCHEMES[scheme])
        kit.fit(modules[-1], qat, record)
        counted = {row.name: row.multiply_adds for row in qat.coverage.rows}
        assert counted == {"net.0": 4 * 8 * 16, "net.2": 4 * 16 * 16, "net.4": 4 * 16 * 4}
    assert plain.losses == recomputed.losses
    states = [module.state_dict() for module in modules]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("scheme", ["learned", "dynamic"])
def test_gradient_checkpointing_of_transformers(kit, scheme):
    from lightning.pytorch import LightningModule
    from transformers import LlamaConfig, LlamaForCausalLM

    class Llama(LightningModule):
        def __init__(self, recompute):
            super().__init__()
            torch.manual_seed(0)
            config = LlamaConfig(
                **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
                **{"vocab_size": 11, "use_cache": False},
            )
            self.model = LlamaForCausalLM(config)
            if recompute:
                enable = getattr(self.model, "activation_checkpointing_enable", None)  # its name in transformers 5
                (enable or self.model.gradient_checkpointing_enable)()
            self.model.train()

        def training_step(self, batch, batch_idx):
            ids = batch[0][:, :6].abs().mul(4).long() % 11
            return self.model(input_ids=ids, labels=ids).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    losses, states = [], []
    for recompute in (False, True):
        record, module = kit.Record(), Llama(recompute)
        kit.trainer(QATCallback(**SCHEMES[scheme]), record, max_steps=6).fit(module, kit.loader())
        losses.append(record.losses)
        states.append(module.state_dict())
    assert losses[0] == losses[1]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
