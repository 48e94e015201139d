"""What does not work on shares of a model says so, with the call that works."""

from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import qlightning
from qlightning import QATCallback
from qlightning.callbacks.allocation import AllocationCallback, finest
from qlightning.callbacks.distillation import DistillationCallback
from qlightning.callbacks.forward_only import ForwardOnly
from qlightning.layers.sharding import refuse_parallel

BITS = ["int2-channel", "int4-channel"]


def said(run):
    """The text of the ValueError, which every rank must raise: one alone would let the others hang."""
    try:
        run()
    except ValueError as error:
        return str(error)
    return "nothing"


def test_row_and_column_parallel_layers(ranks, kit):
    def check():
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor_parallel",))
        block, plain = kit.Body().blocks[0], kit.Body().blocks[0]
        qlightning.convert(block, "int4-channel")
        parallelize_module(plain, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        for name in ("up", "down"):  # which parallelize_module itself does not do to a converted layer
            block.get_submodule(name).weight = plain.get_submodule(name).weight
        return [
            said(lambda: refuse_parallel(block)),
            said(lambda: block(torch.randn(2, 16))),
            said(lambda: qlightning.convert(plain, "int4-channel")),
        ]

    for after, in_use, before in ranks(2, check):
        assert "up multiplies with a shard" in after
        assert "rules={'up': None}" in after
        assert "row- or column-parallel" in in_use
        assert "qlightning.convert(self, ...)" in before


def test_built_and_sharded_at_once(ranks, kit):
    """Refused, unless the module is converted in between: then as any other."""

    class Lazy(kit.Net):
        converts = False

        def __init__(self):
            super().__init__()
            self.body = None

        def configure_model(self):
            if self.body is None:
                self.body = kit.Body()
                if self.converts:
                    qlightning.convert(self, "int4-channel-lsq")
                super().configure_model()

    class Converting(Lazy):
        converts = True

    def check():
        def fit(module):
            return kit.fit(QATCallback("int4-channel-lsq"), module=module, strategy="fsdp2", steps=3)[0]

        return said(lambda: fit(Lazy())), fit(Converting()), fit(kit.Net())

    for refused, losses, wanted in ranks(2, check):
        assert "calls qlightning.convert(self, ...)" in refused
        assert "QuantizedFSDP()" in refused
        assert losses == wanted


@pytest.mark.parametrize("name", ["fsdp2", pytest.param("fsdp1", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shards", [True, False], ids=["shards", "one-file"])
def test_a_converted_checkpoint_under_a_strategy_that_shards(ranks, kit, name, shards):
    """Without a QATCallback the module would run in float; with one, or converted by its user, it runs as trained."""
    options = {"save_distributed_checkpoint": shards} if name == "fsdp2" else {}
    options |= {"state_dict_type": "sharded" if shards else "full"} if name == "fsdp1" else {}
    x, path = torch.linspace(-2, 2, 32).view(4, 8), kit.folder / "run" / "last.ckpt"

    class Converting(kit.Net):
        def configure_model(self):
            qlightning.convert(self, "int4-channel")
            super().configure_model()

    def check():
        def trainer(*callbacks):
            return kit.trainer(*callbacks, strategy=kit.strategy(name, **options), steps=2)

        def answers(module):
            with torch.no_grad():
                return module.eval()(x)

        trained, saving = kit.Net(), trainer(QATCallback("int4-channel"))
        saving.fit(trained, kit.loader())
        saving.save_checkpoint(path)
        refused = []
        for run, trusted in (("predict", None), ("validate", False), ("fit", None)):
            load = partial(getattr(trainer(), run), kit.Net(), kit.loader(), ckpt_path=path, weights_only=trusted)
            refused.append(said(load))
        if name == "fsdp1":  # whose shares answer nothing outside of a run
            return None, refused, []
        found, wanted = [], answers(trained)
        for module, callbacks in ((kit.Net(), [QATCallback("int4-channel")]), (Converting(), [])):
            trainer(*callbacks).validate(module, kit.loader(), ckpt_path=path, verbose=False)
            found.append(answers(module))
        return wanted, refused, found

    for wanted, refused, found in ranks(2, check):
        for words in refused:
            assert "quantizes body.first, body.blocks.0.up, body.blocks.0.down ..., but Net was sharded in" in words
            assert "callbacks=[QATCallback(...)]" in words
        assert all(torch.equal(answer, wanted) for answer in found)


@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("fsdp1", marks=pytest.mark.slow)])
def test_what_needs_whole_weights(ranks, kit, strategy):
    alone = {
        "allocation": lambda: [QATCallback(finest(BITS)), AllocationCallback(BITS)],
        "forward only": lambda: [QATCallback("int4"), ForwardOnly(0.01)],
        "teacher": lambda: [QATCallback("int4"), DistillationCallback(task_weight=0.5)],
    }

    def check():
        def fit(name):
            return kit.fit(*alone[name](), strategy=strategy, steps=2)

        return {name: said(partial(fit, name)) for name in alone}

    for found in ranks(2, check):
        assert "strategy='ddp'" in found["allocation"]
        assert "strategy='ddp'" in found["forward only"]
        assert "teacher='path/to/float.ckpt'" in found["teacher"]
