"""Small drawn data sets in the columns, wording and layout of the official ones.

The folder mirrors the names of the hub, so that the tasks of lmms-eval run untouched from inside
it: `load_dataset("lmms-lab-encoder/POPE")` prefers a directory of that relative name.
"""

import io
import re
from pathlib import Path
from typing import Any

from PIL import Image

from eval.benchmarks.data import front_matter
from eval.nano.draw import SIDE
from eval.nano.further_sets import FURTHER_SETS
from eval.nano.paper_sets import PAPER_SETS, ocrbench
from eval.nano.studio import Split, Studio

SIZES = {"quick": 40, "full": 400, "sample": 160}  # questions per set, about
# OCRBench's score is points out of 1000 whatever the number of rows: only 1000 rows read as one.
OCRBENCH_FULL = 1000
_IMAGES = re.compile(r"image(_\d)?")  # columns that hold pictures


def build(
    size: str, images: str = "small", blank: bool = False, further: bool = False
) -> list[Split]:
    """Draw the paper's eight sets, and the further ones if asked for.

    Args:
        size: quick, full or sample, each of other pictures.
        images: small or large.
        blank: hide every picture and keep every question.
        further: also draw what the embedded model was not trained for.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    number = SIZES[size]
    splits = []
    for seed, make in enumerate((*PAPER_SETS, *(FURTHER_SETS if further else ()))):
        studio = Studio(9000 + 10 * seed + list(SIZES).index(size), images, blank)
        rows = OCRBENCH_FULL if make is ocrbench and size == "full" else number
        splits += make(studio, rows)
    return splits


def write(
    out: Path, size: str, images: str = "small", blank: bool = False, further: bool = False
) -> Path:
    """Write the folder from which lmms-eval runs; an existing one of the same kind is kept."""
    stamp = f"{size} {images}{' blank' if blank else ''}{' further' if further else ''}\n"
    done = out / "COMPLETE"
    if done.is_file() and done.read_text() == stamp:
        return out
    splits = build(size, images, blank, further)
    for split in splits:
        _write_parquet(out, split)
    for repository in {s.repository for s in splits}:
        _write_card(out / repository, [s for s in splits if s.repository == repository])
    done.write_text(stamp)
    return out


def _file(split: Split) -> str:
    folder = "data" if split.config == "default" else split.config
    return f"{folder}/{split.split}-00000-of-00001.parquet"


def _write_parquet(out: Path, split: Split) -> None:
    import datasets

    path = out / split.repository / _file(split)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {key: [row[key] for row in split.rows] for key in split.rows[0]}
    images = [key for key in columns if _IMAGES.fullmatch(key)]
    table = datasets.Dataset.from_dict(
        columns | {k: [_stored(v) for v in columns[k]] for k in images}
    )
    for key in images:
        several = isinstance(columns[key][0], list)
        feature = datasets.Sequence(datasets.Image()) if several else datasets.Image()
        table = table.cast_column(key, feature)
    datasets.disable_progress_bars()  # one a file, for a moment each
    table.to_parquet(str(path))


def _stored(value: Any) -> Any:
    """A picture as parquet keeps it; of several, each; of none, none."""
    if isinstance(value, list):
        return [_stored(image) for image in value]
    return None if value is None else {"bytes": _png(value), "path": None}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def _write_card(folder: Path, splits: list[Split]) -> None:
    """Say which files make up which configuration, and what they are."""
    head = front_matter((split.config, split.split, [_file(split)]) for split in splits)
    text = (
        f"\nDrawn stand-in for `{splits[0].repository}`: {len(splits[0].rows)} questions about "
        f"pictures of about {SIDE} pixels, made by `python -m eval.nano data`. "
        "Nothing of the original data set is in it.\n"
    )
    (folder / "README.md").write_text(head + text)
