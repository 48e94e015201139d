"""Where rows come from: a data set of the hub, a local folder or a local file, through the `datasets` library."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from qlightning.data.splits import TEST, TRAIN, VALIDATION

if TYPE_CHECKING:
    import datasets

_BUILDERS = {".parquet": "parquet", ".txt": "text", ".jsonl": "json"}
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
_WORDS = {
    TRAIN: {"train", "training"},
    VALIDATION: {"validation", "valid", "val", "dev", "eval"},
    TEST: {"test", "testing"},
}


def load_rows(
    path: str,
    *,
    subset: str | None = None,
    data_files: dict[str, str] | None = None,
) -> "dict[str, datasets.Dataset]":
    """The rows of each split that exists, under the names "train", "validation" and "test".

    Local files are told apart by their names ("train-00000.parquet", "val.jsonl", "test/part.txt"); where no name says
    a split, all of them are "train". A .txt file is one row with the column "text".

    Args:
        path: Name of a data set of the hub, or a local folder or file (parquet, jsonl, txt, or a folder of pictures).
        subset: Configuration of a data set of the hub.
        data_files: Split name to file name or glob pattern below `path`, instead of telling by name.

    Raises:
        ValueError: The path is missing, holds nothing readable, or its files name no split clearly.
    """
    import datasets

    local = Path(path).expanduser()
    if not local.exists():
        return _from_hub(path, subset, data_files)
    files = _named(local, data_files) if data_files else _found(local)
    if not files and local.is_dir() and any(file.suffix.lower() in _IMAGES for file in local.rglob("*.*")):
        return _standard(datasets.load_dataset("imagefolder", data_dir=str(local)))
    kinds = {file.suffix for group in files.values() for file in group}
    if len(kinds) != 1 or not kinds <= set(_BUILDERS):
        found = f"files of several kinds ({', '.join(sorted(kinds))})" if kinds else "no parquet, jsonl or txt files"
        raise ValueError(
            f"path={path!r} holds {found}; name them, for example "
            f"path={str(local if local.is_dir() else local.parent)!r}, data_files={{'train': '*.parquet'}}"
        )
    builder = _BUILDERS[kinds.pop()]
    options = {"sample_by": "document"} if builder == "text" else {}
    names = {split: [str(file) for file in group] for split, group in files.items()}
    return dict(datasets.load_dataset(builder, data_files=names, **options))


def _from_hub(path: str, subset: str | None, data_files: dict[str, str] | None) -> "dict[str, datasets.Dataset]":
    import datasets

    if path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix in _BUILDERS:
        raise ValueError(f"path={path!r} does not exist; write a folder or file, or a data set name as 'user/name'")
    try:
        return _standard(datasets.load_dataset(path, subset, data_files=data_files))
    except (FileNotFoundError, ConnectionError, OSError) as error:
        raise ValueError(
            f"path={path!r} is no local file or folder, and the hub did not give it ({error}); "
            "write for example path='/data/corpus' or path='Salesforce/wikitext', subset='wikitext-2-raw-v1'"
        ) from error


def _standard(found: "datasets.DatasetDict") -> "dict[str, datasets.Dataset]":
    splits = {split: found[name] for split, words in _WORDS.items() for name in found if name in words}
    if not splits:
        raise ValueError(
            f"none of the splits {', '.join(found)} is train, validation or test; write data_files={{...}}"
        )
    return splits


def _named(folder: Path, data_files: dict[str, str]) -> dict[str, list[Path]]:
    files = {}
    for split, pattern in data_files.items():
        if split not in _WORDS:
            raise ValueError(f"data_files names the split {split!r}; write 'train', 'validation' or 'test'")
        files[split] = sorted(folder.glob(pattern)) if folder.is_dir() else []
        if not files[split]:
            raise ValueError(f"data_files[{split!r}]={pattern!r} matches no file below {str(folder)!r}")
    return files


def _found(local: Path) -> dict[str, list[Path]]:
    if local.is_file():
        return {TRAIN: [local]}
    readable = [
        file
        for file in sorted(local.rglob("*"))
        if file.suffix in _BUILDERS and not re.match(r"readme|licen[cs]e", file.name, re.IGNORECASE)
    ]
    splits: dict[str, list[Path]] = {}
    for file in readable:
        words = set(re.split(r"[^a-z]+", file.relative_to(local).as_posix().lower()))
        matching = [split for split, names in _WORDS.items() if words & names]
        splits.setdefault(" ".join(matching), []).append(file)
    if set(splits) == {""}:
        return {TRAIN: readable}
    unclear = [file for name, group in splits.items() if name not in _WORDS for file in group]
    if unclear:
        raise ValueError(
            f"{str(unclear[0])!r} names no split or several, other files beside it do; say which is which, for example "
            f"data_files={{'train': {unclear[0].relative_to(local).as_posix()!r}}}"
        )
    return splits
