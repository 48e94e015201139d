"""Kill and go on, on several processes: bit for bit on as many, and on another number of them from the same state.

Where one more file of torch's own is read here (`dcp_to_torch_save`), it is our test's own file.
"""

import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from qlightning import BackgroundCheckpoints, QATCallback
from qlightning.layers.convert import quantizers_of

WAYS = {
    "ddp": ("ddp", {}),
    "fsdp2, one file": ("fsdp2", {"save_distributed_checkpoint": False}),
    "fsdp2, sharded": ("fsdp2", {}),
    "ddp, async": ("ddp", {}),
    "fsdp1, one file": ("fsdp1", {}),
    "fsdp1, sharded": ("fsdp1", {"state_dict_type": "sharded"}),
    "fsdp1, sharded, in the background": ("fsdp1", {"state_dict_type": "sharded"}),
}


def qat(kit):
    """Inputs observe in steps 1 to 3, and everything acts, its weights by then another, from step 4 on."""
    return QATCallback("int4-channel-lsq", "int8-tensor-lsq", start=4, calibration=3)


class Noisy:
    """A module that draws random numbers, others in each process."""

    @staticmethod
    def of(kit):
        class Net(kit.Net):
            def training_step(self, batch, batch_idx):
                x, y = batch
                return super().training_step((x + 0.1 * torch.randn_like(x), y), batch_idx)

        return Net()


def save(kit, way, folder):
    name, options = WAYS[way]
    torch.manual_seed(dist.get_rank())
    more = {"plugins": [AsyncCheckpointIO()]} if "async" in way else {}
    if "background" in way:
        more = {"plugins": [BackgroundCheckpoints()]}
    strategy = kit.strategy(name, **options)
    losses, _ = kit.fit(qat(kit), kit.every_step(folder), module=Noisy.of(kit), strategy=strategy, steps=10, **more)
    return losses


def go_on(kit, way, path):
    name, options = WAYS[way]
    torch.manual_seed(99)
    losses, _ = kit.fit(
        qat(kit), module=Noisy.of(kit), strategy=kit.strategy(name, **options), steps=10, ckpt_path=path
    )
    return losses


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow if way.startswith("fsdp1") else ()) for way in WAYS]
)
def test_the_same_losses_on_as_many(ranks, kit, way):
    def check():
        losses = save(kit, way, kit.folder)
        # in float while it observes, and quantized at the end of an epoch
        return losses, {step: go_on(kit, way, kit.folder / f"step={step}.ckpt") for step in (2, 8)}

    for losses, resumed in ranks(2, check):
        assert len(losses) == 10
        for step, rest in resumed.items():
            assert rest == losses[step:]


def answers(module):
    """What a module says in eval mode; every process asks the same."""
    module.eval()
    with torch.no_grad():
        return module(torch.linspace(-2, 2, 32).view(4, 8))


def shards_of_four(kit):
    trained = kit.Net()
    losses, _ = kit.fit(qat(kit), kit.every_step(kit.folder), module=trained, strategy="fsdp2", steps=8)
    return losses, answers(trained)


def test_four_save_and_two_go_on_and_one_reads(ranks, kit):
    losses, said = ranks(4, shards_of_four, kit)[0]

    def check():
        found = {}
        for step in (2, 6):
            trained, path = kit.Net(), kit.folder / f"step={step}.ckpt"
            rest, _ = kit.fit(qat(kit), module=trained, strategy="fsdp2", steps=8, ckpt_path=path)
            found[step] = rest, answers(trained)
        return found

    for found in ranks(2, check):
        for step, (rest, also_said) in found.items():
            assert rest == pytest.approx(losses[step:], rel=1e-3)
            torch.testing.assert_close(also_said, said, rtol=0.05, atol=0.05)

    dcp_to_torch_save(kit.folder / "step=8.ckpt", kit.folder / "whole.ckpt")
    state_dict = torch.load(kit.folder / "whole.ckpt", weights_only=True)["state_dict"]
    alone = kit.Net()
    alone.load_state_dict(state_dict)
    assert all(quantizer.enabled and quantizer.ready for _, quantizer in quantizers_of(alone))
    assert torch.equal(answers(alone), said)


@pytest.mark.parametrize("way", ["ddp", "fsdp2, one file"])
def test_weights_only(ranks, kit, way):
    name, options = WAYS[way]

    def check():
        trained = kit.Net()
        saves = kit.every_step(kit.folder, save_weights_only=True)
        kit.fit(qat(kit), saves, module=trained, strategy=kit.strategy(name, **options), steps=6)
        said, path = answers(trained), kit.folder / "step=6.ckpt"
        again = kit.Net()
        trainer = kit.trainer(qat(kit), strategy=kit.strategy(name, **options))
        trainer.validate(again, kit.loader(), ckpt_path=path, verbose=False)
        return said, answers(again)

    for said, also_said in ranks(2, check):
        assert torch.equal(said, also_said)
    alone = kit.Net()
    alone.load_state_dict(torch.load(kit.folder / "step=6.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(answers(alone), said)
