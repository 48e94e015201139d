"""The tokenizer in a GGUF file: byte-level BPE, as Llama 3's and GPT-2's, from a `tokenizer.json`."""

import json
from pathlib import Path
from typing import Any

_NORMAL, _CONTROL, _ADDED, _UNUSED = 1, 3, 4, 5  # gguf.TokenType


def write_tokenizer(writer: Any, folder: Path, *, size: int, pre: str, ids: dict[str, int | None]) -> None:
    """Add a tokenizer to the metadata.

    Args:
        writer: A `gguf.GGUFWriter`.
        folder: Where its `tokenizer.json` is.
        size: Rows of the embedding; further rows than tokens become unused tokens.
        pre: llama.cpp's name of how text is split before it is merged: "llama-bpe", "gpt-2" ...
        ids: Ids of the "bos", "eos" and "pad" tokens; None for those that there are not.

    Raises:
        ValueError: It is no byte-level BPE, or has more tokens than the embedding has rows.
    """
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    model = data.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or "ByteLevel" not in json.dumps(data.get("decoder")):
        raise ValueError(
            f"tokenizer={str(folder)!r}: a GGUF file is written with byte-level BPE from a tokenizer.json alone; leave "
            "tokenizer out, and convert the tokenizer with llama.cpp's own script"
        )
    kinds = dict.fromkeys(model["vocab"].values(), _NORMAL)
    tokens = {number: token for token, number in model["vocab"].items()}
    for added in data.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added["special"] else _ADDED
    if max(tokens) >= size:
        raise ValueError(f"tokenizer={str(folder)!r} has token {max(tokens)}, and the embedding {size} rows")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types([kinds.get(number, _UNUSED) for number in range(size)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    for name, number in ids.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
