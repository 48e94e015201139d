"""FSDP2's all-gather extension for one parameter, and the few private names that it takes.

FSDP2 asks a shard that has `fsdp_pre_all_gather` what to send, and `fsdp_post_all_gather` what the unsharded parameter
is. Both stand on the plain local tensor, so a checkpoint holds nothing of ours.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

Sent = tuple[Tensor, ...]


class Extension(ABC):
    """What one parameter sends and becomes.

    Args:
        managed: FSDP2's record of the parameter, sharded on dimension 0.
    """

    def __init__(self, managed: Any) -> None:
        self.managed = managed
        self.each = -(-len(self.parameter) // self.group.size())
        self._sizes: list[tuple[int, torch.dtype]] | None = None

    @abstractmethod
    def sent(self) -> Sent:
        """What this rank sends, of the same sizes on every rank."""

    @abstractmethod
    def whole(self, outs: Sent, dtype: torch.dtype) -> Tensor:
        """The unsharded parameter from what all ranks sent, one after the other along dimension 0."""

    def attach(self) -> None:
        """Stand on the shard; for the first forward, in which FSDP2 looks for it. Done again, it changes nothing."""
        local = self.local
        local.fsdp_pre_all_gather, local.fsdp_post_all_gather = self.pre, self.post  # type: ignore[attr-defined]

    @property
    def parameter(self) -> DTensor:
        """The sharded parameter; FSDP2 may have put another in its place since."""
        parameter: DTensor = self.managed.sharded_param
        return parameter

    @property
    def group(self) -> Any:
        """The ranks between which the parameter is cut; copies of it on others (HSDP) do not take part."""
        mesh = self.parameter.device_mesh
        return mesh.get_group(mesh.ndim - 1)

    @property
    def local(self) -> Tensor:
        """The shard itself, outside autograd; `to_local` gives another tensor."""
        return self.parameter._local_tensor

    def filled(self) -> Tensor:
        """The shard with as many rows as every rank sends."""
        local = self.local
        missing = self.each - len(local)
        return torch.cat([local, local.new_zeros(missing, *local.shape[1:])]) if missing else local

    def joined(self, filled: Tensor) -> Tensor:
        """The parameter from what all ranks sent of `filled`."""
        return filled.view(-1, *self.parameter.shape[1:])[: len(self.parameter)]

    # With one argument, FSDP2 lets uneven shards send tensors of any shape.
    def pre(self, mesh: Any) -> tuple[Sent, None]:
        """FSDP2 calls it before the all-gather."""
        sent = self.sent()
        sizes = [(tensor.numel(), tensor.dtype) for tensor in sent]
        if self._sizes not in (None, sizes):
            self.managed.all_gather_outputs = []  # it keeps what it receives into, of the sizes of the first time
        self._sizes = sizes
        return sent, None

    def post(self, outs: Sent, metadata: None, dtype: torch.dtype, *, out: Tensor | None = None) -> Any:
        """FSDP2 calls it after the all-gather: the first time for the parameter, and then to write into it."""
        if out is None:
            with torch.inference_mode(False):
                own = self.whole(outs, dtype).clone()
            return own, (own,)
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(out):
            out.copy_(self.whole(outs, dtype))
        return None


def managed_parameters(module: nn.Module) -> Iterator[Any]:
    """FSDP2's records of all parameters in a sharded module."""
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            for group in unit._get_fsdp_state()._fsdp_param_groups:
                yield from group.fsdp_params
