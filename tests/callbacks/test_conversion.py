"""Conversion behind hooks: the module gets its own hooks back, whatever they were."""

import pytest

from qlightning import QATCallback

PLACES = ["Net", "SetupNet", "LazyNet", "EarlyNet"]


def learned(**options):
    return QATCallback("int4-lsq", input="int8-tensor-lsq", calibration=2, **options)


@pytest.mark.parametrize("place", PLACES)
def test_teardown_leaves_nothing_on_the_module(kit, place):
    module = getattr(kit, place)()
    before = set(vars(module))
    trainer = kit.trainer(learned(), max_steps=4)
    trainer.fit(module, kit.loader(), kit.held_out())
    trainer.validate(module, kit.held_out(), verbose=False)
    assert set(vars(module)) - before <= {"_trainer", "_hparams", "net"}


def test_hooks_on_the_instance_come_back(kit):
    module = kit.LazyNet()

    def own() -> None:
        module.net = module.net or kit.make_layers()

    module.configure_model = own
    kit.fit(module, learned(), max_steps=4)
    assert module.configure_model is own
    assert kit.scales(module)
