"""ApiQ: finetuning of 2-bit quantized large language models, its initialisation."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlightning.capture import Call, Site, device_of, fetched
from qlightning.solvers.clipping import SigmoidClip
from qlightning.solvers.learning import standing_in
from qlightning.solvers.share import Share
from qlightning.solvers.solver import BlockSolver, BlockTask, main_output
from qlightning.solvers.units import Before, seen_by, unit_of


class ApiQ(BlockSolver):
    """Liao et al., EMNLP 2024, arXiv 2402.05147: learn clipping and LoRA together so that activations are kept.

    Weights, biases and norms stay as they are, bit for bit; only the ranges of the weights' grids and the LoRA layers
    that PEFT has put around them (outside the quantizer) learn, block after block. Without LoRA layers, ranges alone
    learn. The result is where fine-tuning of the adapters starts, or a quantized model with adapters.

    The paper writes Q(W) into the weight after a block. Here the weight stays: its quantizer gives Q(W). The range
    always contains zero (so zero points are codes), and batches are the caller's, where the paper has single sequences.

    Args:
        level: "block": match the block's output (ApiQ-bw); "layer": match each layer's, one after another (ApiQ-lw).
        epochs: Passes over the data for each block or layer.
        adapter_lr: Learning rate of LoRA.
        clip_lr: Learning rate of the ranges' logits.
        weight_decay: AdamW's, for both.
        target: What a block is trained towards: the float block on the float model's activations ("fp"), or this plus
            the float block on the quantized model's ("both", the released code's augmented loss). For level "block".
        batches: Number of batches of calibration data; the paper has 128 sequences of 2048 tokens.
        seed: Of the order of batches and of the forward passes' random numbers.
    """

    def __init__(
        self,
        *,
        level: Literal["block", "layer"] = "block",
        epochs: int = 20,
        adapter_lr: float = 5e-4,
        clip_lr: float = 5e-3,
        weight_decay: float = 0.1,
        target: Literal["fp", "both"] = "fp",
        batches: int = 16,
        seed: int = 0,
    ) -> None:
        if level not in ("block", "layer") or target not in ("fp", "both") or (level == "layer" and target != "fp"):
            raise ValueError(
                f"ApiQ(level={level!r}, target={target!r}): write level='block' with target='fp' or 'both', or "
                "level='layer' with target='fp'"
            )
        if epochs < 0 or min(adapter_lr, clip_lr, weight_decay) < 0:
            raise ValueError(
                f"ApiQ(epochs={epochs}, adapter_lr={adapter_lr}, clip_lr={clip_lr}, weight_decay={weight_decay}): "
                "none is negative, for example ApiQ(epochs=20, adapter_lr=5e-4, clip_lr=5e-3, weight_decay=0.1)"
            )
        super().__init__(targets=("fp", "q") if target == "both" else ("fp",), batches=batches, seed=seed)
        self.level, self.epochs, self.target = level, epochs, target
        self.adapter_lr, self.clip_lr, self.weight_decay = adapter_lr, clip_lr, weight_decay

    def solve(self, task: BlockTask, *, generator: torch.Generator) -> None:
        if self.level == "layer":
            self._solve_layers(task, generator)
            return
        sites = [site for group in task.groups for site in group]
        with clipped(sites):
            targets = [task.targets[name] for name in self.targets]
            self._train(task.block, sites, task.inputs["q"], targets, generator, task.share)

    def _solve_layers(self, task: BlockTask, generator: torch.Generator) -> None:
        """Every layer, with its LoRA, towards what it returns in the float block; layers before it are quantized."""
        before = Before(task.block)
        for group in task.groups:
            for site in group:
                name = unit_of(task.block, site)
                with before():
                    targets = [output for _, output in seen_by(task.block, name, task.inputs["fp"])]
                inputs = [call for call, _ in seen_by(task.block, name, task.inputs["q"])]
                with clipped([site]):
                    self._train(task.block.get_submodule(name), [site], inputs, [targets], generator, task.share)
                site.quantizer.enabled = True

    def _train(
        self,
        unit: nn.Module,
        sites: Sequence[Site],
        inputs: Sequence[Call],
        targets: Sequence[Sequence[Tensor]],
        generator: torch.Generator,
        share: Share,
    ) -> None:
        adapters = [p for name, p in unit.named_parameters() if "lora_" in name]
        clips = [p for site in sites for p in site.quantizer.learned()]
        groups = [{"params": adapters, "lr": self.adapter_lr}, {"params": clips, "lr": self.clip_lr}]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=self.weight_decay)
        learned, device = [*adapters, *clips], device_of(unit)
        for parameter in learned:
            parameter.requires_grad_(True)

        def take(i: int) -> Sequence[Tensor | None]:
            args, kwargs = fetched(inputs[i], device)
            output = main_output(unit(*args, **kwargs)).float()
            losses = (F.mse_loss(output, wanted[i].to(device).float()) for wanted in targets)
            return torch.autograd.grad(sum(losses, output.new_zeros(())), learned, allow_unused=True)

        for _ in range(self.epochs):
            for number in torch.randperm(share.count(len(inputs)), generator=generator).tolist():
                for parameter, gradient in zip(learned, share.gradients(number, take, learned), strict=True):
                    parameter.grad = gradient
                optimizer.step()
        for parameter in learned:
            parameter.requires_grad_(False)
            parameter.grad = None


@contextmanager
def clipped(sites: Sequence[Site]) -> Iterator[None]:
    """The sites' quantizers act, on ranges that learn; afterwards their own scales hold what the ranges have become."""
    with ExitStack() as stack:
        for site in sites:
            blocks = site.quantizer.granularity.view(site.weight)
            stack.enter_context(standing_in(site, SigmoidClip().fit(blocks, site.quantizer.format)))
        yield
