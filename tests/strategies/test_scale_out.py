"""Four processes, in one group and in two; rows that they cannot share evenly; blocks that are compiled."""

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import TensorDataset

from qlightning import QATCallback, QuantizedFSDP
from qlightning.data.loader import Loader
from qlightning.methods.lr_qat import LRQAT
from qlightning.strategies.gather import KeptGather

BATCH, STEPS = 8, 4


class Net(LightningModule):
    """Layers of 10, 7 and 3 rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 3))
        self.losses = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        self.losses.append(loss.detach().clone())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def fit(module, folder, quantization, strategy="auto", *, saving=None, ckpt_path=None, **options):
    devices = dist.get_world_size() if dist.is_initialized() else 1
    generator = torch.Generator().manual_seed(5)
    data = TensorDataset(torch.randn(BATCH * STEPS, 8, generator=generator), torch.randn(BATCH * STEPS, 3))
    data.tensors[1].copy_(data.tensors[0][:, :3])
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": saving is not None,
    }
    callbacks = [QATCallback(quantization)] if isinstance(quantization, str) else quantization
    callbacks = callbacks if saving is None else [*callbacks, saving]
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_steps=STEPS, callbacks=callbacks,
        default_root_dir=folder, **quiet, **options,
    )  # fmt: skip
    trainer.fit(module, Loader(data, batch_size=BATCH // devices), ckpt_path=ckpt_path)
    return trainer


def mean(losses):
    total = torch.stack(losses).float()
    dist.all_reduce(total)
    return total / dist.get_world_size()


@pytest.mark.parametrize("replicas", [1, 2])
def test_four_processes(ranks, tmp_path, replicas):
    """All of one group, with shards of 3, 3, 3 and 1 rows, or of 1, 1, 1 and none; or two groups of two."""
    specs = {"ternary": {}, "int8-tensor-lsq": {}, "int4-channel-lsq": {"precision": "bf16-true"}}

    def run(strategy):
        found = {}
        for spec, options in specs.items():
            module = Net()
            trainer = fit(module, tmp_path, spec, strategy(), gradient_clip_val=0.5, **options)
            weight = module.net[2].weight
            if dist.is_initialized():
                gathers = trainer.strategy._gathers
                assert len(gathers) == 3, spec
                assert all(gather.coded for gather in gathers), spec
                assert len(gathers[0].local) <= -(-10 * replicas // 4)
                weight = weight.full_tensor()
            losses = mean(module.losses) if dist.is_initialized() else torch.stack(module.losses).float()
            found[spec] = losses, weight.detach().clone()
        return found

    one = run(lambda: "auto")
    for found in ranks(4, run, lambda: QuantizedFSDP(replicas=replicas)):
        for spec, (losses, weight) in found.items():
            near = 0.03 if specs[spec] else 1e-4
            assert torch.allclose(losses, one[spec][0], rtol=near), spec
            assert torch.allclose(weight, one[spec][1], rtol=near, atol=1e-5 if near < 0.01 else 0.02), spec


@pytest.mark.filterwarnings("ignore:.*dirpath has changed", "ignore:.*exists and is not empty")
def test_copies_of_bases_of_codes_resume(ranks, tmp_path):
    """LR-QAT on two copies of two shards: the losses of one process, and a resumed run's bits."""

    def run(folder, strategy="auto", path=None):
        torch.manual_seed(0)
        module, callbacks = Net(), LRQAT(4, rank=2, downcast="codes").callbacks()
        saving = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        trainer = fit(module, folder, callbacks, strategy, saving=saving, ckpt_path=path)
        return module, trainer

    alone, _ = run(tmp_path / "one")

    def check():
        module, trainer = run(tmp_path, QuantizedFSDP(replicas=2))
        other, again = run(tmp_path, QuantizedFSDP(replicas=2), tmp_path / "step=2.ckpt")
        for gathers in (trainer.strategy._gathers, again.strategy._gathers):
            assert [type(gather) for gather in gathers] == [KeptGather] * 3
            assert all(hasattr(gather.local, "fsdp_pre_all_gather") for gather in gathers)
        for one, two in zip(module.parameters(), other.parameters(), strict=True):
            assert torch.equal(one.full_tensor(), two.full_tensor())
        assert torch.equal(torch.stack(module.losses[2:]), torch.stack(other.losses))
        return mean(module.losses)

    for losses in ranks(4, check):
        assert torch.allclose(losses, torch.stack(alone.losses), rtol=1e-4)


def test_replicas_that_cannot_be(ranks, tmp_path):
    def check():
        with pytest.raises(ValueError, match="2 processes do not make"):
            fit(Net(), tmp_path, "int8-channel", QuantizedFSDP(replicas=3))

    ranks(2, check)
    with pytest.raises(ValueError, match="at least one copy"):
        QuantizedFSDP(replicas=0)


def test_bits_of_a_full_gather_in_two_groups(ranks, kit):
    """Four ranks that hold two copies train on codes exactly as on weights."""

    def run(spec, *, codes):
        net = kit.converted(spec)
        _, gathers = kit.sharded(net, codes=codes, replicas=2)
        losses = kit.train(net, 4, dist.get_rank(), gathers, steps=2)
        return losses, kit.whole(net)

    def check():
        return {spec: [run(spec, codes=codes) for codes in (True, False)] for spec in ("ternary", "int4-g2")}

    for found in ranks(4, check):
        for spec, ((losses, trained), (expected, reference)) in found.items():
            assert torch.equal(losses, expected), spec
            assert all(torch.equal(trained[name], reference[name]) for name in reference), spec


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*non-leaf", "ignore::FutureWarning")
def test_compiled(ranks, kit):
    """Blocks that are compiled in place, or the whole net, give what they give without."""

    def run(spec, how):
        torch._dynamo.reset()
        net = kit.converted(spec)
        _, gathers = kit.sharded(net)
        called = net
        if how == "blocks":
            for block in net.blocks:
                block.compile(backend="aot_eager")
        elif how == "net":
            called = torch.compile(net, backend="aot_eager")
        losses = kit.train(called, 2, dist.get_rank(), gathers, steps=3)
        assert all(gather.coded for gather in gathers)
        return losses, kit.whole(net)

    def check():
        return {"int8-channel-lsq": [run("int8-channel-lsq", how) for how in (None, "blocks", "net")]}

    for found in ranks(2, check):
        for spec, (plain, *compiled) in found.items():
            for losses, trained in compiled:
                assert torch.allclose(losses, plain[0], rtol=1e-6), spec
                assert all(torch.allclose(trained[n], p, rtol=1e-5, atol=1e-7) for n, p in plain[1].items()), spec
