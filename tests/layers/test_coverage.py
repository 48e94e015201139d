"""Coverage: the numbers are those counted by hand, and the table says what happened and why."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qlightning.layers.convert import convert
from qlightning.layers.coverage import count_multiply_adds, public_name


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 10)
        self.lm_head = nn.Linear(10, 5, bias=False)

    def forward(self, x):
        return self.lm_head(self.head(self.norm(self.up(self.stem(x))).mean((2, 3))))


WEIGHTS = {"stem": 3 * 8 * 9 + 8, "up": 8 * 2 * 4 + 4, "norm": 8, "head": 4 * 10 + 10, "lm_head": 50}
CALLS = {  # of a batch of two pictures of 8 x 8
    "stem": 2 * 8 * 4 * 4 * (3 * 9),
    "up": 2 * 8 * 4 * 4 * (2 * 4),
    "norm": 0,
    "head": 2 * 10 * 4,
    "lm_head": 2 * 5 * 10,
}


def test_shares_are_those_counted_by_hand():
    model = Net()
    coverage = convert(model, {"*": "int4", "up": {"input": "int8-token"}})
    assert {row.name: row.weights for row in coverage.rows} == WEIGHTS
    assert sum(WEIGHTS.values()) == sum(p.numel() for p in Net().parameters())
    assert [row.name for row in coverage.converted] == ["stem", "up", "head"]
    assert [row.name for row in coverage.rows if row.weight] == ["stem", "head"]
    assert coverage.weight_share == (WEIGHTS["stem"] + WEIGHTS["head"]) / sum(WEIGHTS.values())
    assert coverage.multiply_add_share is None
    with count_multiply_adds(model, coverage):
        model(torch.randn(2, 3, 8, 8))
    assert {row.name: row.multiply_adds for row in coverage.rows} == CALLS
    assert coverage.multiply_add_share == (CALLS["stem"] + CALLS["head"]) / sum(CALLS.values())
    assert coverage.metrics() == {
        "coverage/weight_share": coverage.weight_share,
        "coverage/layers": 3.0,
        "coverage/multiply_add_share": coverage.multiply_add_share,
    }
    model(torch.randn(2, 3, 8, 8))
    assert sum(row.multiply_adds for row in coverage.rows) == sum(CALLS.values())  # counted inside the context only


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(6, 5), (2, 3, 6)),
        (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9)),
        (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same"), (2, 4, 9, 9)),
        (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 9)),
        (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), (2, 4, 5, 5)),
    ],
    ids=["Linear", "Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d"],
)
def test_multiply_adds_are_half_of_torchs_own_count(layer, shape):
    model = nn.Sequential(layer())
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(shape))
    coverage = convert(model, "int4")
    with count_multiply_adds(model, coverage):
        model(torch.randn(shape))
    assert 2 * coverage.rows[0].multiply_adds == counter.get_total_flops()
    assert coverage.multiply_add_share == 1.0


def test_a_layer_called_twice_or_by_keyword_is_counted_so():
    model = nn.Sequential(nn.ConvTranspose1d(4, 4, 1))
    coverage = convert(model, "int4")
    x = torch.randn(2, 4, 9)
    with count_multiply_adds(model, coverage):
        model[0](x)
        model[0](input=x)
    assert coverage.rows[0].multiply_adds == 2 * (2 * 9 * 4 * 4)


def test_the_table():
    table = convert(Net(), {"*": "int4", "up": {"weight": "int8", "input": "int8-token"}}).table()
    assert table.splitlines() == [
        "layers  class            weights  share  quantized                                names",
        "1       Conv2d           224      56.0%  weight int4                              stem",
        "1       ConvTranspose2d  68       17.0%  weight int8, input int8-token            up",
        "1       Linear           50       12.5%  weight int4                              head",
        "1       GroupNorm        8        2.0%   float: no matrix                         norm",
        "1       Linear           50       12.5%  float: output head, in float by default  lm_head",
        "quantized: 85.5% of 400 weights",
    ]


def test_like_layers_are_one_line():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)))
    lines = convert(model, {"*": "int4-sr", "2": None}).table().splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("4       Linear")
    assert "weight int4-sr" in lines[1]  # and not a quantizer with its seed per layer
    assert lines[1].endswith("0 .. 4")


def test_adapters_and_wrappers_do_not_show_in_names():
    wrapped = "_orig_mod.model.layers.0._checkpoint_wrapped_module.q_proj.base_layer"
    assert public_name(wrapped) == "model.layers.0.q_proj"
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    coverage = convert(torch.compile(model, backend="eager"), {"*": "int4", "1": "int8"})
    assert [row.name for row in coverage.rows] == ["0", "1"]


def test_low_coverage_is_an_error_with_the_table():
    class Own(nn.Linear):
        def forward(self, input):
            return super().forward(input)

    model = nn.Sequential(nn.Linear(8, 8), Own(32, 32))
    with pytest.raises(ValueError, match=r"only 6% of the weights.*min_coverage=50%") as error:
        convert(model, "int4")
    assert "float: no quantized twin of Own" in str(error.value)
    assert "lower min_coverage" in str(error.value)
    coverage = convert(model, "int4", min_coverage=0.05)
    assert coverage.weight_share == 72 / (72 + 32 * 33)


def test_what_somebody_chose_to_leave_in_float_is_not_low_coverage():
    model = nn.Sequential(nn.Embedding(1000, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 999))
    coverage = convert(model, {"*": "int4", "3": None})
    assert coverage.reachable_share == 1.0
    assert coverage.weight_share == 72 / sum(p.numel() for p in model.parameters())


def test_nothing_converted_is_an_error():
    for rules in ("int4", {"*": "int4"}):
        with pytest.raises(ValueError, match=r"nothing was converted:(.|\n)*float: not asked for(.|\n)*type:Embedding"):
            convert(nn.Sequential(nn.Embedding(4, 8)), rules)
    with pytest.raises(ValueError, match="nothing was converted"):
        convert(nn.Sequential(nn.ReLU()), "int4", min_coverage=0.0)


@pytest.mark.parametrize("share", [50, -0.1, 1.5])
def test_min_coverage_is_a_share(share):
    with pytest.raises(ValueError, match="a share from 0 to 1"):
        convert(nn.Sequential(nn.Linear(8, 8)), "int4", min_coverage=share)
