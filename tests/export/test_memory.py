"""Writing an artifact streams: beside the model there is never more in memory than one of its blocks."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlightning.export.commands import make_target
from qlightning.export.target import make_plan
from qlightning.export.trained import Trained


class Peak(TorchDispatchMode):
    """The most bytes that tensors made in the block held at once.

    Attributes:
        most: That number.
    """

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {self._key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and self._key(tensor) not in before and tensor.device.type != "meta":
                self._add(tensor.untyped_storage())
        return out

    @staticmethod
    def _key(tensor):
        return tensor.untyped_storage()._cdata

    def _add(self, storage):
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size):
        self.now -= size


def test_the_yardstick_sees_what_is_held_and_what_is_let_go():
    with Peak() as peak:
        a = torch.ones(1000)
        for _ in range(5):
            b = a * 2
            del b
        c = [a + i for i in range(3)]
    assert peak.most == 4 * 4000
    del c


@pytest.mark.parametrize(
    ("format", "spec", "blocks"),
    [
        ("plain", "int4-g32", 1.0),
        ("plain", "int8-asym", 1.0),
        ("compressed-tensors", "int4-g32", 1.0),
        ("compressed-tensors", "int8", 1.0),
        ("torchao", "int4-g32", 1.0),
        ("gguf", "gguf-q4_0", 1.0),
        ("bitsandbytes", "nf4-g32", 2.2),  # finding the nearest of any levels takes nine numbers for each weight
    ],
)
def test_beside_the_model_one_block(kit, format, spec, blocks):
    module = kit.llama(spec, hidden_size=256, intermediate_size=512, num_hidden_layers=4, vocab_size=64)
    block = sum(p.numel() * p.element_size() for p in module.model.model.layers[0].parameters())
    target, trained = make_target(format), Trained(module)
    plan = make_plan(target, trained)
    kit.out.mkdir()
    with Peak() as peak:
        target.write(plan, kit.out)
    assert block / 8 < peak.most <= blocks * block
    assert peak.now < block / 8
