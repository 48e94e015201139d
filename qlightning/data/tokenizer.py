"""Text to numbers: bytes, a byte-pair encoding trained on the spot, or any tokenizer of the transformers library."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qlightning.data.cache import cached, fingerprint
from qlightning.data.progress import progress

_END = "<|endoftext|>"
_AT_ONCE = 32  # documents per call: enough to keep the cores busy, few enough for a smooth progress bar


class Tokenizer(ABC):
    """Turns documents into one stream of token numbers.

    Attributes:
        vocab_size: Number of token numbers.
        end: Number of the end-of-text token, None where there is none.
    """

    vocab_size: int
    end: int | None

    @abstractmethod
    def encode(self, documents: Sequence[str], separator: str | None) -> Tensor:
        """The documents one after the other, shape (tokens,), an integer dtype.

        Args:
            documents: Texts.
            separator: Text between two documents; None puts the end-of-text token after each.
        """

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some token numbers."""


class Bytes(Tokenizer):
    """The 256 values of a byte of UTF-8.

    >>> Bytes().encode(["ab", "c"], "+").tolist()
    [97, 98, 43, 99]
    """

    vocab_size = 256
    end = None

    def encode(self, documents: Sequence[str], separator: str | None) -> Tensor:
        assert separator is not None, "bytes have no end-of-text token"
        return torch.from_numpy(np.frombuffer(separator.join(documents).encode(), dtype=np.uint8).copy())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")


class Subwords(Tokenizer):
    """A tokenizer of another library; streams are kept in the cache, since a large corpus takes minutes.

    Args:
        encode: Texts to lists of token numbers, without special tokens.
        decode: Token numbers to text.
        vocab_size: Number of token numbers.
        end: Number of the end-of-text token, None where there is none.
        identity: Equal for tokenizers that give equal numbers.
    """

    def __init__(
        self,
        encode: Callable[[list[str]], list[list[int]]],
        decode: Callable[[list[int]], str],
        *,
        vocab_size: int,
        end: int | None,
        identity: str,
    ) -> None:
        self._encode, self._decode, self.vocab_size, self.end, self.identity = encode, decode, vocab_size, end, identity

    def encode(self, documents: Sequence[str], separator: str | None) -> Tensor:
        def write(path: Path) -> None:
            with open(path, "wb") as file:
                np.save(file, self._stream(documents, separator))

        name = fingerprint(self.identity, repr((self.end, separator)), documents)
        return torch.from_numpy(np.load(cached(f"tokens-{name}.npy", write)))

    def decode(self, tokens: Sequence[int]) -> str:
        return self._decode(list(tokens))

    def _stream(self, documents: Sequence[str], separator: str | None) -> np.ndarray:
        if separator is not None:
            documents = [separator.join(documents)]  # as one text: token borders may cross document borders
        ending = [] if separator is not None else [self.end]
        groups = [list(documents[i : i + _AT_ONCE]) for i in range(0, len(documents), _AT_ONCE)]
        pieces = [
            np.array([*tokens, *ending], dtype=np.int32)
            for group in progress(groups, "Tokenizing")
            for tokens in self._encode(group)
        ]
        return np.concatenate([np.empty(0, np.int32), *pieces])


def load_tokenizer(name: str, corpus: Callable[[], Sequence[str]]) -> Tokenizer:
    """The tokenizer of a name.

    Args:
        name: "bytes"; "bpe-N", a byte-level byte-pair encoding of N tokens trained on `corpus`; or a local folder or
            hub name for transformers' AutoTokenizer.
        corpus: Gives the documents to train on; asked only for "bpe-N".

    Raises:
        ValueError: The name is none of these.
    """
    if name == "bytes":
        return Bytes()
    if size := re.fullmatch(r"bpe-(\d+)", name):
        return _train(int(size[1]), corpus())
    if re.fullmatch(r"(byte|bpe)[^/]*", name.lower()) and not Path(name).exists():
        raise _unknown(name, "it looks like a misspelling.")
    return _pretrained(name)


def _unknown(name: str, reason: str) -> ValueError:
    return ValueError(
        f"tokenizer={name!r} is not known: {reason} Write 'bytes', 'bpe-1024', a local folder such as "
        "'./data/tokenizer', or a hub name such as 'openai-community/gpt2'"
    )


def _train(vocab_size: int, corpus: Sequence[str]) -> Subwords:
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size <= 257:
        raise ValueError(f"tokenizer='bpe-{vocab_size}' has no room beside 256 bytes and an end; write 'bpe-1024'")

    def write(path: Path) -> None:
        fast = Fast(models.BPE())
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[_END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        fast.train_from_iterator(progress(corpus, "Training the tokenizer"), trainer, length=len(corpus))
        fast.save(str(path))

    fast = Fast.from_file(str(cached(f"bpe-{vocab_size}-{fingerprint(corpus)}.json", write)))
    return Subwords(
        lambda texts: [encoding.ids for encoding in fast.encode_batch_fast(texts, add_special_tokens=False)],
        fast.decode,
        vocab_size=fast.get_vocab_size(),
        end=fast.token_to_id(_END),
        identity=fast.to_str(),
    )


def _pretrained(name: str) -> Subwords:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _unknown(name, str(error).splitlines()[0]) from error
    return Subwords(
        lambda texts: tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids,
        lambda tokens: str(tokenizer.decode(tokens)),
        vocab_size=len(tokenizer),
        end=tokenizer.eos_token_id,
        identity=fingerprint(repr(tokenizer), repr(sorted(tokenizer.get_vocab().items()))),
    )
