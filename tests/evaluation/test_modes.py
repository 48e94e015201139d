"""Modes for a while: inside it holds, afterwards all is as it was, also after an error."""

import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from qlightning import convert
from qlightning.evaluation.modes import eval_mode, logging_to, not_observing, quantizers_off, silent
from qlightning.layers.convert import quantizers_of


def test_eval_mode_gives_every_submodule_its_own_mode_back() -> None:
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    module[1].eval()
    before = [child.training for child in module.modules()]
    with eval_mode(module):
        assert not any(child.training for child in module.modules())
    assert [child.training for child in module.modules()] == before
    with pytest.raises(KeyError), eval_mode(module):
        raise KeyError
    assert [child.training for child in module.modules()] == before


def switches(module: nn.Module) -> list[tuple[bool, bool]]:
    return [(quantizer.enabled, quantizer.observing) for _, quantizer in quantizers_of(module)]


def test_quantizers_are_switched_and_switched_back() -> None:
    module = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    convert(module, {"*": {"weight": "int4-channel", "input": "int8-tensor-ema"}}, min_coverage=0.0)
    first, second = (quantizer for name, quantizer in quantizers_of(module) if "weight" in name)
    first.enabled, first.observing, second.enabled, second.observing = False, True, True, True
    before = switches(module)
    assert len(set(before)) > 1
    with quantizers_off(module):
        assert set(switches(module)) == {(False, False)}
    assert switches(module) == before
    with pytest.raises(KeyError), quantizers_off(module):
        raise KeyError
    assert switches(module) == before
    with not_observing(module):
        assert switches(module) == [(acted, False) for acted, _ in before]
    assert switches(module) == before


def test_logging_is_redirected_and_given_back() -> None:
    module, said = BoringModel(), []
    module.log = own = lambda *args: said.append(("own", *args))
    with logging_to(module, lambda *args: said.append(args), lambda values: said.append(values)):
        module.log("loss", 1.0)
        module.log_dict({"a": 2})
    assert said == [("loss", 1.0), {"a": 2}]
    assert module.log is own
    assert "log_dict" not in vars(module)
    with silent(module):
        module.log("loss", 3.0)
    assert module.log is own
    with pytest.raises(KeyError), silent(module):
        raise KeyError
    assert module.log is own
    assert len(said) == 2


def test_a_plain_module_is_left_alone_by_silence() -> None:
    module = nn.Linear(2, 2)
    with silent(module):
        assert "log" not in vars(module)
