"""Histograms: what is counted, against numpy and the codes that are stored."""

import numpy as np
import pytest
import torch

from qlightning.methods.fairy2i import PhaseSum
from qlightning.optim.weights import weights_in
from qlightning.reporting import histogram
from qlightning.reporting.histogram import histogram_of


def of(module, index=0):
    weight = list(weights_in(module))[index]
    matrix = weight.matrix()
    state = weight.state(matrix)
    found = histogram_of(weight, matrix, state, weight.quantizer.on_grid(matrix, state, None))
    return weight, matrix, found


@pytest.mark.parametrize(
    "spec", ["int4-g32", "ternary", "fp4e2m1-g32", "nvfp4", "int3-asym-g32", "nf4-g32", "int4-lsq"]
)
def test_dots_are_the_shares_of_the_stored_codes(kit, spec):
    weight, matrix, found = of(kit.net(spec))
    codes = weight.quantizer.quantize(matrix).codes
    values = weight.quantizer.format.decode(codes).numpy()
    assert found.levels == sorted(set(weight.quantizer.format.values()))
    assert found.on_level == pytest.approx([float((values == level).mean()) for level in found.levels])
    assert sum(found.on_level) == pytest.approx(1.0)


@pytest.mark.parametrize("spec", ["int4-channel", "ternary", "int8"])
def test_bars_are_numpys(kit, spec):
    weight, matrix, found = of(kit.net(spec))
    stored = weight.quantizer.quantize(matrix)
    v = (matrix / stored.scale.reshape(-1, 1) if stored.scale.numel() > 1 else matrix / stored.scale).numpy()
    density, _ = np.histogram(v.astype(np.float64), bins=np.array(found.edges))
    assert np.array(found.density) * np.diff(found.edges) == pytest.approx(density / v.size, abs=2 / v.size)
    assert found.beyond == pytest.approx(1 - density.sum() / v.size, abs=2 / v.size)
    assert found.unit == "step sizes"


def test_many_values_have_no_dots(kit):
    _, _, found = of(kit.net("int8"))
    assert len(found.levels) == 256
    assert found.on_level == []


def test_what_has_no_single_code_is_shown_as_it_is(kit):
    weight, matrix, found = of(kit.net({"net.*": PhaseSum(stages=2), "head": None}))
    assert found.unit == "weight"
    assert found.levels == sorted(set(weight.quantizer(matrix).flatten().tolist()))
    assert found.edges[0] < float(matrix.min()) < float(matrix.max()) < found.edges[-1]
    assert found.on_level == []


def test_of_large_weights_some_elements_are_counted(kit, monkeypatch):
    monkeypatch.setattr(histogram, "ELEMENTS", 500)
    _, matrix, found = of(kit.net("int4-g32"))
    assert matrix.numel() == 2048
    assert 150 < found.elements <= 500
    assert sum(found.density) * (found.edges[1] - found.edges[0]) == pytest.approx(1 - found.beyond)


def test_a_weight_of_one_value(kit):
    module = kit.net("int4-channel")
    with torch.no_grad():
        module.net[0].weight.zero_()
    _, _, found = of(module)
    assert found.on_level[found.levels.index(0.0)] == 1.0
