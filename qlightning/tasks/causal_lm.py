"""A language model that predicts the next token."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torchmetrics import MeanMetric

from qlightning.evaluation.held_out import HeldOut
from qlightning.evaluation.modes import eval_mode, quantizers_off
from qlightning.losses.head import Headed, check_alone, headed, label_losses
from qlightning.schedules.learning_rate import Constant, Schedule
from qlightning.tasks.architecture import from_data, plain_config, transformers_model
from qlightning.tasks.optimizer import adamw

_FREQUENCIES = ("inv_freq", "original_inv_freq")  # buffers of transformers' rotary embeddings


class CausalLM(LightningModule):
    """Trains a decoder of transformers on next-token cross-entropy, in nats per token.

    The model is built in `configure_model`, not here: there the datamodule is known, which tells the vocabulary size,
    and the Trainer's precision and strategy decide dtype and device of the new weights. What was built is written into
    the hyperparameters, so `CausalLM.load_from_checkpoint(path)` needs nothing but the file. Outside of a Trainer call
    `configure_model()` yourself.

    Batches are `{"input_ids": LongTensor (B, T)}`; the task shifts them. `"labels"` of the same shape, where there are
    any, tell as in transformers what is to be predicted in place of `input_ids`: -100 where nothing is. Logs
    `train_loss`, and over the whole held-out set `val_loss` (mean over tokens), `val_perplexity` and, where the
    datamodule has `bytes_per_token`, `val_nats_per_byte`.

    Args:
        model: Local folder or hub name to start from, or a config for random weights, for example
            `{"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 4}`. A config without `vocab_size` takes
            the datamodule's.
        lr: Peak learning rate of AdamW.
        betas: AdamW's two averaging factors.
        weight_decay: Decay of matrices; biases and norms have none.
        schedule: Learning rate over the run; constant when left out.
        chunked_loss: How many tokens' logits are in memory at once, for example 1024; those of all tokens when left
            out. Logits are the largest tensors of a step (tokens x vocabulary, several times); in pieces they are never
            whole, neither in the step nor kept for backward, at the price of one more product with the head's weight. A
            quantized head quantizes its weight for each piece, unless OncePerStep keeps it, and its input as it would,
            but for a scale per tensor, of which each piece has its own. Losses are the same up to how a matrix product
            of fewer rows is summed. The gradient of the head's weight is added up piece by piece, in that weight's
            dtype. Evaluation is in pieces too.
    """

    def __init__(
        self,
        model: str | dict[str, Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        schedule: Schedule | None = None,
        chunked_loss: int | None = None,
    ) -> None:
        super().__init__()
        if chunked_loss is not None and chunked_loss < 1:
            raise ValueError(f"chunked_loss={chunked_loss}: at least 1 token at once, for example chunked_loss=1024")
        self.schedule = Schedule.of(schedule or Constant())
        self.save_hyperparameters(
            {
                "model": model,
                "lr": lr,
                "betas": list(betas),
                "weight_decay": weight_decay,
                "schedule": self.schedule.plain(),
                "chunked_loss": chunked_loss,
            }
        )
        self.model: Any = None
        self.held_out = HeldOut(loss=MeanMetric(nan_strategy="disable"))

    def configure_model(self) -> None:
        """Build the model. Called again by every fit, validate, test and predict: the first call counts."""
        if self.model is not None:
            return
        from transformers import AutoModelForCausalLM

        source, vocabulary = self.hparams["model"], from_data(self, "vocab_size")
        if isinstance(source, Mapping) and "vocab_size" not in source and vocabulary is None:
            raise ValueError(
                "the vocabulary size is not known: train on a datamodule that has `vocab_size`, or write it down, "
                f"CausalLM({ {**source, 'vocab_size': 256}!r})"
            )
        model = transformers_model(AutoModelForCausalLM, source, known={"vocab_size": vocabulary})
        if vocabulary is not None and vocabulary > model.config.vocab_size:
            raise ValueError(
                f"the data has {vocabulary} tokens and the model {model.config.vocab_size}: use the model's own "
                f"tokenizer, or set vocab_size={vocabulary} in the model's config"
            )
        self.model = model
        self.hparams["model"] = plain_config(model)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """As torch's, but rotary frequencies stay float32, as whoever serves the model has them.

        `precision="bf16-true"` would train on rounded ones, which are in no file: positions would move on loading.
        """
        exact = [(m, name, m._buffers[name]) for m in self.modules() for name in _FREQUENCIES if name in m._buffers]
        super()._apply(fn, recurse)
        for module, name, before in exact:
            after = module._buffers[name]
            if before is None or after is None or before.dtype != torch.float32 or before.is_meta:
                continue
            if after.dtype in (torch.bfloat16, torch.float16):
                module._buffers[name] = before.to(after.device)
        return self

    def on_fit_start(self) -> None:
        """While nothing is compiled: where the loss is computed in pieces, is it that of the model's logits?"""
        if self.hparams["chunked_loss"] is not None:
            with eval_mode(self), quantizers_off(self):
                check_alone(self._headed())

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) token ids to (B, T, V) logits of the next token."""
        assert self.model is not None, "call configure_model() first"
        return self.model(input_ids=input_ids, use_cache=False).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._token_losses(batch).mean()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.held_out.update("val", loss=self._token_losses(batch))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.held_out.update("test", loss=self._token_losses(batch))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(batch["input_ids"])

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        options = self.hparams
        return adamw(
            self, self.schedule, lr=options["lr"], betas=options["betas"], weight_decay=options["weight_decay"]
        )

    def _token_losses(self, batch: dict[str, Tensor]) -> Tensor:
        """The losses of all tokens that count, (N,)."""
        ids, labels = batch["input_ids"], batch.get("labels")
        wanted = (ids if labels is None else labels)[:, 1:]
        tokens = self.hparams["chunked_loss"]
        if tokens is None:
            logits = self(ids)[:, :-1]
            losses = F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="none")
        else:
            after = F.pad(wanted, (0, 1), value=-100)
            losses = label_losses(self._headed(), after, tokens=tokens, input_ids=ids, use_cache=False)
            losses = losses[:, :-1].flatten()
        return losses if labels is None else losses[wanted.flatten() != -100]

    def _headed(self) -> Headed:
        assert self.model is not None, "call configure_model() first"
        known = headed(self.model)
        if known is None:
            raise ValueError(
                f"{type(self.model).__name__} does not say which module its head is: leave chunked_loss out"
            )
        return known

    def _report(self, stage: str) -> None:
        # Perplexity from the mean loss, not by torchmetrics' Perplexity: that takes the logarithm of a float32 softmax,
        # which is -inf for a token the model held for very unlikely, and one such token makes the number infinite.
        values = self.held_out.finish(stage)
        loss = values[f"{stage}_loss"]
        values[f"{stage}_perplexity"] = loss.exp()
        bytes_per_token = from_data(self, "bytes_per_token")
        if (
            stage == "val" and bytes_per_token is not None
        ):  # the validation split's; others have other lengths of tokens
            values["val_nats_per_byte"] = loss / bytes_per_token
        self.log_dict(values, prog_bar=True, sync_dist=True)
