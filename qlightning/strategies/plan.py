"""What travels of every parameter of a converted module, decided while its weights are whole, and the table of it."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from qlightning.adapters.adapter import Adapter
from qlightning.layers.coverage import public_name
from qlightning.layers.layer import Twin
from qlightning.numerics.packing import WIDTHS
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.spec import unparse
from qlightning.numerics.tensor_quantizer import TensorQuantizer
from qlightning.strategies.codes import packing_of, rows_of, why_not
from qlightning.strategies.extension import managed_parameters
from qlightning.strategies.gather import CodeGather, KeptGather


class Route(NamedTuple):
    """How one weight travels.

    Attributes:
        name: What a user calls it.
        quantizer: What quantizes it.
        layers: Whose forward runs on it, and under which name each has it.
        unit: Rows of its matrix to one of its first dimension.
        columns: Of its matrix.
        numel: Its elements.
        bytes: What is sent of it.
        reason: Why the weight itself is sent and not its codes, or None.
        kept_bits: Of the codes that the weight is kept as, one to a byte, and that are sent; or None.
    """

    name: str
    quantizer: TensorQuantizer
    layers: list[tuple[Twin, str]]
    unit: int
    columns: int
    numel: int
    bytes: int
    reason: str | None
    kept_bits: int | None = None


class Plan:
    """The routes of a module's weights.

    Args:
        module: A converted module, not sharded yet.
        ranks: Between how many processes each weight will be cut.

    Attributes:
        routes: Of its quantized weights.
        rest: Elements and bytes of all other parameters.
    """

    def __init__(self, module: nn.Module, *, ranks: int) -> None:
        self.ranks = ranks
        self.routes = [_route(name, layers, ranks) for name, layers in _quantized(module)]
        parameters = {id(p): p for p in module.parameters()}
        for route in self.routes:
            parameters.pop(id(getattr(*route.layers[0])), None)
            for scale in route.quantizer.parameters() if route.reason is None else ():
                parameters.pop(id(scale), None)
        self.rest = sum(p.numel() for p in parameters.values()), sum(p.nbytes for p in parameters.values())

    def attach(self, module: nn.Module) -> list[CodeGather | KeptGather]:
        """Let the weights of the module, sharded by now, travel so."""
        managed = {id(record.sharded_param): record for record in managed_parameters(module)}
        gathers: list[CodeGather | KeptGather] = []
        for route in self.routes if self.ranks > 1 else ():
            layer, prefix = route.layers[0]
            parameter = getattr(layer, prefix)
            if route.kept_bits is not None:
                gathers.append(KeptGather(managed[id(parameter)], route.kept_bits))
            if route.reason is not None or not isinstance(route.quantizer, Quantizer):
                continue
            mesh = parameter.device_mesh
            rank = mesh.get_local_rank(mesh.ndim - 1)
            rows = rows_of(route.numel // route.columns, rank, self.ranks, unit=route.unit)
            own = route.quantizer.scale.named_parameters(recurse=False)
            gather = CodeGather(
                managed[id(parameter)],
                route.quantizer,
                scales={name: managed[id(scale)] for name, scale in own},
                rows=rows,
                columns=route.columns,
                layers=[layer for layer, _ in route.layers],
            )
            gathers.append(gather)
        return gathers

    def table(self) -> str:
        """What users see: what travels as codes, what does not and why, and bytes against bfloat16."""
        lines: dict[tuple[str, str], list[Route]] = {}
        for route in self.routes:
            shown = unparse(route.quantizer) or repr(route.quantizer)
            lines.setdefault((shown, route.reason or ""), []).append(route)
        cells = [("weights", "quantizer", "bytes", "sent", "names")]
        for (shown, reason), routes in lines.items():
            numel, size = sum(r.numel for r in routes), sum(r.bytes for r in routes)
            sent = "codes, as it is kept" if routes[0].kept_bits else f"in full: {reason}" if reason else "codes"
            names = routes[0].name if len(routes) == 1 else f"{routes[0].name} .. {routes[-1].name}"
            cells.append((f"{numel:,}", shown, _against(size, numel), sent, names))
        if self.rest[0]:
            numel, size = self.rest
            cells.append((f"{numel:,}", "", _against(size, numel), "in full", "all other parameters"))
        widths = [max(len(row[i]) for row in cells) for i in range(4)]
        text = "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in cells
        )
        numel = self.rest[0] + sum(route.numel for route in self.routes)
        size = self.rest[1] + sum(route.bytes for route in self.routes)
        return f"{text}\nan all-gather of everything moves {size:,} bytes where quantizers act: {_against(size, numel)}"


def _against(size: int, numel: int) -> str:
    return f"{size / (2 * max(numel, 1)):.3f}x bf16"


def _quantized(module: nn.Module) -> Iterator[tuple[str, list[tuple[Twin, str]]]]:
    """(name, the layers that have it with their names for it) of every quantized weight."""
    found: dict[int, tuple[str, list[tuple[Twin, str]]]] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, Twin):
            for prefix in layer.weights():
                if (quantizer := layer.quantizer(prefix)) is not None:
                    own = f"{public_name(name)}.{prefix}".lstrip(".")
                    found.setdefault(id(quantizer), (own, []))[1].append((layer, prefix))
    yield from found.values()


def _route(name: str, layers: list[tuple[Twin, str]], ranks: int) -> Route:
    layer, prefix = layers[0]
    matrix, parameter, quantizer = layer.weights()[prefix], getattr(layer, prefix), layer.quantizer(prefix)
    assert quantizer is not None
    unit = max(1, matrix.shape[0] // parameter.shape[0])
    rows = rows_of(matrix.shape[0], 0, ranks, unit=unit)
    reason = _reason(layers, matrix, parameter) or why_not(quantizer, rows)
    size = parameter.nbytes
    if (kept_bits := _kept_bits(layer, parameter)) is not None:
        size = len(parameter) * -(-parameter[:1].numel() * kept_bits // 8)
    if reason is None and isinstance(quantizer, Quantizer):
        stored = quantizer.stored_bytes(tuple(matrix.shape), parameter.dtype)
        grids = stored + -matrix.numel() * quantizer.format.bits // 8
        size = rows.total * -(-matrix.shape[1] * packing_of(quantizer).bits // 8) + grids
    return Route(name, quantizer, layers, unit, matrix.shape[1], parameter.numel(), size, reason, kept_bits)


def _kept_bits(layer: Twin, parameter: nn.Parameter) -> int | None:
    """Bits of the codes as which an adapter keeps its frozen weight, if they take less room packed."""
    adapter = layer._modules.get("adapter")
    bits = adapter.kept_bits() if isinstance(adapter, Adapter) and parameter.dtype == torch.int8 else None
    return next((width for width in WIDTHS if bits is not None and bits <= width < 8), None)


def _reason(layers: Sequence[tuple[Twin, str]], matrix: torch.Tensor, parameter: nn.Parameter) -> str | None:
    """Why the layers need the weight itself, or None."""
    if not parameter.is_floating_point():
        return f"it is kept as {parameter.dtype} already"
    if not (matrix is parameter or matrix._base is parameter) or not matrix.is_contiguous():
        return "its output channels do not lie along dimension 0, on which FSDP2 cuts it"
    for layer, _ in layers:
        adapter = layer._modules.get("adapter")
        if isinstance(adapter, Adapter) and adapter.inside() is not None:
            return "its quantizer sees it with an adapter inside, whose product may round otherwise on some rows"
        backward = layer.backward_part()
        if backward is not None and not backward.same("weight_dgrad"):
            return "its backward pass takes the weight itself (weight_dgrad is not 'same')"
    scales = layers[0][0].quantizer(layers[0][1])
    assert scales is not None
    if not parameter.requires_grad and any(p.requires_grad for p in scales.learned()):
        return "it is frozen, and its scale learns from the gradient that it would have"
    return None
