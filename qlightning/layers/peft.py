"""PEFT's LoRA layer around a converted linear layer, whose own branch has gone inside the quantizer of that layer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlightning.adapters.from_peft import FromPEFT, lora_linear
from qlightning.layers.layer import Twin, plain_class

# PEFT's own arguments of a forward call, which say something of adapters that are not here.
_OF_VARIANTS = ("alora_offsets",)


class LoraTwin(Twin):
    """`peft.tuners.lora.Linear` around a layer whose quantizer sees W + scaling * B A: x (..., in) -> (..., out).

    Active adapters, `disable_adapter`, `merge_adapter` and `merge_and_unload` do what PEFT says; a merged layer
    computes what it computed in training, bit for bit.
    """

    placements = {}
    base_layer: Twin

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        linear = lora_linear()
        return linear is not None and isinstance(module, linear) and type(module).forward is linear.forward

    @classmethod
    def surrounds(cls, module: nn.Module) -> bool:
        base = module.base_layer
        return isinstance(base, Twin) and isinstance(base._modules.get("adapter"), FromPEFT)

    def weights(self) -> Mapping[str, Tensor]:
        return {}

    def on_converted(self) -> None:
        """Join with the layer inside; its scale is that of what its quantizer sees now."""
        self._adapter().join(self)
        base, quantizer = self.base_layer, self.base_layer.quantizer("weight")
        if quantizer is not None and base.inside() is not None and not base.weights()["weight"].is_meta:
            quantizer.initialize(base.effective("weight"))

    def __setstate__(self, state: Any) -> None:
        """A copy or an unpickled layer joins with its own layer inside."""
        super().__setstate__(state)
        self._adapter().join(self)

    def on_restored(self) -> None:
        if isinstance(adapter := self.base_layer._modules.get("adapter"), FromPEFT):
            adapter.join(None)

    def _adapter(self) -> FromPEFT:
        adapter = self.base_layer._modules["adapter"]
        assert isinstance(adapter, FromPEFT)
        return adapter

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(
                "adapter_names chooses adapters row by row, but inside a quantizer they are part of one weight for the "
                "whole batch: choose them for the model, model.set_adapter('name')"
            )
        for name in _OF_VARIANTS:
            kwargs.pop(name, None)
        plain: Any = self
        if plain.disable_adapters and plain.merged:
            plain.unmerge()
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's. A safe merge rounds just as an unsafe one does, since that is what the quantizer saw."""
        weight: Any = self.base_layer.weight
        done: Any = self.merged_adapters
        before, merged = weight.detach().clone() if safe_merge else None, len(done)
        plain: Any = plain_class(self)
        plain.merge(self, safe_merge=False, adapter_names=adapter_names)
        if before is not None and not bool(torch.isfinite(weight).all()):
            weight.data = before
            broken = ", ".join(done[merged:])
            del done[merged:]
            raise ValueError(f"NaN or infinity in the merged weight: one of {broken} is broken, and nothing was merged")
