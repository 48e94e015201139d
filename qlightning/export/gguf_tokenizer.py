"""The tokenizer in a GGUF file, from a `tokenizer.json`: byte-level BPE, or of characters that falls back on bytes.

The first kind is Llama 3's, Qwen's and GPT-2's: llama.cpp merges as the file says, within words that it splits in a way
it knows by name. The second is Llama 2's and the first Mistral's, where a space is a letter: llama.cpp merges what has
the best score, which is the rank of the merge here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NORMAL, _UNKNOWN, _CONTROL, _ADDED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
_SPACE = "\u2581"

# By which expression a tokenizer.json splits, and whether words that are tokens are not merged; llama.cpp's name.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS, _REST = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    (f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}", True): "llama-bpe",
    (f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}", False): "smaug-bpe",
    (f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}|{_REST}", False): "qwen2",
    ("", False): "gpt-2",
}


def write_tokenizer(writer: Any, folder: Path, *, size: int, pre: str | None, ids: dict[str, int | None]) -> None:
    """Add a tokenizer to the metadata.

    Args:
        writer: A `gguf.GGUFWriter`.
        folder: Where its `tokenizer.json` is.
        size: Rows of the embedding; further rows than tokens become unused tokens.
        pre: llama.cpp's name of how text is split before bytes are merged, "llama-bpe", "gpt-2" ...; None to tell it
            from the file.
        ids: Ids of the "bos", "eos" and "pad" tokens; None for those that there are not.

    Raises:
        ValueError: It is of another kind, splits text in a way that has no name here, or has more tokens than the
            embedding has rows.
    """
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    model = data.get("model") or {}
    if model.get("type") != "BPE":
        raise ValueError(
            f"tokenizer={str(folder)!r}: a GGUF file is written with BPE from a tokenizer.json alone; leave tokenizer "
            "out, and convert the tokenizer with llama.cpp's own script"
        )
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        prefix = _space_prefix(folder, data)
        writer.add_tokenizer_model("llama")
        writer.add_add_space_prefix(prefix)
        writer.add_token_scores(_scores(folder, model["vocab"], merges, _added(data), size))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre or _splitting(folder, data))
        writer.add_token_merges([" ".join(merge) for merge in merges])
    _write_tokens(writer, folder, data, size)
    _write_special(writer, folder, data, ids)


def _write_tokens(writer: Any, folder: Path, data: Mapping[str, Any], size: int) -> None:
    model = data["model"]
    tokens = {number: token for token, number in model["vocab"].items()}
    kinds = dict.fromkeys(tokens, _NORMAL)
    if model.get("byte_fallback"):
        kinds.update({number: _BYTE for token, number in model["vocab"].items() if _is_byte(token)})
    for added in data.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added["special"] else _ADDED
    if (unknown := model.get("unk_token")) is not None:
        kinds[model["vocab"][unknown]] = _UNKNOWN
    if max(tokens) >= size:
        raise ValueError(f"tokenizer={str(folder)!r} has token {max(tokens)}, and the embedding {size} rows")
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types([kinds.get(number, _UNUSED) for number in range(size)])


def _write_special(writer: Any, folder: Path, data: Mapping[str, Any], ids: dict[str, int | None]) -> None:
    for name, number in ids.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    before, after = _surrounded(data.get("post_processor") or {})
    writer.add_add_bos_token(before)
    writer.add_add_eos_token(after)
    template = folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def _surrounded(processor: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a special token is put before, and after, every text."""
    parts = processor.get("processors", [processor])
    single: list[Any] = next((part["single"] for part in parts if part.get("type") == "TemplateProcessing"), [{}])
    return "SpecialToken" in single[0], "SpecialToken" in single[-1]


# --- byte-level ---


def _splitting(folder: Path, data: Mapping[str, Any]) -> str:
    """llama.cpp's name of how the tokenizer splits text."""
    first = data.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", [first])
    normal = (data.get("normalizer") or {}).get("type")
    pattern = None
    if steps[-1].get("type") == "ByteLevel" and not steps[-1].get("add_prefix_space") and normal in (None, "NFC"):
        own = steps[-1].get("use_regex", True)
        if len(steps) == 1 and own:
            pattern = ""
        elif len(steps) == 2 and not own and steps[0].get("type") == "Split":
            plain = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
            pattern = steps[0]["pattern"].get("Regex") if plain else None
    found = _SPLITS.get((pattern, bool(data["model"].get("ignore_merges")))) if pattern is not None else None
    if found is None:
        raise ValueError(
            f"tokenizer={str(folder)!r}: how it splits text is none of {', '.join(_SPLITS.values())}; write "
            "llama.cpp's name for it, options={'pre': 'tekken'} (--options '{\"pre\": \"tekken\"}'), or leave the "
            "tokenizer out"
        )
    return found


# --- characters ---


def _space_prefix(folder: Path, data: Mapping[str, Any]) -> bool:
    """Whether a text begins as if a space were before it."""
    normal, split = data.get("normalizer") or {}, data.get("pre_tokenizer") or {}
    if not normal and split.get("type") == "Metaspace" and split["replacement"] == _SPACE and not split.get("split"):
        return bool(split.get("prepend_scheme") != "never")
    steps = normal.get("normalizers", [normal] if normal else [])
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    if not split and steps in ([prepend, spaces], [spaces]):
        return len(steps) == 2
    raise ValueError(
        f"tokenizer={str(folder)!r}: llama.cpp has a BPE of characters for whole texts with {_SPACE!r} for a space, "
        "and this one does something else first; leave tokenizer out"
    )


def _scores(
    folder: Path, vocab: Mapping[str, int], merges: list[tuple[str, ...]], added: set[str], size: int
) -> list[float]:
    """A score for each token, by which llama.cpp merges what the ranks of merges say.

    It merges any two tokens that make a third, the best third first; merges name pairs. Both are the same if every pair
    that makes a token is a merge, and those of a token stand together.

    Raises:
        ValueError: They are not the same.
    """
    ranks: dict[str, list[int]] = {}
    pairs = {pair: rank for rank, pair in enumerate(merges)}
    for (left, right), rank in pairs.items():
        ranks.setdefault(left + right, []).append(rank)
    for token in vocab:
        if len(token) < 2 or token in added or _is_byte(token):
            continue
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
        found = ranks.get(token, [])
        if any(pair not in pairs for pair in splits) or (found and max(found) - min(found) >= len(found)):
            raise ValueError(
                f"tokenizer={str(folder)!r}: token {token!r} is not merged from all pairs that make it, as llama.cpp "
                "would; leave tokenizer out"
            )
    scores = [0.0] * max(size, *vocab.values())
    for token, found in ranks.items():
        scores[vocab[token]] = -float(min(found))
    return scores[:size]


def _added(data: Mapping[str, Any]) -> set[str]:
    return {added["content"] for added in data.get("added_tokens", ())}


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
