"""The whole: sizes add up to those of `evaluation/size.py`, shares to those of the coverage."""

import pytest
from torch import nn

from qlightning.evaluation.size import deployed_bytes, float_bytes


@pytest.mark.parametrize(
    "rules", ["int4-g32", {"net.*": "nvfp4", "head": "int8"}, {"*": "ternary", "type:Embedding": "int8"}]
)
def test_parts_add_up(kit, rules):
    module = kit.net(rules)
    report = kit.report(module)
    assert report.trained == float_bytes(module)
    assert report.served == deployed_bytes(module)
    quantized = sum(
        p.numel() for layer in module.modules() if hasattr(layer, "weight_quantizer") for p in [layer.weight]
    )
    assert report.quantized_share == pytest.approx(quantized / sum(p.numel() for p in module.parameters()))
    assert [part.name for part in report.parts if part.weight] == [weight.name for weight in report.weights]


def test_the_bias_of_a_quantized_layer_is_a_float_part(kit):
    parts = {part.name: part for part in kit.report().parts}
    assert (parts["net.0"].elements, parts["net.0"].bits, parts["net.0"].weight) == (64, 32.0, None)
    assert parts["net.3"].elements == 64  # weight and bias of the norm
    assert parts["net.2.weight"].bits == 5.0


def test_the_worst(kit):
    report = kit.report({"net.0": "int8", "net.2": "int2-g32", "head": "int4-g32"})
    assert report.worst.name == "net.2.weight"


def test_nothing_quantized_is_nothing_to_report_on(kit):
    with pytest.raises(ValueError, match="nothing in Net is quantized"):
        kit.report(nn.Linear(2, 2))
