"""A tokenizer in a GGUF file says what the one it was made from says."""

import gguf
import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlightning.export.commands import export_module
from qlightning.export.gguf import FILE

TEXT = "a fine day, a finer day: the finest of days"


@pytest.fixture
def folder(tmp_path):
    own = tokenizers.Tokenizer(tokenizers.models.BPE())
    own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=272, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    own.train_from_iterator([TEXT] * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path / "own")
    return tmp_path / "own"


def test_tokens(kit, folder):
    module = kit.llama("gguf-q4_0", vocab_size=288, bos_token_id=0, eos_token_id=1)
    assert export_module(module, "gguf", kit.out, tokenizer=folder).passed
    own = AutoTokenizer.from_pretrained(folder)
    fields = gguf.GGUFReader(kit.out / FILE).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[: len(own)] == own.convert_ids_to_tokens(range(len(own)))
    assert len(tokens) == 288
    assert fields["tokenizer.ggml.token_type"].contents()[:3] == [3, 3, 1]
    assert fields["tokenizer.ggml.token_type"].contents()[-1] == 5
    assert fields["tokenizer.ggml.pre"].contents() == "llama-bpe"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 1
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    vocab = {token: i for i, token in enumerate(tokens)}
    again = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    again.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert again.encode(TEXT).ids == own(TEXT, add_special_tokens=False)["input_ids"]
    assert len(again.encode(TEXT).ids) < len(TEXT)


def test_others_are_refused(kit, folder):
    with pytest.raises(ValueError, match="has token 271, and the embedding 48 rows"):
        export_module(kit.llama("gguf-q4_0"), "gguf", kit.out, tokenizer=folder)
    (folder / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    with pytest.raises(ValueError, match="byte-level BPE"):
        export_module(kit.llama("gguf-q4_0"), "gguf", kit.out, tokenizer=folder)
    assert not kit.out.exists()
