"""Granularities against numpy slicing: which elements share a scale, and where that scale is kept."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlightning.numerics import AbsMax, Int, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, Quantizer, parse

EVERY = pytest.mark.parametrize(
    "granularity", [PerTensor(), PerChannel(), PerToken(), PerGroup(4), PerBlock(3, 4)], ids=repr
)


@EVERY
def test_view_is_reversible_and_agrees_with_scale_shape(granularity):
    x = torch.randn(6, 8)
    blocks = granularity.view(x)
    assert tuple(blocks.shape[:-1]) == granularity.scale_shape((6, 8))[:-1]
    assert granularity.scale_shape((6, 8))[-1] == 1
    assert torch.equal(granularity.unview(blocks, x.shape), x)


@EVERY
def test_non_contiguous_input(granularity):
    x = torch.randn(8, 6).t()
    assert torch.equal(granularity.view(x), granularity.view(x.contiguous()))
    assert torch.equal(granularity.unview(granularity.view(x), x.shape), x)


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    down=st.integers(1, 4),
    across=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_blocks_hold_the_right_elements(rows, columns, down, across, seed):
    x = torch.randn(rows * down, columns * across, generator=torch.Generator().manual_seed(seed))
    a = x.numpy()
    blocks = PerBlock(rows, columns).view(x).numpy()
    groups = PerGroup(columns).view(x).numpy()
    for i in range(down):
        for j in range(across):
            tile = a[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            np.testing.assert_array_equal(blocks[i, j], tile.reshape(-1))
            np.testing.assert_array_equal(groups[i * rows, j], tile[0])
    np.testing.assert_array_equal(PerTensor().view(x).numpy(), a.reshape(1, -1))
    np.testing.assert_array_equal(PerChannel().view(x).numpy(), a)


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (8,), (2, 3, 4, 8)])
def test_activations_of_any_rank(shape):
    x = torch.randn(shape)
    flat = x.reshape(-1, 8)
    for granularity in (PerToken(), PerGroup(4), PerTensor()):
        quantizer = Quantizer(Int(4), granularity)
        assert quantizer(x).shape == x.shape
        assert torch.equal(quantizer(x).reshape(-1, 8), quantizer(flat))
        assert tuple(quantizer.quantize(x).scale.shape) == granularity.scale_shape(tuple(shape))


@pytest.mark.parametrize("spec", ["int4-channel", "int4-g4", "int4-b2x4", "mxfp4-g4", "nf4-g8"])
def test_scales_shard_with_dimension_0_of_the_weight(spec):
    w = torch.randn(8, 16)
    whole = parse(spec).quantize(w)
    shards = [parse(spec).quantize(part) for part in w.chunk(2)]
    assert torch.equal(torch.cat([shard.codes for shard in shards]), whole.codes)
    joined = torch.cat([shard.scale.view(torch.uint8) for shard in shards])
    assert torch.equal(joined, whole.scale.view(torch.uint8))
    assert whole.scale.shape[0] * (2 if "b2" in spec else 1) == 8


@pytest.mark.parametrize(
    ("columns", "size", "suggestion"), [(96, 64, ["g16", "g32"]), (40, 32, ["g20"]), (7, 4, ["g1"]), (48, 128, ["g16"])]
)
def test_a_group_that_does_not_divide_names_one_that_does(columns, size, suggestion):
    x = torch.randn(2, columns)
    for act in (
        lambda: PerGroup(size).scale_shape((2, columns)),
        lambda: parse(f"int4-g{size}")(x),
        lambda: parse(f"int4-g{size}").quantize(x),
        lambda: parse(f"int4-g{size}").build((2, columns)),
        lambda: parse(f"int4-g{size}-lsq").build((2, columns)),
    ):
        with pytest.raises(ValueError, match=f"group size {size} does not divide {columns} columns") as caught:
            act()
        named = re.findall(r"'(g\d+)'", str(caught.value))
        assert named == suggestion
        assert all(parse(f"int4-{word}")(x).shape == x.shape for word in named)


@pytest.mark.parametrize("shape", [(6, 7), (5, 8), (2, 6, 8)])
def test_blocks_that_do_not_tile_are_refused(shape):
    for act in (PerBlock(3, 4).scale_shape, lambda shape: Quantizer(Int(4), PerBlock(3, 4))(torch.randn(shape))):
        with pytest.raises(ValueError, match=r"blocks of 3x4 do not tile shape .* 'channel', which always fits"):
            act(shape)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match=r"for example PerGroup\(128\)"):
        PerGroup(0)
    with pytest.raises(ValueError, match=r"for example PerBlock\(16, 16\)"):
        PerBlock(0, 4)


def test_a_shared_scale_covers_its_block_and_nothing_else():
    """Scaling one block changes that block's scale alone."""
    x = torch.randn(6, 8)
    for granularity in (PerChannel(), PerGroup(4), PerBlock(3, 4)):
        quantizer = Quantizer(Int(4), granularity, scale=AbsMax())
        blocks = granularity.view(x).clone()
        blocks.flatten(0, -2)[1] *= 4
        changed = quantizer.quantize(granularity.unview(blocks, x.shape))
        plain = quantizer.quantize(x)
        ratio = (changed.scale / plain.scale).flatten()
        assert ratio[1] == 4
        assert bool((ratio.index_fill(0, torch.tensor(1), 1.0) == 1).all())
        assert torch.equal(changed.codes, plain.codes)
