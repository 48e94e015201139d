"""Names of packages that are imported at first use."""

import importlib
from pathlib import Path

import pytest

import qlightning

PACKAGES = ["", *(f".{path.parent.name}" for path in Path(qlightning.__file__).parent.glob("*/__init__.py"))]
LAZY = [name for name in PACKAGES if "at_first_use" in vars(importlib.import_module(f"qlightning{name}"))]


def test_the_packages_were_found() -> None:
    assert len(LAZY) >= 9


@pytest.mark.parametrize("name", LAZY)
def test_every_public_name_is_there_and_listed(name: str) -> None:
    package = importlib.import_module(f"qlightning{name}")
    assert set(package.__all__) <= set(dir(package))
    assert all(getattr(package, public) is not None for public in package.__all__)


@pytest.mark.parametrize("name", LAZY)
def test_an_unknown_name_is_answered_with_those_there_are(name: str) -> None:
    package = importlib.import_module(f"qlightning{name}")
    last = sorted(package.__all__)[-1]
    with pytest.raises(AttributeError, match=f"qlightning{name} has no 'Nothing'; it has .*{last}"):
        package.Nothing  # noqa: B018
