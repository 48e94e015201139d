"""A quantizer that is bypassed, observed or repeated: what stays in the graph, and what moves."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qlightning.numerics import parse


def test_disabled_is_the_identity_and_keeps_parameters_in_the_graph():
    x = torch.randn(4, 8, requires_grad=True)
    quantizer = parse("int4-asym-lsq")
    quantizer.build((4, 8))
    quantizer.enabled = False
    y = quantizer(x)
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert torch.equal(x.grad, 2 * x)
    assert len(list(quantizer.learned())) == 2
    for parameter in quantizer.learned():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    with torch.no_grad():
        assert quantizer(x).data_ptr() == x.data_ptr(), "no copy"


def test_disabled_allows_in_place_operations_on_its_output():
    x = torch.randn(4, 8, requires_grad=True)
    quantizer = parse("int4-lsq")
    quantizer.build((4, 8))
    quantizer.enabled = False
    quantizer(x * 2).relu_().sum().backward()
    assert torch.equal(x.grad, 2 * (x > 0).float())


@pytest.mark.parametrize("spec", ["int8-tensor-ema", "int4-asym-tensor-ema-clip", "int4-g8-sr", "int4-lsq"])
def test_activation_checkpointing_observes_once_and_replays(spec):
    x = torch.randn(4, 8)
    outcomes = []
    for repeat in (False, True):
        quantizer = parse(spec).train()
        quantizer.build((4, 8))
        quantizer.initialize(x)
        leaf = (x * 3).requires_grad_()
        y = checkpoint(quantizer, leaf, use_reentrant=False) if repeat else quantizer(leaf)
        y.square().sum().backward()
        outcomes.append([y.detach(), leaf.grad, *quantizer.state_dict().values()])
    assert all(torch.equal(plain, repeated) for plain, repeated in zip(*outcomes, strict=True))


def test_observing_while_disabled_prepares_the_switch():
    batches = [torch.randn(4, 8) for _ in range(3)]
    quantizer, reference = parse("int8-tensor-ema"), parse("int8-tensor-ema")
    quantizer.build((-1, 8))
    reference.build((-1, 8))
    quantizer.enabled, quantizer.observing = False, True
    for x in batches:
        assert torch.equal(quantizer(x), x)
        reference.observe(x)
    quantizer.scale.settle()
    reference.scale.settle()
    quantizer.enabled, quantizer.observing = True, False
    assert torch.equal(quantizer.eval()(batches[0]), reference.eval()(batches[0]))
    quantizer.enabled = False
    value = quantizer.scale.value.clone()
    quantizer.train()(batches[1] * 100)
    assert torch.equal(quantizer.scale.value, value), "disabled and not observing: nothing moves"
