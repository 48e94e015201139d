"""What is trained on: text and pictures as LightningDataModules, and the loader that makes a killed run resume exactly.

The names are loaded on first use, so that importing the package does not import Lightning.
"""

from typing import TYPE_CHECKING

from qlightning.lazy import at_first_use

if TYPE_CHECKING:
    from qlightning.data.generated import GeneratedText
    from qlightning.data.images import Digits, ImageData
    from qlightning.data.loader import Loader
    from qlightning.data.text import StandardLibraryText, TextData

__all__ = ["Digits", "GeneratedText", "ImageData", "Loader", "StandardLibraryText", "TextData"]

_HOME = {
    "Digits": "images",
    "GeneratedText": "generated",
    "ImageData": "images",
    "Loader": "loader",
    "StandardLibraryText": "text",
    "TextData": "text",
}
__getattr__, __dir__ = at_first_use(__name__, _HOME)
