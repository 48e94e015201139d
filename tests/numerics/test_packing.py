"""Packing against a bit string built in numpy, and compressed-tensors' int32 words."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st

from qlightning.numerics import Float, pack, parse, unpack
from qlightning.numerics.packing import WIDTHS


def bit_string(row: list[int], bits: int) -> bytes:
    """One row as bytes, by arithmetic on a single big integer: value i in bits i * bits and up."""
    number = sum((value & (2**bits - 1)) << (i * bits) for i, value in enumerate(row))
    return number.to_bytes(-(-len(row) * bits // 8), "little")


@given(
    bits=st.sampled_from(WIDTHS),
    signed=st.booleans(),
    shape=st.lists(st.integers(1, 5), max_size=2),
    count=st.integers(0, 40),
    seed=st.integers(0, 1000),
)
def test_round_trip_of_any_codes(bits, signed, shape, count, seed):
    low = -(2 ** (bits - 1)) if signed else 0
    generator = np.random.default_rng(seed)
    raw = generator.integers(low, low + 2**bits, size=(*shape, count))
    codes = torch.from_numpy(raw).to(torch.int8 if signed else torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert tuple(packed.shape) == (*shape, -(-count * bits // 8))
    unpacked = unpack(packed, bits, count, signed=signed)
    assert unpacked.dtype == codes.dtype
    assert torch.equal(unpacked, codes)
    for index in np.ndindex(*shape):
        assert bytes(packed[index].tolist()) == bit_string(raw[index].tolist(), bits)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_widths_that_divide_a_byte_agree_with_numpys_packbits(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, size=(3, 40), dtype=np.uint8)
    unpacked = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    expected = np.packbits(unpacked.reshape(3, -1), axis=-1, bitorder="little")
    np.testing.assert_array_equal(pack(torch.from_numpy(codes), bits).numpy(), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_words_of_compressed_tensors(bits):
    """They store code + 2^(bits-1) (offset binary) where we store two's complement; the layout is the same."""
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, 32), dtype=torch.int8)
    theirs = pack_to_int32(codes, bits, packed_dim=1)
    ours = pack((codes.int() + 2 ** (bits - 1)), bits).view(torch.int32)
    assert torch.equal(ours, theirs)


def test_three_and_six_bits_waste_nothing():
    assert pack(torch.zeros(2, 8), 3).shape == (2, 3)
    assert pack(torch.zeros(2, 4), 6).shape == (2, 3)
    assert pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0]), 3).tolist() == [0b11010001, 0b01011000, 0b00011111]


@pytest.mark.parametrize(
    "spec", ["int4", "int3", "int2", "int6", "int8", "binary", "ternary", "nf4-g16", "nvfp4", "uint4"]
)
def test_codes_of_a_quantizer_fill_exactly_their_bits(spec):
    quantizer, x = parse(spec), torch.randn(4, 32)
    codes = quantizer.quantize(x).codes
    packed = pack(codes, quantizer.format.bits)
    assert packed.numel() == codes.numel() * quantizer.format.bits / 8
    signed = quantizer.format.code_dtype == torch.int8
    assert torch.equal(unpack(packed, quantizer.format.bits, 32, signed=signed), codes)


def test_fp4_bytes_are_those_of_torchs_two_per_byte_dtype():
    codes = torch.arange(16, dtype=torch.uint8)
    packed = pack(codes, 4).view(torch.float4_e2m1fn_x2).view(torch.uint8)
    assert packed.tolist() == [low + 16 * (low + 1) for low in range(0, 16, 2)]
    assert torch.equal(Float(2, 1).decode(unpack(packed, 4, 16, signed=False)), Float(2, 1).decode(codes))


def test_impossible_packings_are_refused():
    with pytest.raises(ValueError, match="codes of 5 bits are not packed: 1, 2, 3, 4, 6, 8 bits are"):
        pack(torch.zeros(8), 5)
    with pytest.raises(ValueError, match=r"3 bytes per row cannot hold 8 codes of 4 bits: pack\(codes, 4\) makes 4"):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, 8, signed=True)
