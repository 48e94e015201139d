"""What travels of a sharded weight: packed codes and scales of some of its rows, instead of the rows themselves.

Every rank quantizes the rows it holds on the grid that the whole weight would have, and `decode` of what all ranks sent
equals, bit for bit, the quantized whole. This holds where the scale is state, and where it is made of statistics that
are the same bits however a block is spread over ranks (`numerics/statistics.py`); `why_not` says of every other
quantizer why it does not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from qlightning.numerics.granularity import PerChannel, PerGroup
from qlightning.numerics.packing import WIDTHS, pack, packed_values, unpack
from qlightning.numerics.quantizer import Quantized, Quantizer
from qlightning.numerics.scales import Grid
from qlightning.numerics.statistics import Pool
from qlightning.numerics.tensor_quantizer import TensorQuantizer


class Rows(NamedTuple):
    """Which rows of a weight's matrix a rank holds.

    Attributes:
        start: The first.
        held: How many; the last ranks may have fewer than the others, or none.
        each: How many the ranks have that are full, and every rank sends.
        total: Rows of the whole matrix.
        ranks: Number of ranks.
    """

    start: int
    held: int
    each: int
    total: int
    ranks: int


def rows_of(total: int, rank: int, ranks: int, *, unit: int = 1) -> Rows:
    """The rows that FSDP2 gives a rank: chunks of one size, of which the last may be short or empty.

    >>> rows_of(10, 2, 4)
    Rows(start=6, held=3, each=3, total=10, ranks=4)

    Args:
        total: Rows of the matrix.
        rank: The rank.
        ranks: Their number.
        unit: Rows of the matrix to one of the parameter's first dimension, which is never cut in between.
    """
    each = -(-(total // unit) // ranks) * unit
    start = min(rank * each, total)
    return Rows(start, min(each, total - start), each, total, ranks)


def why_not(quantizer: TensorQuantizer, rows: Rows) -> str | None:
    """Why the codes of a weight cannot be made from shards with the bits of the whole; None if they can."""
    if not isinstance(quantizer, Quantizer):
        return f"a {type(quantizer).__name__} has no codes on one grid"
    scale, shared = quantizer.scale, quantizer.granularity.shared_rows
    if quantizer.transform is not None:
        return f"it is quantized in the basis {quantizer.transform!r}"
    if quantizer.format.bits > 8:
        return f"codes of {quantizer.format.bits} bits are no smaller than bfloat16"
    if shared is not None and rows.each % shared:
        return f"blocks of {shared} rows lie across the border of two shards of {rows.each} rows"
    if scale.static:
        return None if _lies_along(quantizer, rows) else f"the state of {scale!r} is not cut where its weight is"
    return None if scale.order_free else f"{scale!r} may have other bits on a shard than on the whole"


def _lies_along(quantizer: Quantizer, rows: Rows) -> bool:
    """Whether the shards of a static scale are those of the weight's rows, or it is one for the whole tensor."""
    shared = quantizer.granularity.shared_rows
    state = [*quantizer.scale.parameters(recurse=False), *quantizer.scale.buffers(recurse=False)]
    if shared is None:
        return all(tensor.numel() == 1 for tensor in state)
    pieces = rows.total // shared
    cut_alike = -(-pieces // rows.ranks) * shared == rows.each
    return cut_alike and all(tensor.numel() == 1 or tensor.shape[0] == pieces for tensor in state)


# --- the quantizer of some rows ---


@contextmanager
def on_rows(quantizer: Quantizer, rows: Rows, local: dict[str, Tensor], pool: Pool) -> Iterator[None]:
    """Inside, the quantizer's scale is that of some rows: its state, and for statistics of the whole its pools.

    Args:
        quantizer: The quantizer of the whole weight.
        rows: The rows.
        local: The parameters of its scale for those rows, by name (a scale of the whole tensor as it is).
        pool: Of the ranks, which then all have to ask for the grid.
    """
    shared = quantizer.granularity.shared_rows
    scale = quantizer.scale
    parameters, buffers = dict(scale._parameters), dict(scale._buffers)
    try:
        for name, tensor in local.items():
            scale._parameters[name] = tensor  # type: ignore[assignment]  # a piece, and no parameter of its own
        for name, buffer in buffers.items():
            if shared is not None and buffer is not None and buffer.shape[0] * shared == rows.total:
                scale._buffers[name] = buffer[rows.start // shared : (rows.start + rows.held) // shared]
        if shared is None:
            scale.pool = pool
        if scale.of_tensor:
            scale.tensor_pool = pool
        yield
    finally:
        scale.__dict__.pop("pool", None)
        scale.__dict__.pop("tensor_pool", None)
        scale._parameters.update(parameters)
        scale._buffers.update(buffers)


# --- what is sent ---


class Packing(NamedTuple):
    """How the codes of a format are laid out.

    Attributes:
        bits: Width of a code on the wire, the format's own or the next that can be packed.
        signed: Whether codes are two's complement.
    """

    bits: int
    signed: bool


def packing_of(quantizer: Quantizer) -> Packing:
    """The packing of a quantizer's codes."""
    codes = quantizer.format.encode(torch.tensor(quantizer.format.values()))
    return Packing(min(width for width in WIDTHS if width >= quantizer.format.bits), bool(codes.min() < 0))


def encode(quantizer: Quantizer, matrix: Tensor, rows: Rows, *, packing: Packing, grid: Grid) -> tuple[Tensor, ...]:
    """What a rank sends of its rows: packed codes (each, bytes), scales, zero points, and a tensor's scale (1,).

    Values that are NaN are not finite in what arrives either: then the scale is NaN that they share.

    Args:
        quantizer: The quantizer of the whole weight.
        matrix: The rows (held, columns).
        rows: Which they are.
        packing: Of its codes.
        grid: Of its rows.
    """
    codes, scale, zero, tensor_scale = quantizer.stored(matrix, grid)
    lost = quantizer.granularity.view(matrix).isnan().any(-1, keepdim=True)
    scale = torch.where(lost, torch.nan, scale.float()).to(scale.dtype)
    pieces = _pieces(quantizer, rows.each)
    grids = [_padded(tensor, pieces) for tensor in (scale, zero) if tensor is not None]
    return (_padded(pack(codes, packing.bits), rows.each), *grids, *(() if tensor_scale is None else (tensor_scale,)))


def _pieces(quantizer: Quantizer, rows: int) -> int:
    """Scales along dimension 0 for so many rows."""
    shared = quantizer.granularity.shared_rows
    return 1 if shared is None else rows // shared


def _padded(tensor: Tensor, length: int) -> Tensor:
    missing = length - len(tensor)
    whole = tensor if not missing else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
    return whole.contiguous()


def arrived(quantizer: Quantizer, sent: tuple[Tensor, ...], shape: tuple[int, int], *, packing: Packing) -> Quantized:
    """The whole matrix as it is stored, from what all ranks sent, one after the other along dimension 0.

    Args:
        quantizer: The quantizer of the whole weight.
        sent: As `encode` returns it.
        shape: Of the whole matrix.
        packing: Of its codes.
    """
    rows, columns = shape
    codes = unpack(sent[0][:rows], packing.bits, columns, signed=packing.signed).to(quantizer.format.code_dtype)
    if quantizer.granularity.shared_rows is None:  # every rank sent the same, or NaN
        scale, *rest = (tensor.float().amax(0, keepdim=True).to(tensor.dtype) for tensor in sent[1:])
    else:
        scale, *rest = (tensor[: _pieces(quantizer, rows)] for tensor in sent[1:])
    tensor_scale = rest.pop()[:1] if quantizer.scale.of_tensor else None
    zero = rest.pop() if rest else None
    return Quantized(codes, scale, zero, tensor_scale)


def decoded(
    quantizer: Quantizer, sent: tuple[Tensor, ...], shape: tuple[int, int], *, packing: Packing, dtype: torch.dtype
) -> Tensor:
    """The values of what `arrived`, in the dtype of the weight; of 4-bit integers in one pass where a kernel fits."""
    along_rows = isinstance(quantizer.granularity, PerChannel | PerGroup) and not quantizer.scale.of_tensor
    if packing.bits == 4 and along_rows and quantizer.format.integers and shape[1] % 2 == 0:
        packed, scale, zero, *_ = (*(tensor[: shape[0]] for tensor in sent), None)
        assert packed is not None
        assert scale is not None
        values = packed_values(packed, scale, zero, dtype=dtype, signed=packing.signed)
        if values is not None:
            return values
    return quantizer.dequantize(arrived(quantizer, sent, shape, packing=packing), dtype)
