"""Distillation whose logits are never whole, beside the same with whole logits."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlightning import QATCallback
from qlightning.callbacks.distillation import DistillationCallback
from qlightning.callbacks.heads import heads_of
from qlightning.losses import KL, MSE
from qlightning.losses.taps import Site
from qlightning.tasks import CausalLM

WORDS, LENGTH = 40, 9
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": WORDS,
}


class Peak(TorchDispatchMode):
    """The most elements of any tensor with words for a last dimension, but for weights and their gradients."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            logits = isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == WORDS
            if logits and tuple(tensor.shape) not in ((16, WORDS), (24, WORDS)):
                self.most = max(self.most, tensor.numel())
        return made


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        drawn = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(WORDS, (LENGTH,), generator=drawn), "mask": torch.arange(LENGTH) > index % 3}


def task(seed, *, width=16, chunked_loss=None):
    torch.manual_seed(seed)
    module = CausalLM({**LLAMA, "hidden_size": width}, lr=1e-2, chunked_loss=chunked_loss)
    module.configure_model()
    return module


def trained(kit, student, *callbacks):
    """What the loss was in each step, and the largest tensor of logits."""
    losses = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *args):
            losses.append((float(outputs["loss"]), float(trainer.callback_metrics["distillation"])))

    run = Trainer(
        accelerator="cpu", callbacks=[*callbacks, Watch()], max_steps=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=kit.folder,
    )  # fmt: skip
    with Peak() as peak:
        run.fit(student, *[torch.utils.data.DataLoader(Rows(), batch_size=2)] * 2)
    return losses, peak.most


@pytest.mark.parametrize("at", [None, "model"])
def test_the_loss_of_whole_logits_with_another_teacher(kit, at) -> None:
    teacher = task(1, width=24) if at is None else task(1, width=24).model
    results = []
    for tokens in (None, 4):
        student = task(0, chunked_loss=tokens)
        distil = DistillationCallback(
            teacher, losses={"forward": KL(temperature=2.0)}, task_weight=0.5, mask="mask", at=at, chunked_loss=tokens
        )
        results.append(trained(kit, student, QATCallback("int4-g8"), distil))
        teacher.requires_grad_(True)
    assert len(results[0][0]) == 3
    assert results[1][0][0] == pytest.approx(results[0][0][0], rel=1e-4)
    for whole, pieces in zip(results[0][0], results[1][0], strict=True):
        assert pieces == pytest.approx(whole, rel=5e-3)  # once a code has flipped
    assert (results[0][1], results[1][1]) == (2 * LENGTH * WORDS, 4 * WORDS)


def test_beside_losses_on_layers_and_by_its_own_self(kit) -> None:
    """At first the student is its teacher; then a logged loss of each kind is the whole one's."""
    found = []
    for tokens in (None, 5):
        losses = {"forward": KL(), "layers.*": MSE()}
        distil = DistillationCallback(losses=losses, weight={"layers.*": 0.1}, task_weight=1.0, chunked_loss=tokens)
        found.append(trained(kit, task(0, chunked_loss=tokens), distil)[0])
    assert found[1][0][1] == 0.0 < found[1][2][1]
    assert torch.tensor(found[1]).allclose(torch.tensor(found[0]), rtol=1e-4, atol=1e-8)


def test_a_task_in_pieces_is_not_compared_by_its_losses(kit) -> None:
    with pytest.raises(ValueError, match=r"single class.*chunked_loss=1024"):
        trained(kit, task(0, chunked_loss=4), DistillationCallback(losses={"model": KL()}, task_weight=0.0))


def test_errors_show_the_corrected_call(kit) -> None:
    with pytest.raises(ValueError, match="chunked_loss=0: at least 1"):
        DistillationCallback(task_weight=0.0, chunked_loss=0)
    for losses in (KL(), {"layers.*": MSE()}):
        distil = DistillationCallback(losses=losses, task_weight=0.0, chunked_loss=4)
        student = kit.Net() if isinstance(losses, KL) else task(0)
        with pytest.raises(ValueError, match=r"losses=\{'forward': KL\(\)\}.*leave chunked_loss out"):
            trained(kit, student, distil)
    site = Site("forward", task(0).model, None, ())
    assert heads_of(site, Site("forward", nn.Linear(1, 1), None, ())) is None
    site.module.lm_head.weight.placements = ()
    with pytest.raises(ValueError, match=r"is sharded.*strategy='ddp'"):
        heads_of(site, site)
