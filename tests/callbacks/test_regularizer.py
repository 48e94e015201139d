"""The penalty of the named outputs, and nothing else, is added; it composes with quantization and with itself."""

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

from qlightning import QATCallback
from qlightning.callbacks.regularizer import RegularizerCallback
from qlightning.losses import Kurtosis


def naive(y):
    c = y - y.mean(-1, keepdim=True)
    return (c.pow(4).mean(-1) / (c.square().mean(-1).square() + 1e-12)).sum()


def by_hand(kit, layers):
    class ByHand(kit.Net):
        def training_step(self, batch, batch_idx):
            x, y = batch
            penalty = 0
            for index, layer in enumerate(self.net):
                x = layer(x)
                if index in layers:
                    penalty = penalty + naive(x)
            return (x - y).square().mean() + 0.01 * penalty

    return ByHand()


@pytest.mark.parametrize(
    ("targets", "layers"),
    [("net.2", (2,)), ("type:Linear", (0, 2, 4)), (["net.0", "type:ReLU"], (0, 3)), (["0", "net.0"], (0,))],
)
def test_as_if_written_by_hand(kit, targets, layers):
    module, hand = kit.Net(), by_hand(kit, layers)
    trainer = kit.fit(module, RegularizerCallback(targets, weight=0.01), max_steps=4)
    kit.fit(hand, max_steps=4)
    for name, value in hand.state_dict().items():
        assert torch.allclose(module.state_dict()[name], value, rtol=1e-4, atol=1e-5), name
    assert float(trainer.callback_metrics["kurtosis"]) > 4 * len(layers)  # 4 tokens, each at least 1
    assert not any(m._forward_hooks for m in module.modules())


def test_kurtosis_falls(kit):
    def kurtosis(weight):
        module = kit.Net()
        callbacks = [RegularizerCallback("net.2", weight=weight, penalty=Kurtosis(reduction="tokens"))]
        trainer = kit.fit(module, *callbacks, max_steps=30)
        return float(trainer.callback_metrics["kurtosis"])

    assert kurtosis(3.0) < 0.8 * kurtosis(1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_beside_quantization_and_another(kit, first):
    def run(order):
        module, record = kit.Net(), kit.Record()
        callbacks = [
            QATCallback("int4-lsq", input="int8-token", start=2),
            RegularizerCallback("net.0", weight=0.01),
            RegularizerCallback("net.2", weight=0.02, name="second"),
        ]
        trainer = kit.fit(module, *callbacks[::order], record, max_steps=5)
        assert {"kurtosis", "second"} <= trainer.callback_metrics.keys()
        return record.losses

    one, other = run(1), run(-1)
    assert [loss for _, loss in one] == pytest.approx([loss for _, loss in other], rel=1e-5)


def test_command_line():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "it")
    options = {
        "targets": ["net.0", "net.2"],
        "weight": 1e-5,
        "penalty": {"class_path": "qlightning.losses.Kurtosis", "init_args": {"reduction": "tokens"}},
    }
    path = "qlightning.callbacks.regularizer.RegularizerCallback"
    it = parser.instantiate(parser.parse_object({"it": {"class_path": path, "init_args": options}})).it
    assert (it.targets, it.penalty) == (["net.0", "net.2"], Kurtosis(reduction="tokens"))


def test_errors(kit):
    with pytest.raises(ValueError, match=r"RegularizerCallback\('type:Linear', ...\)"):
        RegularizerCallback([], weight=1.0)
    module = kit.Net()
    module.net[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"no gradient flows back from the output of net.0: all before it is frozen"):
        kit.fit(module, RegularizerCallback("net.0", weight=1.0))
    with pytest.raises(ValueError, match=r"'net.22' names no submodule of Net; there are for example net.2"):
        kit.fit(kit.Net(), RegularizerCallback("net.22", weight=1.0))
