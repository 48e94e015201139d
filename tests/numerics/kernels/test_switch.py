"""When kernels act."""

import torch

from qlightning.numerics.kernels import switch


def test_never_on_a_cpu() -> None:
    assert not switch.kernels_act(torch.zeros(1))


def test_on_a_gpu_unless_turned_off(monkeypatch) -> None:
    monkeypatch.setattr(switch, "_installed", lambda: True)
    monkeypatch.setattr(switch, "_chosen", [])
    x = torch.zeros(1, device="meta")
    assert not switch.kernels_act(x)

    class OnGPU:
        device = torch.device("cuda")

    assert switch.kernels_act(OnGPU())
    monkeypatch.setenv("QLIGHTNING_KERNELS", "0")
    assert not switch.kernels_act(OnGPU())
    switch.use_kernels(True)
    assert switch.kernels_act(OnGPU())
    switch.use_kernels(False)
    monkeypatch.delenv("QLIGHTNING_KERNELS")
    assert not switch.kernels_act(OnGPU())
