"""Single products return to float at a step of the run, stay there, and a new run begins with all of them."""

import pytest
import torch

from qlightning import QATCallback, Scheme
from qlightning.callbacks.release import Release
from qlightning.evaluation.size import deployed_bytes, float_bytes
from qlightning.layers.backward import Backward
from qlightning.layers.convert import quantizers_of, restore

SLOTS = {"grad_dgrad": "int8-token-sr", "grad_wgrad": "int8-channel-sr", "input_wgrad": "int8-channel"}
PLACES = {"weight_quantizer", "input_quantizer"}


def quantization(**arguments) -> QATCallback:
    backward = arguments.pop("backward", Backward(**SLOTS))
    return QATCallback(rules={"*": Scheme("int4", input="int8-token", backward=backward)}, **arguments)


def acting(module) -> set[str]:
    """Which kinds of quantizers act, by the last part of their names."""
    return {name.rpartition(".")[2] for name, quantizer in quantizers_of(module) if quantizer.enabled}


@pytest.mark.parametrize(
    ("products", "remains"),
    [
        (["fprop"], set(SLOTS)),
        (["dgrad"], PLACES | {"grad_wgrad", "input_wgrad"}),
        (["wgrad"], PLACES | {"grad_dgrad"}),
        (["dgrad", "wgrad"], PLACES),
    ],
)
def test_products_are_released_at_their_step_and_for_good(kit, products, remains):
    module, record = kit.Net(), kit.Record(lambda trainer, net: acting(net))
    kit.fit(module, quantization(start=2), Release(products, at=0.5), record)
    assert record.seen == [set(SLOTS)] * 2 + [PLACES | set(SLOTS)] * 2 + [remains] * 4


def test_the_switch_happens_once(kit, caplog):
    folder = kit.folder / "checkpoints"
    with caplog.at_level("INFO"):
        kit.fit(kit.Net(), quantization(), Release(at=4), kit.every_step(folder))
        said = [line for line in caplog.messages if line.startswith("Release")]
        assert said == ["Release: fprop in float from step 4 on (6 quantizers)"]
        caplog.clear()
        kit.fit(kit.Net(), quantization(), Release(at=4), kit.every_step(folder), ckpt_path=folder / "step=6.ckpt")
    assert not [line for line in caplog.messages if "quantizers act" in line or line.startswith("Release")]


def test_with_fprop_released_the_model_is_a_float_model(kit):
    module = kit.Net()
    kit.fit(module, quantization(), Release(at=5))
    now = kit.outputs(module)
    assert deployed_bytes(module) == float_bytes(module)
    assert torch.equal(kit.outputs(restore(module)), now)


@pytest.mark.parametrize("step", [2, 4, 6])
@pytest.mark.parametrize("products", [["fprop"], ["dgrad", "wgrad"]])
def test_resume_is_exact_before_at_and_after_the_switch(kit, step, products):
    folder, whole, again = kit.folder / "checkpoints", kit.Record(), kit.Record()
    kit.fit(kit.Net(dropout=0.2), quantization(start=1), Release(products, at=0.5), whole, kit.every_step(folder))
    callbacks = quantization(start=1), Release(products, at=0.5), again, kit.every_step(folder)
    kit.fit(kit.Net(dropout=0.2), *callbacks, ckpt_path=folder / f"step={step}.ckpt")
    assert again.losses == whole.losses[step:]


def test_the_switch_stays_at_its_step_when_the_run_is_made_longer(kit):
    folder, record = kit.folder / "checkpoints", kit.Record(lambda trainer, net: "weight_quantizer" in acting(net))
    kit.fit(kit.Net(), quantization(), Release(at=0.5), kit.every_step(folder), max_steps=8)
    callbacks = quantization(), Release(at=0.5), record, kit.every_step(folder)
    kit.fit(kit.Net(), *callbacks, ckpt_path=folder / "step=2.ckpt", max_steps=20)
    assert record.seen == [True] * 2 + [False] * 16


def test_a_new_run_begins_with_all_products_quantized(kit):
    module, record = kit.Net(), kit.Record(lambda trainer, net: acting(net))
    kit.fit(module, quantization(), Release(["fprop", "dgrad"], at=0.5), max_steps=4)
    kit.fit(module, quantization(), record, max_steps=2)
    assert record.seen == [PLACES | set(SLOTS)] * 2


def test_noise_of_gradients_moves_on_with_every_batch(kit):
    module = kit.Net()
    kit.fit(module, quantization(), max_steps=5)
    assert int(module.net[0].backward.grad_dgrad.rounding.step) == 5


@pytest.mark.parametrize(
    ("callbacks", "why"),
    [
        (lambda: [quantization(), Release(at=8)], "the run ends at step 8"),
        (lambda: [quantization(backward=None), Release(["wgrad"])], "no operand of wgrad has a quantizer"),
        (lambda: [quantization(), Release(["forward"])], "write some of 'fprop'"),
        (lambda: [quantization(), Release(at=1.5)], "at=1.5"),
    ],
)
def test_what_cannot_be_is_refused(kit, callbacks, why):
    with pytest.raises(ValueError, match=why):
        kit.fit(kit.Net(), *callbacks())
