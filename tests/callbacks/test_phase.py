"""A phase as users write it: in YAML, as arguments, and as the shorthands of QATCallback."""

import copy
import pickle

import pytest
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Callback

from qlightning import QATCallback, Quantizer, Scheme
from qlightning.callbacks.phase import PLACEMENTS, Phase, phases_of
from qlightning.numerics.formats import Int
from qlightning.schedules import Cosine

FIVE = """
callbacks:
  - class_path: qlightning.QATCallback
    init_args:
      weight: int4-lsq
      input: int8-tensor-lsq
      calibration: 2
      schedule:
        - {at: 0, observe: [input], lr: 0.5}
        - {at: 0.2, quantize: [weight], lr: 1.0}
        - {at: 0.4, quantize: [input], ramp: 2}
        - {at: 0.6, train: scales, lr: 0.3}
        - {at: 0.8, train: weights, optimizer: reset}
"""


def parse(text):
    """As LightningCLI reads the callbacks of a Trainer."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    config = parser.parse_string(text)
    return parser, config, parser.instantiate(config).callbacks


def test_five_phases_in_yaml():
    parser, config, (qat,) = parse(FIVE)
    wanted = [
        Phase(0, observe="input", lr=0.5),
        Phase(0.2, quantize="weight", lr=1.0),
        Phase(0.4, quantize=["input"], ramp=2),
        Phase(0.6, train="scales", lr=0.3),
        Phase(0.8, train="weights", optimizer="reset"),
    ]
    assert [phase for _, phase in qat.schedule] == wanted
    printed = parser.dump(config)
    assert parse(printed)[2][0].schedule == qat.schedule
    assert yaml.safe_load(printed)["callbacks"][0]["init_args"]["schedule"][2] == {
        "at": 0.4,
        "quantize": ["input"],
        "ramp": 2,
    }


def test_shorthands_in_yaml():
    text = "callbacks: [{class_path: qlightning.QATCallback, init_args: %s}]"
    arguments = "{weight: int8-g8, start: 2, ramp: 3, anneal: {0.5: int6-g8, 0.75: {weight: int4-g8}}}"
    *_, (qat,) = parse(text % arguments)
    assert [phase for _, phase in qat.schedule] == [
        Phase(2, quantize="all", ramp=3),
        Phase(0.5, rules={"*": "int6-g8"}),
        Phase(0.75, rules={"*": {"weight": "int4-g8"}}),
    ]


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ("{at: 0.5, quantise: all}", "a phase has no quantise; it has at, quantize"),
        ("{at: 0.5, quantize: wieght}", "write 'all' or placements, of weight, input"),
        ("{at: 1.5, quantize: all}", "at=1.5"),
        ("0.5", "is no phase; write for example"),
    ],
)
def test_wrong_phases_in_yaml(phase, message):
    with pytest.raises(ArgumentError, match=message):
        parse(f"callbacks: [{{class_path: qlightning.QATCallback, init_args: {{weight: int4, schedule: [{phase}]}}}}]")


EVERY = [
    Phase(),
    Phase(0.5, quantize="all", ramp=0.1, optimizer="reset"),
    Phase(10, observe=["input", "output"], lr=Cosine(warmup=2), scale_lr=0.0),
    Phase(0.25, rules={"*": "int4-g8", "a.*": {"weight": "int2-g8"}, "b": Quantizer(Int(3))}, train="scales"),
    Phase(0.25, rules={"*": Scheme("int4-g8", input="int4-token")}),
]


@pytest.mark.parametrize("phase", EVERY, ids=range(len(EVERY)))
def test_the_plain_form_gives_the_phase_back(phase):
    plain = yaml.safe_load(yaml.safe_dump(phase.plain()))
    assert Phase(**plain) == phase
    assert phase != Phase(1)
    for other in (copy.deepcopy(phase), pickle.loads(pickle.dumps(phase))):
        assert other == phase


def test_the_placements_are_those_of_a_scheme():
    every = Scheme(*["int8-tensor"], **dict.fromkeys(PLACEMENTS[1:], "int8-tensor"))
    assert tuple(placement for placement, _ in every.items()) == PLACEMENTS
    assert Phase(quantize="all").quantize == PLACEMENTS


def short(**given):
    return phases_of(
        given.pop("schedule", None), **{"start": 0, "freeze_scales": None, "ramp": 0, "anneal": None, **given}
    )


def test_shorthands_are_phases():
    assert short() == [("start", Phase(0, quantize="all"))]
    assert short(start=0.5, ramp=0.1, freeze_scales=0.9, anneal={0.8: "int4-g8", 0.6: "int6-g8"}) == [
        ("start", Phase(0.5, quantize="all", ramp=0.1)),
        ("anneal", Phase(0.6, rules={"*": "int6-g8"})),
        ("anneal", Phase(0.8, rules={"*": "int4-g8"})),
        ("freeze_scales", Phase(0.9, train="weights")),
    ]


ALL = [Phase(0, quantize="all")]


@pytest.mark.parametrize(
    ("make", "corrected"),
    [
        (lambda: Phase(train="scale"), "train='all', 'weights' or 'scales'"),
        (lambda: Phase(optimizer="forget"), "optimizer='keep' or 'reset'"),
        (lambda: Phase(lr=-1.0), "for example lr=0.1"),
        (lambda: Phase(scale_lr=float("nan")), "for example scale_lr=0.1"),
        (lambda: Phase(lr=True), "for example lr=0.1"),
        (lambda: Phase(0.5, ramp=10), "add for example quantize='all'"),
        (lambda: Phase("0.5"), "at='0.5'"),
        (lambda: Phase(rules={"a": None}), r"rules=\{'a': 'int4-g32'\}"),
        (lambda: Phase(rules={"a": "int4g8"}), "did you mean 'int4"),
        (lambda: short(schedule=ALL, start=0.5), r"leave them out, .*schedule=\[Phase\(at=0.5, quantize='all'\)\]"),
        (lambda: short(schedule=ALL, ramp=3), r"schedule=\[Phase\(at=0, quantize='all', ramp=3\)\]"),
        (lambda: short(schedule=ALL, freeze_scales=3), r"Phase\(at=3, train='weights'\)\]"),
        (lambda: short(schedule=ALL, anneal={3: "int4"}), r"Phase\(at=3, rules=\{'\*': 'int4'\}\)\]"),
        (lambda: short(schedule=[Phase(0, lr=0.5)]), r"add for example Phase\(0.5, quantize='all'\)"),
        (lambda: short(schedule=[Phase(0, quantize="all", observe="input")]), r"Phase\(0, observe='input'\)"),
        (lambda: short(anneal={0.5: "int4-g8", 7: "int2-g8"}), "all in steps .* or all in shares"),
        (lambda: QATCallback("int4", schedule=ALL, start=3), r"QATCallback\(\.\.\., schedule="),
    ],
    ids=range(17),
)
def test_errors_show_the_corrected_call(make, corrected):
    with pytest.raises(ValueError, match=corrected):
        make()
