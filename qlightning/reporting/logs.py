"""What a run logged: the curves in Lightning's metrics.csv and in TensorBoard's event files.

Both are read as data: nothing in them is run. A run that was killed may leave a line or record behind that is not
whole; what is before it counts.
"""

import csv
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

Curve = list[tuple[int, float]]


class Logs(NamedTuple):
    """Curves by name, and the files they are from.

    Attributes:
        curves: (step, value) of every logged number, in the order of the steps; a diverged run's are not finite.
        files: Where they were read.
        notes: What could not be read, and why.
    """

    curves: dict[str, Curve]
    files: list[Path]
    notes: list[str]


def read_logs(folders: Iterable[Path]) -> Logs:
    """All curves in the first of some folders that has any."""
    notes: list[str] = []
    for folder in folders:
        curves: dict[str, Curve] = {}
        files = sorted([*folder.glob("metrics.csv"), *folder.glob("events.out.tfevents.*")])
        for path in files:
            try:
                found = read_csv(path) if path.suffix == ".csv" else read_events(path)
            except (OSError, ValueError, ModuleNotFoundError) as error:
                notes.append(f"{path.name} could not be read: {error}")
                continue
            for name, curve in found.items():
                curves.setdefault(name, []).extend(curve)
        if curves:
            return Logs({name: _in_order(curve) for name, curve in curves.items()}, files, notes)
    return Logs({}, [], notes)


def read_csv(path: Path) -> dict[str, Curve]:
    """Curves of Lightning's CSVLogger. Raises ValueError where it has no column `step`."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if "step" not in (rows.fieldnames or ()):
            raise ValueError("it has no column 'step', as CSVLogger writes it")
        curves: dict[str, Curve] = {}
        for row in rows:
            step = _number(row["step"])
            for name, cell in row.items():
                value = _number(cell)
                if name not in ("step", "epoch", None) and step is not None and value is not None:
                    curves.setdefault(name, []).append((int(step), value))
    return curves


def read_events(path: Path) -> dict[str, Curve]:
    """Scalars of a TensorBoard event file, without the hyperparameters' own (`hp_metric`)."""
    from tensorboardX.proto.event_pb2 import Event

    curves: dict[str, Curve] = {}
    for record in _records(path):
        event = Event()
        try:
            event.ParseFromString(record)
        except Exception as error:  # protobuf's DecodeError; its module is private
            raise ValueError(f"a record is no event ({error})") from None
        for value in event.summary.value:
            scalar = _scalar(value)
            if scalar is not None and value.tag not in ("epoch", "hp_metric"):
                curves.setdefault(value.tag, []).append((event.step, scalar))
    return curves


def _scalar(value: object) -> float | None:
    """torch's writer stores a number as `simple_value`, TensorFlow's own as a tensor of one float."""
    if value.HasField("simple_value"):  # type: ignore[attr-defined]
        return float(value.simple_value)  # type: ignore[attr-defined]
    if value.HasField("tensor") and len(value.tensor.float_val) == 1:  # type: ignore[attr-defined]
        return float(value.tensor.float_val[0])  # type: ignore[attr-defined]
    return None


def _records(path: Path) -> Iterator[bytes]:
    """TFRecord: length (8 bytes), its checksum (4), the record, its checksum (4)."""
    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            (length,) = struct.unpack("<Q", head[:8])
            if length > 1 << 28:
                raise ValueError(f"a record of {length} bytes is none")
            record = file.read(length)
            if len(record) < length or len(file.read(4)) < 4:
                return
            yield record


def _number(cell: object) -> float | None:
    try:
        return float(cell) if isinstance(cell, str) else None
    except ValueError:
        return None


def _in_order(curve: Curve) -> Curve:
    """A resumed run logs some steps again: what was logged last counts."""
    return sorted(dict(curve).items())
