"""Losses in the place of a head, beside those of transformers on stored logits."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from qlightning import convert
from qlightning.losses.head import Hidden, Reached, check_alone, headed, label_losses

WORDS, WIDTH, ROWS, LENGTH = 40, 16, 2, 9
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": WORDS, "pad_token_id": 0}


class Peak(TorchDispatchMode):
    """The most elements of any tensor with words for a last dimension, the weights and their gradients left out."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            logits = isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == WORDS
            if logits and tuple(tensor.shape) != (WIDTH, WORDS):
                self.most = max(self.most, tensor.numel())
        return made


def model_of(kind="llama", **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, intermediate_size=32, **more)
    return AutoModelForCausalLM.from_config(config)


def batch():
    ids = torch.randint(1, WORDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4], labels[1, -1] = -100, -100
    return ids, labels


def shifted(labels):
    return nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "opt"])
def test_the_loss_of_transformers_with_its_gradients(kind):
    model = model_of("llama" if kind == "tied" else kind, tie_word_embeddings=kind != "llama").eval()
    known = headed(nn.ModuleDict({"inner": model}))
    assert known is not None
    assert known.model is model
    assert (known.head.weight is model.get_input_embeddings().weight) == (kind != "llama")
    ids, labels = batch()
    results = []
    for through in (False, True):
        model.zero_grad()
        if through:
            losses = label_losses(known, shifted(labels), tokens=4, input_ids=ids, use_cache=False)
            loss = losses.sum() / (labels[:, 1:] != -100).sum()
        else:
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, pieces in zip(*results, strict=True):
        torch.testing.assert_close(pieces, plain, rtol=1e-5, atol=1e-6)
    assert "forward" not in vars(known.head)


def test_no_logits_of_all_tokens_in_forward_or_backward_nor_kept():
    model, (ids, labels) = model_of(), batch()
    kept = []
    with Peak() as plain:
        model(input_ids=ids, labels=labels).loss.backward()
    with Peak() as pieces, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        label_losses(headed(model), shifted(labels), tokens=4, input_ids=ids).sum().backward()
    assert plain.most == ROWS * LENGTH * WORDS
    assert pieces.most == 4 * WORDS
    assert all(
        t.shape in ((WORDS, WIDTH), (WIDTH, WORDS)) for t in kept if t.ndim and WORDS in (t.shape[-1], t.numel())
    )


def test_a_quantized_head_that_is_the_embedding_too():
    model, (ids, labels) = model_of(tie_word_embeddings=True), batch()
    convert(model, {"lm_head": {"weight": "int4-g8", "input": "int8-token"}, "*embed_tokens": "int4-g8"}, tied="share")
    plain = model(input_ids=ids, labels=labels).loss
    pieces = label_losses(headed(model), shifted(labels), tokens=5, input_ids=ids)
    torch.testing.assert_close(pieces.sum() / (labels[:, 1:] != -100).sum(), plain)


def test_a_model_that_works_on_its_logits_is_refused():
    model, (ids, labels) = model_of("granite", logits_scaling=2.0), batch()
    with pytest.raises(ValueError, match=r"GraniteForCausalLM scales.*leave chunked_loss out"):
        label_losses(headed(model), shifted(labels), tokens=4, input_ids=ids)
    with pytest.raises(ValueError, match="leave chunked_loss out"):
        check_alone(headed(model))
    check_alone(headed(model_of()))
    assert "forward" not in vars(headed(model).head)


def test_a_module_without_a_single_head_has_none():
    assert headed(nn.Linear(2, 2)) is None
    assert headed(nn.ModuleList([model_of(), model_of()])) is None
    assert headed(model_of().base_model) is None


def test_what_goes_into_the_head_is_kept_and_a_call_may_end_there():
    model, (ids, _) = model_of().eval(), batch()
    known = headed(model)
    with Hidden(known) as hidden:
        logits = model(input_ids=ids).logits
    assert torch.equal(known.head(hidden.states[0]), logits)
    with Peak() as none, Hidden(known, ends=True) as first, pytest.raises(Reached):
        model(input_ids=ids)
    assert torch.equal(first.states[0], hidden.states[0])
    assert none.most == 0
    model(input_ids=ids)  # no hook is left


class Body(nn.Embedding):
    def forward(self, input):
        return (super().forward(input),)


class Small(nn.Module):
    """What a model of transformers is to this file."""

    def __init__(self):
        super().__init__()
        self.base_model, self.lm_head = Body(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input):
        return SimpleNamespace(logits=self.lm_head(self.base_model(input)[0]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_in_one_graph():
    model, (ids, labels) = Small(), batch()
    known = headed(model)

    def loss(ids, labels):
        return label_losses(known, labels, tokens=8, input=ids).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, shifted(labels)), loss(ids, shifted(labels)))
