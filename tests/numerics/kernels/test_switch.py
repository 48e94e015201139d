"""When kernels act."""

import pytest
import torch

from qlightning.numerics.kernels import switch


def test_never_on_a_cpu() -> None:
    assert not switch.kernels_act(torch.zeros(1))


def test_they_can_be_turned_off(monkeypatch) -> None:
    monkeypatch.setattr(switch, "_INSTALLED", True)
    monkeypatch.setattr(switch, "_capable", lambda: True)
    monkeypatch.setattr(switch, "_chosen", [])
    assert switch._wanted()
    monkeypatch.setenv("QLIGHTNING_KERNELS", "0")
    assert not switch._wanted()
    switch.use_kernels(True)
    assert switch._wanted()
    switch.use_kernels(False)
    monkeypatch.delenv("QLIGHTNING_KERNELS")
    assert not switch._wanted()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_question_breaks_no_graph(monkeypatch) -> None:
    monkeypatch.setattr(switch, "_INSTALLED", True)
    monkeypatch.setattr(switch, "_capable", lambda: True)
    torch._dynamo.reset()
    asked = torch.compile(lambda x: x + 1 if switch._wanted() else x, fullgraph=True, backend="eager")
    assert float(asked(torch.zeros(1))) == 1.0
