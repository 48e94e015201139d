"""Quantized twin of `nn.Embedding`: every row of the table is an output channel."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from qlightning.layers.layer import Twin
from qlightning.numerics.granularity import PerChannel, PerGroup
from qlightning.numerics.tensor_quantizer import TensorQuantizer


class EmbeddingTwin(Twin):
    """`nn.Embedding` with a quantized table: integer ids of any shape -> (*shape, features)."""

    placements = {"weight": (), "output": ("output",)}
    by_default = False
    weight: Tensor

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Embedding)
        if module.sparse:
            return "sparse=True gives sparse gradients, which a quantized table has not"
        if module.max_norm is not None:
            return "max_norm rewrites the table in forward"
        return None

    def weights(self) -> Mapping[str, Tensor]:
        return {"weight": self.weight}

    def output_features(self) -> int:
        return self.weight.shape[1]

    def forward(self, input: Tensor) -> Tensor:
        table = self.quantizer("weight")
        if table is None:
            y = _look_up(self, input, self.weight)
        elif _row_by_row(table):
            # Rows share no scales: to quantize the rows looked up is to look up quantized rows.
            y = table(_look_up(self, input, self.weight))
        else:
            y = _look_up(self, input, table(self.weight))
        output = self.quantizer("output")
        return y if output is None else output(y)


def _look_up(layer: nn.Module, ids: Tensor, table: Tensor) -> Tensor:
    assert isinstance(layer, nn.Embedding)
    return F.embedding(ids, table, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)


def _row_by_row(quantizer: TensorQuantizer) -> bool:
    rows = isinstance(quantizer.granularity, PerChannel | PerGroup)
    return rows and not quantizer.scale.static and quantizer.scale.ships_as is None
