"""The catalogue is the folder."""

import pytest

from qlightning.methods import LSQ
from qlightning.methods.catalogue import catalogue, find


def test_the_catalogue_is_read_from_the_folder() -> None:
    entries = {entry.name: entry for entry in catalogue()}
    assert entries["LSQ"].module == "lsq"
    assert "1902.08153" in entries["LSQ"].paper
    assert "Quantization" not in entries
    assert find("LSQ") is LSQ


def test_an_unknown_method_lists_those_there_are() -> None:
    with pytest.raises(AttributeError, match="LSQ"):
        find("NoSuchMethod")
