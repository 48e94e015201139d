"""Text that a language model wrote itself: data for its quantized copy where the original data is out of reach.

LLM-QAT (arXiv 2305.17888): a text begins with one token of the vocabulary, goes on greedily for a few tokens, so that
it starts with what the model is sure of, and is sampled from there on.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from qlightning.checkpoints import read_checkpoint
from qlightning.data.cache import cached, fingerprint
from qlightning.data.loader import seeded
from qlightning.data.progress import progress
from qlightning.data.splits import TEST, TRAIN, VALIDATION, SplitData, hold_out
from qlightning.data.text import TextSplits, Windows


class GeneratedText(SplitData):
    """Texts by a float model, as batches `{"input_ids": LongTensor (B, T)}`; written once, then read from the cache.

    What is written is a function of the model, the seed and the options below (and, in the last bits of the model's
    arithmetic, of device and library versions). Texts follow one another in one stream that is cut into windows; where
    no token ends a text, each window is a text.

    Args:
        model: A checkpoint of `CausalLM`, a local folder, or a hub name of a transformers model.
        sequences: How many texts; None: one for each start token and each number in `greedy`.
        sequence_length: Tokens of a window, T, and of the longest text.
        greedy: Length up to which a text is the most likely one, its start token included; each start token is used
            with each of these numbers. 1 samples from the second token on.
        start_tokens: Numbers of the tokens that texts begin with; None: the whole vocabulary.
        temperature: What logits are divided by where tokens are sampled.
        end: Number of the token that ends a text; None: that of the tokenizer of `real`, or none without it.
        real: Text whose validation and test splits are those of this data too, in the tokens of the model; None: they
            are held out of what was generated.
        held_out: Share of each of these two splits where there is no `real`.
        batch_size: Windows in a batch, per process.
        seed: Decides what is written, and with the epoch the order of the windows.
        num_workers: Processes that read ahead. The windows lie in memory, where 0 is the fastest.
        texts_at_once: Texts that are written side by side; part of what decides the random numbers of each.
        device: Where the model writes; None: the GPU, if there is one.

    Raises:
        ValueError: A number out of range, a model that is not there, too little text for one window.
    """

    def __init__(
        self,
        model: str,
        *,
        sequences: int | None = None,
        sequence_length: int = 256,
        greedy: Sequence[int] = (3, 4, 5),
        start_tokens: Sequence[int] | None = None,
        temperature: float = 1.0,
        end: int | None = None,
        real: TextSplits | None = None,
        held_out: float = 0.05,
        batch_size: int = 16,
        seed: int = 0,
        num_workers: int = 0,
        texts_at_once: int = 64,
        device: str | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        for name, value in (("sequences", sequences), ("texts_at_once", texts_at_once)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} writes nothing; write for example {name}=64")
        if sequence_length < 2:
            raise ValueError(f"sequence_length={sequence_length}: a start token and one more at least, for example 256")
        if not greedy or min(greedy) < 1:
            raise ValueError(
                f"greedy={greedy!r}: lengths from 1 (sampled from the start), for example greedy=(3, 4, 5)"
            )
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: above 0, for example temperature=1.0")
        self.model, self.sequences, self.sequence_length = model, sequences, sequence_length
        self.greedy, self.start_tokens = tuple(greedy), None if start_tokens is None else tuple(start_tokens)
        self.temperature, self.real, self.held_out = temperature, real, held_out
        self.texts_at_once, self.device = texts_at_once, device
        self._end = end

    def prepare_data(self) -> None:
        """Writes the texts in one process, before the others read them."""
        if self.real is not None:
            self.real.prepare_data()
        _ = self._tokens

    def read(self, split: str) -> Dataset[Any]:
        """The windows of one split."""
        if self.real is not None and split != TRAIN:
            return self.real.dataset(split)
        tokens, length = self._tokens, self.sequence_length
        count = len(tokens) // length
        if not count:
            raise ValueError(
                f"{len(tokens)} tokens were generated, fewer than sequence_length={length}; write more sequences"
            )
        if self.real is not None:
            return Windows(tokens, length)
        chosen = hold_out(count, self.held_out, (VALIDATION, TEST))[split]
        return Windows(tokens[: count * length].view(count, length)[chosen].flatten(), length)

    @property
    def end(self) -> int | None:
        """Number of the token that ends a text, None where texts end at their full length."""
        return self.real.tokenizer.end if self._end is None and self.real is not None else self._end

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of UTF-8 per token of the real validation split, where there is one."""
        return None if self.real is None else self.real.bytes_per_token

    @cached_property
    def vocab_size(self) -> int:
        """Number of token numbers of the model."""
        size = int(_config(self.model).vocab_size)
        if self.real is not None and self.real.vocab_size > size:
            raise ValueError(
                f"real has {self.real.vocab_size} tokens and the model {size}: give it the model's own tokenizer, for "
                f"example real=TextData(path, tokenizer={self.model!r})"
            )
        return size

    @cached_property
    def _tokens(self) -> Tensor:
        starts, greedy = self._plan()
        options = (self.seed, self.sequence_length, self.temperature, self.end, self.texts_at_once)
        name = fingerprint("first form", _identity(self.model), repr(options), repr((starts.tolist(), greedy.tolist())))

        def write(path: Path) -> None:
            stream = self._write(starts, greedy)
            with open(path, "wb") as file:
                np.save(file, stream)

        return torch.from_numpy(np.load(cached(f"generated-{name}.npy", write)))

    def _plan(self) -> tuple[Tensor, Tensor]:
        """Start token and greedy length of each text."""
        tokens = range(self.vocab_size) if self.start_tokens is None else self.start_tokens
        if not tokens or min(tokens) < 0 or max(tokens) >= self.vocab_size:
            raise ValueError(f"start_tokens: at least one, each from 0 to {self.vocab_size - 1}, as the model has them")
        pairs = torch.tensor(list(product(tokens, self.greedy)))
        order = torch.randperm(len(pairs), generator=seeded("starts", self.seed))
        count = len(pairs) if self.sequences is None else self.sequences
        starts, greedy = pairs[order.repeat(-(-count // len(pairs)))[:count]].unbind(1)
        return starts, greedy

    def _write(self, starts: Tensor, greedy: Tensor) -> np.ndarray:
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = _load(self.model).to(device).eval()
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and self.sequence_length > limit:
            raise ValueError(f"the model has {limit} positions: write sequence_length={limit} or less")
        texts: list[Tensor] = []
        for first in progress(range(0, len(starts), self.texts_at_once), "Generating text"):
            part = slice(first, first + self.texts_at_once)
            generator = torch.Generator(device).manual_seed(seeded("texts", self.seed, first).initial_seed())
            texts += write_texts(
                model,
                starts[part].to(device),
                greedy[part].to(device),
                length=self.sequence_length,
                temperature=self.temperature,
                end=self.end,
                generator=generator,
            )
        return torch.cat(texts).numpy().astype(np.int32)


@torch.no_grad()
def write_texts(
    model: Any,
    starts: Tensor,
    greedy: Tensor,
    *,
    length: int,
    temperature: float = 1.0,
    end: int | None = None,
    generator: torch.Generator,
) -> list[Tensor]:
    """Texts by a language model of transformers, on its device.

    Args:
        model: Takes token numbers (N, T) and gives logits.
        starts: First token of each text, shape (N,).
        greedy: Length up to which each text takes the most likely token, shape (N,).
        length: Tokens of a text at most.
        temperature: What logits are divided by where tokens are sampled.
        end: Token behind which a text is over; None: each has full length.
        generator: Random numbers, on the model's device.

    Returns:
        N tensors of 1 to `length` token numbers each, on the CPU; a text that ended holds its end token.
    """
    tokens, cache = starts[:, None], None
    ended = starts == end if end is not None else torch.zeros_like(starts, dtype=torch.bool)
    lengths = torch.where(ended, 1, length)
    while tokens.shape[1] < length and not bool(ended.all()):
        output = model(
            input_ids=tokens if cache is None else tokens[:, -1:],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        logits = output.logits[:, -1].float()
        sampled = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        token = torch.where(greedy > tokens.shape[1], logits.argmax(-1), sampled)
        tokens = torch.cat([tokens, token[:, None]], 1)
        if end is not None:
            lengths = torch.where(~ended & (token == end), tokens.shape[1], lengths)
            ended |= token == end
    return [text[:size] for text, size in zip(tokens.cpu(), lengths.tolist(), strict=True)]


def _load(source: str) -> Any:
    from transformers import AutoModelForCausalLM

    from qlightning.layers.swap import convert_like

    path = _found(source)
    if not path.is_file():
        return AutoModelForCausalLM.from_pretrained(source if not path.exists() else str(path), dtype="auto")
    state = _checkpoint(path)["state_dict"]
    state = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    model = AutoModelForCausalLM.from_config(_config(source))
    convert_like(model, state)  # a quantized checkpoint writes as it was trained
    model.load_state_dict(state)
    return model


def _config(source: str) -> Any:
    from transformers import AutoConfig

    path = _found(source)
    if path.is_file():
        return AutoConfig.for_model(**_checkpoint(path)["hyper_parameters"]["model"])
    return AutoConfig.from_pretrained(source if not path.exists() else str(path))


def _checkpoint(path: Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint.get("hyper_parameters", {}).get("model"), dict):
        raise ValueError(
            f"model={str(path)!r} is no checkpoint of qlightning.tasks.CausalLM: save the model with "
            "model.save_pretrained('folder') and write model='folder'"
        )
    return checkpoint


def _found(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1 or path.suffix == ".ckpt"):
        raise ValueError(f"model={source!r} does not exist; write a checkpoint, a folder, or a hub name as 'user/name'")
    return path


def _identity(source: str) -> str:
    """A string that changes with the model's weights."""
    path = _found(source)
    if not path.exists():
        return f"{source} {_config(source)._commit_hash}"
    files = (
        [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors", ".bin"))
    )
    digests = []
    for file in files:
        with open(file, "rb") as stream:
            digests.append((file.name if path.is_dir() else "", hashlib.file_digest(stream, "sha256").hexdigest()))
    return repr(digests)
