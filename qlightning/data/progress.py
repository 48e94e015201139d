"""A progress bar over work that may take longer than two seconds."""

import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.progress import track

Item = TypeVar("Item")


def progress(items: Sequence[Item], description: str) -> Iterable[Item]:
    """`items` one by one with a bar on the terminal of the first process, which is gone when the work is done."""
    return track(items, description, transient=True, disable=os.environ.get("LOCAL_RANK", "0") != "0")
