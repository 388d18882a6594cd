"""The protocol of data sets: random access to undecoded examples.

Letters: H, W, C are the height, width and channels of an image as stored.
"""

import hashlib
import json
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np

from dit_jax.errors import UserError

# Folders of previews and rubbish that a NAS, a file manager or an operating system puts beside one's files.
STRANGE_FOLDERS = frozenset(
    ("@eaDir", "#recycle", "@Recycle", "@tmp", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)
MAX_CAPTION_BYTES = 1 << 20


class Example(TypedDict):
    """One record of a source; `name` is its name in error messages, `caption` a text that describes the image.

    `caption_long` is a second text, often one that a captioner wrote. A clip has `video` in place of `image`: uint8 [F, H, W, C],
    or a file that is decoded when its frames are taken (`data.stored_clips.StoredClip`), and `fps`, its frames per second.
    """

    image: NotRequired[np.ndarray | bytes]
    video: NotRequired[Any]
    fps: NotRequired[float]
    label: int
    name: NotRequired[str]
    caption: NotRequired[str]
    caption_long: NotRequired[str]


class Source(Protocol):
    """A data set with random access to its examples, from many threads at once.

    It is pickled into the worker processes of the loader, so files are opened on first use and are not pickled. `fingerprint`
    changes if the examples or their numbering change; resuming compares it. A source that knows the labels without reading the
    examples may also have `labels`, integer [N]. One that knows sizes without decoding may have `sizes()`: [N, 4] of (frames,
    height, width, frames per second), 0 where it does not know, by which buckets choose their examples. If its examples are image
    files, it takes the argument `upright` of `data.image_files.decode`.
    """

    num_classes: int
    class_names: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Example with `image` uint8 [H, W, C] or the bytes of an image file, and `label` in [0, num_classes)."""
        ...


def fingerprint(**facts: Any) -> str:
    """First 16 hex digits of the SHA-256 of the facts that identify a data set, written as sorted JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def is_strange(name: str) -> bool:
    """Whether a file or folder is hidden, or one of STRANGE_FOLDERS: it is no part of a data set."""
    return name.startswith(".") or name in STRANGE_FOLDERS


def caption_text(text: bytes, name: str) -> str:
    """Decodes a caption, UTF-8 with or without a byte order mark, and strips white space.

    Args:
        name: name of the caption in the error message.

    Raises:
        UserError: the caption is not UTF-8, or longer than MAX_CAPTION_BYTES.
    """
    if len(text) > MAX_CAPTION_BYTES:
        raise UserError(f"the caption {name} has {len(text):,} bytes; at most {MAX_CAPTION_BYTES:,} are read")
    try:
        return text.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"the caption {name} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error
