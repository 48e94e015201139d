"""What is trained on: text and pictures as LightningDataModules, and the loader that makes a killed run resume exactly.

The names are loaded on first use, so that importing the package does not import Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlightning.data.generated import GeneratedText
    from qlightning.data.images import Digits, ImageData
    from qlightning.data.loader import Loader
    from qlightning.data.text import StandardLibraryText, TextData

__all__ = ["Digits", "GeneratedText", "ImageData", "Loader", "StandardLibraryText", "TextData"]

_HOMES = {
    "Digits": "images",
    "GeneratedText": "generated",
    "ImageData": "images",
    "Loader": "loader",
    "StandardLibraryText": "text",
    "TextData": "text",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
