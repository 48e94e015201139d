"""Packing: small codes into bytes and back.

Codes are laid out densely along the last dimension, least significant bit first, across byte borders: value i of a row
occupies bits i * bits .. (i + 1) * bits of the row's bit string. For 1, 2, 4 and 8 bits this is the usual "first value
in the low bits" order; for 3 and 6 bits no bit is wasted either.
"""

import torch
from torch import Tensor

from qlightning.numerics.kernels.switch import kernels_act

WIDTHS = (1, 2, 3, 4, 6, 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes to bytes.

    >>> pack(torch.tensor([1, 2, 3, -1], dtype=torch.int8), 4).tolist()
    [33, 243]

    Args:
        codes: Integers (..., n); signed codes are stored in two's complement.
        bits: 1, 2, 3, 4, 6 or 8.

    Returns:
        uint8 of shape (..., ceil(n * bits / 8)).
    """
    _check(bits)
    if 8 % bits == 0:
        return _pack_whole(codes, bits)
    shifts = torch.arange(bits, device=codes.device)
    stream = ((codes.to(torch.int32)[..., None] >> shifts) & 1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8))
    octets = stream.unflatten(-1, (-1, 8)) << torch.arange(8, device=codes.device)
    return octets.sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int, *, signed: bool) -> Tensor:
    """Bytes to codes: the inverse of `pack`.

    Args:
        packed: uint8 (..., bytes).
        bits: The width they were packed with.
        count: Codes per row (the last byte may be padding).
        signed: Whether the codes are two's complement.

    Returns:
        int8 (signed) or uint8 of shape (..., count).
    """
    _check(bits)
    if packed.shape[-1] != -(-count * bits // 8):
        raise ValueError(
            f"{packed.shape[-1]} bytes per row cannot hold {count} codes of {bits} bits: "
            f"pack(codes, {bits}) makes {-(-count * bits // 8)}"
        )
    if 8 % bits == 0:
        codes = _unpack_whole(packed, bits)[..., :count]
        return ((codes ^ (1 << (bits - 1))) - (1 << (bits - 1))).view(torch.int8) if signed else codes
    stream = ((packed.to(torch.int32)[..., None] >> torch.arange(8, device=packed.device)) & 1).flatten(-2)
    stream = stream[..., : count * bits].unflatten(-1, (count, bits))
    codes = (stream << torch.arange(bits, device=packed.device)).sum(-1)
    if not signed:
        return codes.to(torch.uint8)
    return (codes - ((codes >> (bits - 1)) << bits)).to(torch.int8)


def packed_values(
    packed: Tensor, scale: Tensor, zero: Tensor | None, *, dtype: torch.dtype, signed: bool
) -> Tensor | None:
    """(code - zero) * scale of packed 4-bit codes, in one pass on a GPU; None where no kernel fits.

    Args:
        packed: uint8 (rows, columns / 2).
        scale: (rows, groups, 1) or (rows, 1).
        zero: Of the scale's shape.
        dtype: Of the values.
        signed: Whether the codes are two's complement.
    """
    columns, groups = 2 * packed.shape[1], scale.numel() // max(1, scale.shape[0])
    if not kernels_act(packed) or not packed.numel() or columns % groups or columns // groups % 2:
        return None
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    zero = None if zero is None else zero.float().contiguous()
    return unpacked_int4(packed.contiguous(), scale.float().contiguous(), zero, dtype, signed)


@torch.library.custom_op("qlightning::unpacked_int4", mutates_args=())
def unpacked_int4(packed: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype, signed: bool) -> Tensor:
    """As an operator that torch.compile does not look into: see `kernels.unpack.unpack_int4`."""
    from qlightning.numerics.kernels.unpack import unpack_int4

    return unpack_int4(packed, scale, zero, dtype=dtype, signed=signed)


@unpacked_int4.register_fake
def _(packed: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype, signed: bool) -> Tensor:
    return packed.new_empty((packed.shape[0], 2 * packed.shape[1]), dtype=dtype)


def _pack_whole(codes: Tensor, bits: int) -> Tensor:
    """`pack` where no code crosses a byte border, without an integer per bit."""
    each = 8 // bits
    codes = torch.nn.functional.pad(codes.to(torch.int8).view(torch.uint8), (0, -codes.shape[-1] % each))
    first, *others = (codes & (2**bits - 1)).unflatten(-1, (codes.shape[-1] // each, each)).unbind(-1)
    for place, code in enumerate(others, 1):
        first = first | (code << (place * bits))
    return first


def _unpack_whole(packed: Tensor, bits: int) -> Tensor:
    places = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(places, -1).flatten(-2)


def _check(bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"codes of {bits} bits are not packed: {', '.join(map(str, WIDTHS))} bits are")
