"""Image files in one folder per class or in a single folder, with captions in text files."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dit_jax.data.sources.source import Example, caption_text, fingerprint
from dit_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
CAPTION_SUFFIX = ".txt"


class ImageFolder:
    """Image files in one folder per class, with labels that number the sorted class folders; or in a single folder.

    Class folders are searched recursively. A folder that contains images but no folders is a data set without labels:
    num_classes is 0 and every label is 0, which is the null label of a network for 0 classes. Images are numbered by
    sorted relative path. The text in `name.txt` next to `name.jpg` is the caption of that image. Files with other suffixes and
    names that begin with a dot are not part of the data set.

    Args:
        path: the folder that contains the class folders or images, or one that contains such a folder per split.
        split: name of that folder, such as `train`; empty if there are no splits.

    Raises:
        UserError: the folder does not exist or has no images, it mixes images and class folders, or a class has no images; and
            from `source[i]`, a file cannot be read or a caption is not UTF-8.
    """

    def __init__(self, path: str | os.PathLike, split: str = ""):
        if not str(path):
            raise UserError("data.path is empty; give a folder of images, or one that holds one sub-folder of images per class")
        self.path = path = Path(path).expanduser() / split
        layout = f"{path}: expected <path>/<class name>/*.jpg, or <path>/*.jpg (suffixes {', '.join(IMAGE_SUFFIXES)})"
        if not path.is_dir():
            raise UserError(f"image folder {path} {'is not a folder' if path.exists() else 'does not exist'}")
        with os.scandir(path) as entries:
            visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        loose = [e.name for e in visible if e.is_file() and e.name.lower().endswith(IMAGE_SUFFIXES)]
        self.class_names = tuple(e.name for e in visible if e.is_dir())
        self.num_classes = len(self.class_names)
        if loose and self.class_names:
            raise UserError(f"{len(loose)} images such as {loose[0]} are in no class folder of {layout}; move them")
        if not loose and not self.class_names:
            raise UserError(f"no class folders and no images in {layout}")
        images, labels, texts = [], [], {}
        for label, name in enumerate(self.class_names or [""]):
            files = sorted(_files_below(path, name))
            images += (of_class := [file for file in files if file[0].lower().endswith(IMAGE_SUFFIXES)])
            if not of_class:
                raise UserError(f"class folder {name!r} holds no images, in {layout}; fill or remove it")
            labels += [label] * len(of_class)
            texts |= {text: size for text, size in files if text.endswith(CAPTION_SUFFIX)}
        self._files = tuple(name for name, _ in images)
        self.labels = np.asarray(labels, np.int32)
        captions = sorted((text, texts[text]) for text in {_caption_file(name) for name in self._files} & texts.keys())
        self._captions = frozenset(text for text, _ in captions)
        self.has_captions = bool(captions)
        facts = {"class_names": self.class_names, "count": len(images), "files": images}
        self.fingerprint = fingerprint(name="image_folder", **facts, **({"captions": captions} if captions else {}))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        name = self._files[index]
        example: Example = {"image": self._read(name), "label": int(self.labels[index]), "name": str(self.path / name)}
        text = _caption_file(name)
        if text in self._captions:
            example["caption"] = caption_text(self._read(text), str(self.path / text))
        return example

    def _read(self, name: str) -> bytes:
        file = self.path / name
        try:
            return file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}; the folder changed after it was listed, restore it") from error


def _caption_file(image_file: str) -> str:
    return image_file.rpartition(".")[0] + CAPTION_SUFFIX


def _files_below(root: Path, folder: str) -> Iterator[tuple[str, int]]:
    """Yields (path relative to root, size in bytes) of every image and text under root/folder, following links."""
    with os.scandir(root / folder) as entries:
        for entry in entries:
            relative = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _files_below(root, relative)
            elif entry.name.lower().endswith(IMAGE_SUFFIXES) or entry.name.endswith(CAPTION_SUFFIX):
                yield relative, _size(entry)


def _size(entry: os.DirEntry) -> int:
    """Size in bytes; -1 for a broken link, which becomes a bad record on reading."""
    try:
        return entry.stat().st_size
    except OSError:
        return -1
