"""torch.compile without a graph break, forward and backward, bit for bit the eager values (backend aot_eager)."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.pytorch_utils import Conv1D

from qlightning.layers.convert import convert, restore
from qlightning.layers.kept_weight import KeptWeight
from qlightning.layers.on_codes import OnCodes
from qlightning.layers.prepare import prepare

# Dynamo instantiates torch.autograd.Function when it traces one, which torch itself calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

SCHEMES = {
    "weight-group": "int4-g16",
    "weight-asym": "int4-asym-learned",
    "weight-sr": "int4-sr",
    "nf4": "nf4-g16",
    "input-only": {"input": "int8-token"},
    "lsq": {"weight": "int4-lsq", "input": "int8-tensor-lsq"},
    "ema": {"weight": "ternary", "input": "int8-tensor-ema"},
    "asym": {"weight": "int8-asym", "input": "int8-asym-token"},
    "fp8-nvfp4": {"weight": "nvfp4", "input": "fp8e4m3-token"},
    "mxfp4": {"weight": "mxfp4"},
    "output": {"weight": "int4", "output": "int8-token"},
    "int8-codes": {"weight": "int4-lsq", "input": "int8-token", "product": "codes"},
    "fp8-codes": {"weight": "fp8e4m3-channel", "input": "fp8e4m3-token", "product": "codes"},
    "codes-in-all-three": {
        "weight": "int8",
        "input": "int8-token",
        "backward": {
            "grad_dgrad": "int8-token",
            "weight_dgrad": "int8-channel",
            "grad_wgrad": "int8-channel-sr",
            "input_wgrad": "int8-channel",
        },
        "product": OnCodes(["fprop", "dgrad", "wgrad"]),
    },
}


# Made of parts that the others trace too.
SLOW = {"weight-asym", "nf4", "input-only", "mxfp4", "output", "int8-codes", "Conv1d", "Conv1D"}


def each(names):
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else (), id=name) for name in names]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(model, x, call, *, autocast=False):
    """Output and all gradients of one forward and backward pass."""
    model.zero_grad()
    leaf = x.clone().requires_grad_(x.is_floating_point())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = call(leaf)
    y.float().square().sum().backward()
    return [y.detach(), leaf.grad, *(p.grad for p in model.parameters())]


def both(model, x, *, backend="aot_eager", autocast=False):
    """The step in eager and compiled, from the same state."""
    for layer in model.modules():
        if getattr(layer, "input_quantizer", None) is not None:
            layer.input_quantizer.initialize(torch.randn(4, 32))
    twin = copy.deepcopy(model)
    eager = step(model, x, model, autocast=autocast)
    compiled = step(twin, x, torch.compile(twin, fullgraph=True, backend=backend), autocast=autocast)
    return eager, compiled


def assert_equal(eager, compiled):
    assert len(eager) == len(compiled)
    assert sum(value is not None for value in eager) > 1
    for a, b in zip(eager, compiled, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("name", each(SCHEMES))
def test_linear_layers(name):
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(inplace=True))
    convert(model, {"*": SCHEMES[name]})
    assert_equal(*both(model, torch.randn(2, 4, 32)))


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, True), (torch.bfloat16, False)])
def test_dtypes(dtype, autocast):
    model = nn.Sequential(nn.Linear(32, 16, dtype=dtype))
    convert(model, {"*": {"weight": "int4-lsq", "input": "int8-token"}})
    assert_equal(*both(model, torch.randn(4, 32, dtype=dtype), autocast=autocast))


LAYERS = {
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2, padding="same"), (2, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect"), (2, 4, 8, 8)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 5)),
    "Conv1D": (lambda: Conv1D(16, 32), (4, 32)),
}


@pytest.mark.parametrize("name", each(LAYERS))
def test_other_layers(name):
    layer, shape = LAYERS[name]
    model = nn.Sequential(layer())
    convert(model, {"*": {"weight": "int4-lsq", "input": "int8-token"}})
    assert_equal(*both(model, torch.randn(shape)))


@pytest.mark.parametrize("spec", ["int4-g8", "int4-tensor"])
def test_embeddings(spec):
    model = nn.Sequential(nn.Embedding(10, 16))
    convert(model, {"type:Embedding": spec})
    assert_equal(*both(model, torch.randint(10, (3, 4))))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own imports
def test_inductor_is_close():
    model = nn.Sequential(nn.Linear(32, 16))
    convert(model, {"*": {"weight": "int4-lsq", "input": "int8-token"}})
    for a, b in zip(*both(model, torch.randn(4, 32), backend="inductor"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("product", [None, "codes"])
def test_a_phase_switch_recompiles_once_and_breaks_no_graph(product):
    model = nn.Sequential(nn.Linear(32, 16))
    convert(model, {"*": {"weight": "int4-lsq", "input": "int8-token", "product": product}})
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(4, 32)
    seen = []
    for enabled in (False, False, True, True, False, True):
        for _, quantizer in model[0].quantizers():
            quantizer.enabled = enabled
        assert_equal(step(model, x, model), step(model, x, compiled))
        seen.append(counter.frame_count)
    assert seen == [1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_model_compiled_before_its_conversion_is_quantized_after_it(in_place):
    model = nn.Sequential(nn.Linear(32, 16))
    if in_place:
        model.compile(backend="aot_eager")
    compiled = model if in_place else torch.compile(model, backend="aot_eager")
    x = torch.randn(4, 32)
    plain = compiled(x)
    assert torch.equal(plain, nn.functional.linear(x, model[0].weight, model[0].bias))
    coverage = convert(compiled, "int2-g8")
    assert [row.name for row in coverage.rows] == ["0"]
    rounded = model[0].quantizer("weight")(model[0].weight)
    assert torch.equal(compiled(x), nn.functional.linear(x, rounded, model[0].bias))
    restore(compiled)
    assert torch.equal(compiled(x), plain)


def test_a_dynamic_batch_compiles_once_more_at_most():
    model = nn.Sequential(nn.Linear(32, 16))
    convert(model, {"*": {"weight": "int4-g16", "input": "int8-token"}})
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (4, 5, 6, 7):
        x = torch.randn(batch, 32)
        assert_equal(step(model, x, model), step(model, x, compiled))
    assert counter.frame_count == 2


@pytest.mark.parametrize("product", [None, "codes"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_prepared_weight_is_read_by_compiled_code_with_one_compilation(product, autocast):
    model = nn.Sequential(nn.Linear(32, 16))
    convert(model, {"*": {"weight": "int4-g16", "input": "int8-token", "product": product}})
    counter = CompileCounterWithBackend("aot_eager")
    quantizer, kept = model[0].quantizer("weight"), KeptWeight()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        with torch.no_grad():
            model[0].weight.mul_(1.1)
        quantizer.kept = None
        batches = [torch.randn(4, 32) for _ in range(2)]
        wanted = [step(model, x, model, autocast=autocast) for x in batches]
        quantizer.kept = kept
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            prepare(model[0])
        for x, expected in zip(batches, wanted, strict=True):
            assert_equal(expected, step(model, x, compiled, autocast=autocast))
        read = kept.prepared
        kept.clear()
    nothing = None if read.codes is None else read.codes._replace(codes=torch.zeros_like(read.codes.codes))
    kept.prepared = read._replace(values=torch.zeros_like(read.values), codes=nothing)
    y, grad_x, *_ = step(model, batches[0], compiled, autocast=autocast)
    assert torch.equal(y, model[0].bias.to(y.dtype).expand_as(y))
    assert int(grad_x.count_nonzero()) == 0
    assert counter.frame_count == 1
    model.eval()
    assert torch.equal(compiled(batches[0]), model(batches[0]))
