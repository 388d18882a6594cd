"""Long captions that a captioner wrote for a data set, in a file beside it: one JSON object in each line.

    {"name": "bees/0017.jpg", "caption_long": "Three bees on a sunflower, seen from above.", "model": "my_captioner"}

`name` is the path of an image within its folder, or "<tar>:<key>" of a sample in a tar. Other fields are ignored.
"""

import collections
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dit_jax.data.sources.source import MAX_CAPTION_BYTES, caption_text
from dit_jax.errors import UserError
from dit_jax.storage.bounded import json_object
from dit_jax.storage.paths import local_path

FORM = {"name": str, "caption_long": str, "model": str}
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Recaptions:
    """The long captions of a file; they are held in memory.

    Fields:
        path: the file, for messages.
        sha256: of its bytes.
        texts: {name of the image: (long caption, name of the captioner)}.
    """

    path: str
    sha256: str
    texts: Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Matched:
    """What a file of long captions means for the images of one split.

    Fields:
        texts: {number of the image: long caption}.
        models: {captioner: number of images that have its caption}, sorted by name.
        without: number of images that have none in the file.
    """

    texts: Mapping[int, str]
    models: dict[str, int]
    without: int


def read_recaptions(path: str | os.PathLike) -> Recaptions:
    """Reads a file of long captions. Empty lines are skipped.

    Raises:
        UserError: the file cannot be read, or has no captions; a line is too long, not UTF-8, no object with the three texts, or
            has an empty one; two lines have the same name.
    """
    texts: dict[str, tuple[str, str]] = {}
    lines: dict[str, int] = {}
    digest = hashlib.sha256()
    try:
        with open(local_path(path), "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(2 * MAX_CAPTION_BYTES), b""), 1):
                digest.update(line)
                what = f"line {number} of {path}"
                if len(line) == 2 * MAX_CAPTION_BYTES and not line.endswith(b"\n"):
                    raise UserError(f"{what} has more than {2 * MAX_CAPTION_BYTES:,} bytes; shorten the caption")
                try:
                    text = line.decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    raise UserError(f"{what} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
                if not text.strip():
                    continue
                name, caption, model = _fields(text, what)
                if name in texts:
                    raise UserError(f"{what} and line {lines[name]} are both of {name!r}; leave one")
                texts[name], lines[name] = (caption, model), number
    except OSError as error:
        raise UserError(f"the captions {path} cannot be read ({error.strerror})") from None
    if not texts:
        raise UserError(f"the captions {path} hold no line; write an object with {', '.join(FORM)} in each")
    return Recaptions(str(path), digest.hexdigest(), texts)


def _fields(line: str, what: str) -> tuple[str, str, str]:
    fields = json_object(line, what, 'write {"name": ..., "caption_long": ..., "model": ...}', FORM)
    caption = caption_text(fields["caption_long"].encode("utf-8", "surrogatepass"), what)
    for field, value in (("name", fields["name"]), ("caption_long", caption), ("model", fields["model"].strip())):
        if not value:
            raise UserError(f"{what} has an empty {field}; write it, or remove the line")
    return fields["name"], caption, fields["model"].strip()


def match(recaptions: Recaptions, names: Mapping[str, Iterable[str]]) -> tuple[dict[str, Matched], list[str]]:
    """Gives the captions to the images of the same name.

    Args:
        names: {split: the name of each of its images}.

    Returns:
        ({split: its captions}, the names in the file that no image has).

    Raises:
        UserError: no name of the file is that of an image.
    """
    found, used, last = {}, set(), ""
    for split, own in names.items():
        texts, models, count = {}, collections.Counter(), 0
        for i, name in enumerate(own):
            count, last = i + 1, name
            if name in recaptions.texts:
                texts[i], model = recaptions.texts[name]
                models[model] += 1
                used.add(name)
        found[split] = Matched(texts, dict(sorted(models.items())), count - len(texts))
    if not used:
        raise UserError(
            f"none of the {len(recaptions.texts):,} names in {recaptions.path} is that of an image: they are like "
            f"{next(iter(recaptions.texts))!r}, those of the images like {last!r}"
        )
    return found, [name for name in recaptions.texts if name not in used]


def report(recaptions: Recaptions, found: Mapping[str, Matched], unknown: Sequence[str]) -> list[str]:
    """Lines for the user: which images have a long caption, by which captioner, and which names belong to no image."""
    lines = []
    for split, matched in found.items():
        models = ", ".join(f"{count:,} by {model}" for model, count in matched.models.items())
        line = f"{split}: {len(matched.texts):,} images have a long caption from {recaptions.path} ({models or 'none'})"
        if matched.without:
            line += f"; {matched.without:,} have none there and keep what they have"
        lines.append(line)
    if unknown:
        shown = ", ".join(json.dumps(name, ensure_ascii=False) for name in unknown[:SHOWN])
        more = ", ..." if len(unknown) > SHOWN else ""
        lines.append(f"{len(unknown):,} names in {recaptions.path} are of no image and are left out: {shown}{more}")
    return lines
