"""A tokenizer in a GGUF file says what the one it was made from says: read back by hand, and by llama.cpp."""

import json

import gguf
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlightning.export.commands import export_module
from qlightning.export.gguf import FILE
from qlightning.export.gguf_tokenizer import _SPLITS, _scores
from qlightning.export.llama_cpp import LlamaCpp

TEXT = "a fine day, a finer day: the finest of days"
OTHERS = [TEXT, " two  spaces", "it's 12345 o'clock\n\n  \u00e9\u00e0 \u4f60\u597d!", "DAY"]
SPECIAL = ["<s>", "</s>"]
PATTERNS = {name: (pattern, ignores) for (pattern, ignores), name in _SPLITS.items()}


def byte_level(name="gpt-2"):
    """A tokenizer that splits as llama.cpp's of that name and puts <s> before a text."""
    pattern, ignores = PATTERNS[name]
    own = tokenizers.Tokenizer(models.BPE(ignore_merges=ignores))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    own.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only]) if pattern else bytes_only
    own.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=272, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    own.train_from_iterator([TEXT] * 3, trainer)
    own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return own


def characters():
    """As Llama 2's: every pair that makes a token is a merge, bytes for what is no token."""
    parts = ["\u2581", *"adefinrsthoy,:DAY"]
    words = ["in", "fin", "fine", "ay", "day", "\u2581d", "\u2581day", "he", "th", "the", "\u2581f", "\u2581fine"]
    names = ["<unk>", *SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *parts, *words]
    vocab = {name: i for i, name in enumerate(names)}
    merges = [(w[:i], w[i:]) for w in words for i in range(1, len(w)) if w[:i] in vocab and w[i:] in vocab]
    own = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    own.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    own.add_special_tokens(["<unk>", *SPECIAL])
    return own


def saved(own, folder):
    PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def test_byte_level_tokens(kit):
    folder = saved(byte_level(), kit.folder / "own")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    module = kit.llama("gguf-q4_0", vocab_size=288, bos_token_id=0, eos_token_id=1)
    assert export_module(module, "gguf", kit.out, tokenizer=folder).passed
    own = AutoTokenizer.from_pretrained(folder)
    fields = gguf.GGUFReader(kit.out / FILE).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[: len(own)] == own.convert_ids_to_tokens(range(len(own)))
    assert len(tokens) == 288
    assert fields["tokenizer.ggml.token_type"].contents()[:3] == [3, 3, 1]
    assert fields["tokenizer.ggml.token_type"].contents()[-1] == 5
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 1
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.add_eos_token"].contents() is False
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    vocab = {token: i for i, token in enumerate(tokens)}
    again = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    again.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert again.encode(TEXT).ids == own(TEXT, add_special_tokens=False)["input_ids"]
    assert len(again.encode(TEXT).ids) < len(TEXT)


@pytest.mark.parametrize("name", [*PATTERNS, "characters"])
def test_llama_cpp_gives_the_same_ids(kit, name):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: it takes twenty minutes to build")
    own = characters() if name == "characters" else byte_level(name)
    folder, first = saved(own, kit.folder / "own"), own.token_to_id("<s>")
    module = kit.llama("gguf-q4_0", vocab_size=320, bos_token_id=first, eos_token_id=first + 1)
    assert export_module(module, "gguf", kit.out, tokenizer=folder).passed
    theirs = LlamaCpp(kit.out / FILE)
    for text in OTHERS:
        assert theirs.tokenize(text) == own.encode(text).ids, text
    assert len(own.encode(TEXT).ids) < len(TEXT)
    pre = gguf.GGUFReader(kit.out / FILE).fields.get("tokenizer.ggml.pre")
    assert pre.contents() == name if pre else name == "characters"


def test_a_way_to_split_without_a_name(kit):
    own = byte_level()
    own.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(False)])
    folder = saved(own, kit.folder / "own")
    module = kit.llama("gguf-q4_0", vocab_size=288)
    with pytest.raises(ValueError, match=r"is none of llama-bpe, .*options=\{'pre': 'tekken'\}"):
        export_module(module, "gguf", kit.out, tokenizer=folder)
    export_module(module, "gguf", kit.out, tokenizer=folder, options={"pre": "smollm"})
    assert gguf.GGUFReader(kit.out / FILE).fields["tokenizer.ggml.pre"].contents() == "smollm"


def test_merges_that_scores_cannot_say(kit):
    vocab = {name: i for i, name in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    whole = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    assert _scores(kit.folder, vocab, whole, set(), 8) == [0, 0, 0, 0, -1, -2, 0, 0]
    apart = [("ab", "c"), ("a", "b"), ("b", "c"), ("a", "bc")]
    for merges in (whole[:3], apart):
        with pytest.raises(ValueError, match="token 'abc' is not merged from all pairs that make it"):
            _scores(kit.folder, vocab, merges, set(), 8)


def test_characters_with_another_beginning(kit):
    own = characters()
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="does something else first"):
        export_module(kit.llama("gguf-q4_0", vocab_size=320), "gguf", kit.out, tokenizer=saved(own, kit.folder / "own"))


def test_others_are_refused(kit):
    folder = saved(byte_level(), kit.folder / "own")
    with pytest.raises(ValueError, match="has token 271, and the embedding 48 rows"):
        export_module(kit.llama("gguf-q4_0"), "gguf", kit.out, tokenizer=folder)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram"}}))
    with pytest.raises(ValueError, match="with BPE from a"):
        export_module(kit.llama("gguf-q4_0"), "gguf", kit.out, tokenizer=folder)
    assert not kit.out.exists()
