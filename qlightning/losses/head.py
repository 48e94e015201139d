"""A causal language model of transformers and its head, whose logits nobody has to store.

Such a model says which of its modules is the head (`get_output_embeddings`); hidden states go in, logits come out. Here
the head is asked for something else while the model runs, or what goes in is kept and the logits are left alone. Either
works only where the head's logits are the model's: some models scale or cap them afterwards, which is an error here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlightning.losses.through_head import Head, cross_entropy_through_head


class Headed(NamedTuple):
    """A causal language model.

    Attributes:
        model: The model, whose output has `logits`.
        head: Its head, a module of it, quantized or not, whose weight may be that of the embedding.
    """

    model: nn.Module
    head: nn.Module


class Reached(Exception):
    """The head was reached, and nothing behind it is wanted."""


def headed(module: nn.Module) -> Headed | None:
    """The one causal language model that a module is or holds, or None."""
    found: dict[int, Headed] = {}
    for model in module.modules():
        if hasattr(type(model), "get_output_embeddings"):
            head: Any = model.get_output_embeddings()  # type: ignore[operator]
            if isinstance(head, nn.Module):
                found.setdefault(id(head), Headed(model, head))
    return next(iter(found.values())) if len(found) == 1 else None


def label_losses(known: Headed, labels: Tensor, *, tokens: int, **inputs: Any) -> Tensor:
    """Cross-entropy of each label in nats, float32 and of the labels' shape, without logits of more than `tokens`.

    The loss is computed in the place of the head, while the model runs: whoever shards or wraps the model sees a call
    of it like any other. Inside torch.compile, which cannot trace that, the model's body and then its head are called;
    `check_alone` says beforehand whether that is the same.

    Args:
        known: The model.
        labels: (B, T) of int64, one for each hidden state; a token of label -100 has loss 0.
        tokens: How many tokens' logits are in memory at once.
        inputs: What the model is called with, without labels.

    Raises:
        ValueError: The model does more with hidden states than its head does.
    """
    if torch.compiler.is_compiling():
        hidden = known.model.base_model(**inputs)[0]  # type: ignore[operator]
        return cross_entropy_through_head(hidden, known.head, labels, tokens=tokens)
    made: list[Tensor] = []

    def answer(plain: Head, hidden: Tensor) -> Tensor:
        made.append(cross_entropy_through_head(hidden, plain, labels, tokens=tokens)[..., None])
        return made[-1]

    with _answering(known.head, answer):
        logits = known.model(**inputs).logits
    if len(made) != 1 or logits is not made[0]:
        raise ValueError(_not_its_own(known.model))
    return made[0].squeeze(-1)


@contextmanager
def _answering(head: nn.Module, answer: Callable[[Head, Tensor], Tensor]) -> Iterator[None]:
    """Let the head answer with `answer(its own forward, hidden states)`."""
    before, plain = vars(head).get("forward"), head.forward

    def forward(hidden: Tensor) -> Tensor:
        return answer(plain, hidden)

    head.forward = forward
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


class Hidden:
    """Keeps what goes into the head of a model while it is entered, call by call.

    Args:
        known: The model.
        ends: Whether nothing behind the head is wanted: the call then ends with `Reached`.

    Attributes:
        states: The hidden states.
    """

    def __init__(self, known: Headed, *, ends: bool = False) -> None:
        self.known, self.ends = known, ends
        self.states: list[Tensor] = []
        self._logits: Any = None
        self._handles: list[Any] = []

    def __enter__(self) -> "Hidden":
        self.states = []
        self._handles = [
            self.known.head.register_forward_pre_hook(self._reach),
            self.known.head.register_forward_hook(self._leave),
            self.known.model.register_forward_hook(self._check),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._logits = [], None

    def _reach(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.states.append(args[0])
        if self.ends:
            raise Reached

    def _leave(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._logits = output

    def _check(self, module: nn.Module, args: Any, output: Any) -> None:
        if getattr(output, "logits", None) is not self._logits:
            raise ValueError(_not_its_own(module))
        self._logits = None


@torch.no_grad()
def check_alone(known: Headed) -> None:
    """Ask the model for one token. Raises ValueError where its logits are not those of its body and its head alone."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=next(known.head.parameters()).device)
    bodies: list[Tensor] = []
    body: Any = known.model.base_model
    handle = body.register_forward_hook(lambda module, args, output: bodies.append(output[0]))
    try:
        with Hidden(known) as hidden:
            known.model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    if len(hidden.states) != 1 or (bodies and not torch.equal(hidden.states[0], bodies[0])):
        raise ValueError(_not_its_own(known.model))


def _not_its_own(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} scales, caps or copies what goes into its head or comes out of it, so its logits "
        "cannot be had in pieces: leave chunked_loss out"
    )
