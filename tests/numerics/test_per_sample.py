"""One block for each sample."""

import torch

from qlightning.numerics import Int, Quantizer
from qlightning.numerics.per_sample import PerSample


def test_samples_are_quantized_as_if_they_came_alone() -> None:
    x = torch.randn(3, 4, 5)
    quantizer = Quantizer(Int(4), PerSample())
    assert torch.equal(quantizer(x), torch.cat([Quantizer(Int(4))(sample[None]) for sample in x]))
    stored = quantizer.quantize(x)
    assert stored.scale.shape == (3, 1)
    assert torch.equal(quantizer.dequantize(stored, x.dtype), quantizer(x))


def test_a_vector_is_one_sample() -> None:
    assert PerSample().view(torch.randn(7)).shape == (1, 7)
