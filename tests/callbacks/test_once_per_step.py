"""Weights quantized once per optimizer step: the same run, bit for bit, with fewer roundings."""

import pytest
import torch
from lightning.pytorch import Callback
from torch._dynamo.testing import CompileCounterWithBackend

from qlightning import QATCallback
from qlightning.callbacks.once_per_step import OncePerStep
from qlightning.layers.convert import quantizers_of


class Sees(torch.optim.SGD):
    """An optimizer that changes `.data`, of which torch counts no version."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-0.05)
        return loss


@pytest.mark.parametrize("options", [{"weight": "int4-g8", "start": 2}, {"weight": "int4-lsq", "input": "int8-token"}])
def test_the_run_is_the_same(kit, options):
    class Net(kit.Net):
        def configure_optimizers(self):
            return Sees(self.parameters(), lr=0.05)

    runs = []
    for extra in ([], [OncePerStep()]):
        module, record = Net(), kit.Record()
        kit.fit(module, QATCallback(**options), *extra, record, accumulate_grad_batches=3, max_steps=4)
        runs.append((record.losses, module.state_dict()))
    (slow, theirs), (fast, ours) = runs
    assert fast == slow
    assert len(fast) == 12
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_nothing_is_kept_at_the_optimizer_step_and_after_the_run(kit):
    held = []

    class Looks(OncePerStep):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            held.append([bool(q.kept._made) for _, q in quantizers_of(pl_module)])

        def on_train_batch_end(self, trainer, pl_module, *args):
            held.append([bool(q.kept._made) for _, q in quantizers_of(pl_module)])

    module = kit.Net()
    kit.fit(module, QATCallback("int4-g8"), Looks(), accumulate_grad_batches=2, max_steps=2)
    assert [True] * 3 in held
    assert held[-1] == [False] * 3
    assert all(quantizer.kept is None for _, quantizer in quantizers_of(module))


def test_it_needs_a_conversion_before_it(kit):
    with pytest.raises(ValueError, match="Trainer\\(callbacks=\\[QATCallback"):
        kit.fit(kit.Net(), OncePerStep())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_it_is_the_same_run_with_one_compilation_more_for_the_switch(kit):
    counter, reads, runs = CompileCounterWithBackend("aot_eager"), [], []

    class Looks(Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            reads.append([q.kept is not None and q.kept.prepared is not None for _, q in quantizers_of(pl_module)])

    torch._dynamo.reset()
    for compiled in (False, True):
        module, record = kit.Net(), kit.Record()
        if compiled:
            module.net.compile(backend=counter, fullgraph=True)
        callbacks = [QATCallback("int4-g8", start=1), *([OncePerStep(), Looks()] if compiled else []), record]
        kit.fit(module, *callbacks, accumulate_grad_batches=2, max_steps=3, limit_val_batches=0)
        runs.append(record.losses)
    assert runs[0] == runs[1]
    assert len(runs[0]) == 6
    assert reads == [[False] * 3] * 2 + [[True] * 3] * 4
    assert counter.frame_count == 2 * 3  # each layer before the switch, and after it
    torch._dynamo.reset()
