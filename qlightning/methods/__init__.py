"""The catalogue: one file per paper. `method.py` says what a method is; `catalogue.py` finds them all.

Names are imported at first use: to print the catalogue costs nothing.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlightning.methods.method import Method as Method
    from qlightning.methods.method import Quantization as Quantization
    from qlightning.methods.method import compose as compose

_SHARED = ("Method", "Quantization", "compose")


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name.startswith("_"):
        raise AttributeError(name)
    if name in _SHARED:
        return getattr(import_module("qlightning.methods.method"), name)
    from qlightning.methods.catalogue import find

    return find(name)
