"""llama.cpp itself as the runtime of a GGUF file, through its Python binding (`pip install qlightning[llama-cpp]`).

There are no wheels of the binding for every platform; from source it takes a C++ compiler, cmake and minutes.
"""

import ctypes
import weakref
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlightning.numerics.spec import parse

ACTIVATIONS = "gguf-q8_0"
"""How llama.cpp rounds what a product with a packed matrix takes: 8 bits, a float16 step for 32 values in a row."""

_WITH_THEM = ("Q4_0", "Q8_0", "MXFP4")  # those of Q4_1 have a float16 sum besides, ternary ones blocks of 256


def quantizes_so(quantizer: Any, kind: str) -> bool:
    """Whether llama.cpp rounds the inputs of a layer with weights of ggml's type `kind` as a quantizer does."""
    expected = parse(ACTIVATIONS)
    return kind in _WITH_THEM and quantizer.deploys_like(expected)


class LlamaCpp:
    """A model file in llama.cpp on the CPU: token ids (B, T) to `{"logits": (B, T, V)}`, float32.

    Attention is not fused and its cache is float32, so that all that differs from the trained model is the order of
    sums, and the activations where it quantizes them.

    Args:
        path: A GGUF file.

    Raises:
        ModuleNotFoundError: The binding is not installed.
        ValueError: llama.cpp cannot load the file.
    """

    def __init__(self, path: Path) -> None:
        binding = _binding()
        options = binding.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = binding.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {path.name}: {'; '.join(_SAID)}")
        weakref.finalize(self, binding.llama_model_free, self._model)
        self.vocabulary: int = binding.llama_vocab_n_tokens(binding.llama_model_get_vocab(self._model))

    def __call__(self, input_ids: Tensor, **_: Any) -> dict[str, Tensor]:
        return {"logits": torch.stack([self._row(row.tolist()) for row in input_ids])}

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, with the special tokens that llama.cpp adds."""
        binding, raw = _binding(), text.encode()
        tokens = (ctypes.c_int32 * (len(raw) + 8))()
        vocab = binding.llama_model_get_vocab(self._model)
        count = binding.llama_tokenize(vocab, raw, len(raw), tokens, len(tokens), True, False)
        assert count >= 0, count
        return list(tokens[:count])

    def _row(self, ids: list[int]) -> Tensor:
        binding, count = _binding(), len(ids)
        options = binding.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = count
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        options.type_k = options.type_v = binding.GGML_TYPE_F32
        options.flash_attn_type = binding.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = binding.llama_init_from_model(self._model, options)
        if not context:
            raise ValueError(f"llama.cpp cannot run {count} tokens of this model: {'; '.join(_SAID)}")
        batch = binding.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
                batch.seq_id[i][0] = 0
            if code := binding.llama_decode(context, batch):
                raise ValueError(f"llama.cpp fails with code {code}: {'; '.join(_SAID)}")
            values = binding.llama_get_logits(context)[: count * self.vocabulary]
            return torch.tensor(values).view(count, self.vocabulary)
        finally:
            binding.llama_batch_free(batch)
            binding.llama_free(context)


def _binding() -> Any:
    try:
        import llama_cpp
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"runtime='llama.cpp' needs its Python binding ({error}): pip install 'qlightning[llama-cpp]', or leave "
            "runtime out for the proof in transformers"
        ) from None
    llama_cpp.llama_log_set(_listener(llama_cpp), ctypes.c_void_p(0))
    return llama_cpp


_SAID: deque[str] = deque(maxlen=4)
"""The last errors of llama.cpp, which would print everything it does to stderr."""

_ERROR = 4


@cache
def _listener(binding: Any) -> Any:
    def listen(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            _SAID.append(text.decode(errors="replace").strip())

    return binding.llama_log_callback(listen)
