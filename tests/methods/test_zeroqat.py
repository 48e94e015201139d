"""ZeroQAT as a method; the estimate and its memory are in tests/optim/test_zeroth_order.py."""

import pytest
import torch

from qlightning.callbacks.forward_only import ForwardOnly
from qlightning.callbacks.qat import QATCallback
from qlightning.methods import CAGE, ZeroQAT, compose
from qlightning.solvers import LET


def test_what_it_is_made_of() -> None:
    qat, forward = ZeroQAT(
        lr=1e-7, eps=0.01, granularity=64, parameters=["*.q_proj.weight"], restore="regenerate"
    ).callbacks()
    assert isinstance(qat, QATCallback)
    assert isinstance(forward, ForwardOnly)
    assert (forward.lr, forward.eps, forward.parameters) == (1e-7, 0.01, ("*.q_proj.weight",))
    assert forward.restore == "regenerate"
    assert ZeroQAT(input_bits=None, alpha=None).quantization().keys() == {"weight"}
    assert ZeroQAT(alpha=(0.5, 0.7), let_steps=3, batches=4).quantization()["init"] == LET(
        alpha=(0.5, 0.7), steps=3, batches=4
    )
    with pytest.raises(ValueError, match=r"LET\(alpha="):
        ZeroQAT(alpha=2.0)
    with pytest.raises(ValueError, match="eps="):
        ZeroQAT(eps=0.0)


def test_min_max_weights_and_tokens() -> None:
    """The grid of equation h = (max - min) / (2^b - 1), z = -round(min / h), by hand."""
    torch.manual_seed(0)
    w = torch.randn(4, 32)
    quantizer = ZeroQAT(bits=3).quantization()["weight"]
    quantizer.build((4, 32))
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    h = (high - low) / 7
    zero = torch.round(-low / h)
    expected = (torch.clamp(torch.round(w / h) + zero, 0, 7) - zero) * h
    assert torch.allclose(quantizer(w), expected, atol=1e-6)
    x = torch.randn(2, 5, 8)
    tokens = ZeroQAT(input_bits=4).quantization()["input"]
    assert torch.allclose(tokens(x)[1, 2], tokens(x[1:, 2:3])[0, 0])


def test_it_makes_no_sense_beside_what_acts_on_gradients() -> None:
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    callbacks = compose(ZeroQAT(), CAGE(bits=None))
    trainer = Trainer(accelerator="cpu", max_steps=1, callbacks=callbacks, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="CAGECallback acts on gradients, and forward-only training has none"):
        trainer.fit(BoringModel())
