"""Clipping for the smallest output error, against the search written out group by group with the inputs themselves."""

import pytest
import torch

from qlightning.numerics import Quantizer, parse
from qlightning.numerics.formats import Int
from qlightning.numerics.granularity import PerTensor
from qlightning.solvers.fixed import Fixed
from qlightning.solvers.output_clip import clip_for_outputs, rowwise
from qlightning.transforms import hadamard


def fixed(spec: str, weight: torch.Tensor) -> Quantizer:
    quantizer = parse(spec)
    quantizer.scale = Fixed(quantizer.scale)
    quantizer.build(tuple(weight.shape))
    quantizer.initialize(weight)
    return quantizer


def naive(w, x, size, levels, steps, count):
    """What AWQ's search does for one weight: asymmetric rounding of clamped groups, errors of partial products."""
    result = w.clone()
    for row in range(len(w)):
        for start in range(0, w.shape[1], size):
            columns = slice(start, start + size)
            group, least = w[row, columns], float("inf")
            for i in range(count):
                bound = group.abs().max() * (1 - i / steps)
                cut = group.clamp(-bound, bound)
                scale = (cut.max().clamp(min=0) - cut.min().clamp(max=0)) / levels
                zero = (-cut.min().clamp(max=0) / scale).round()
                q = (((cut / scale).round() + zero).clamp(0, levels) - zero) * scale
                error = float((x[:, columns] @ (q - group)).square().mean())
                if error < least:
                    least, result[row, columns] = error, cut
    return result


@pytest.mark.parametrize(("spec", "size"), [("int3-g8-asym", 8), ("int3-channel-asym", 16)])
def test_against_the_search_written_out(small, spec, size) -> None:
    weight, x = small.problem(rows=4, columns=16)
    quantizer = fixed(spec, weight)
    clipped = clip_for_outputs(weight, (x.t() @ x).double() / len(x), quantizer)
    expected = naive(weight, x, size, 7, 20, 10)
    assert torch.equal(clipped, expected)
    assert not torch.equal(clipped, weight)
    settled = quantizer(clipped).detach()
    quantizer.initialize(clipped)
    assert torch.equal(quantizer(clipped).detach(), settled)


def test_no_group_gets_worse(small) -> None:
    weight, x = small.problem(rows=8, columns=32)
    quantizer = fixed("int2-g8", weight)
    before = quantizer(weight).detach()
    after = quantizer(clip_for_outputs(weight, x.t() @ x, quantizer)).detach()

    def errors(values):
        return torch.stack(
            [(x[:, i : i + 8] @ (values - weight)[:, i : i + 8].t()).square().mean(0) for i in (0, 8, 16, 24)]
        )

    assert bool((errors(after) <= errors(before) * (1 + 1e-5)).all())
    assert float(errors(after).mean()) < 0.95 * float(errors(before).mean())


def test_blocks_of_rows_only() -> None:
    weight = torch.randn(4, 16)
    assert rowwise(parse("int4-g8"), weight)
    assert rowwise(parse("int4-channel"), weight)
    whole = Quantizer(Int(4), PerTensor())
    assert not rowwise(whole, weight)
    with pytest.raises(ValueError, match="pieces of rows"):
        clip_for_outputs(weight, torch.eye(16), whole)
    turned = Quantizer(Int(4), parse("int4-channel").granularity, transform=hadamard.Hadamard())
    with pytest.raises(ValueError, match="pieces of rows"):
        clip_for_outputs(weight, torch.eye(16), turned)
