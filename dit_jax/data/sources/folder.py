"""Image files in one folder per class or in a single folder, with captions in text files."""

import collections
import os

import numpy as np

from dit_jax.data.image_files import image_size
from dit_jax.data.sources.listing import (
    CAPTION_SUFFIX,
    LONG_SUFFIX,
    caption_file,
    files_below,
    is_dir,
    of_slice,
    parse_split,
    say_numbering,
    say_what_is_left_out,
    sizes_of,
)
from dit_jax.data.sources.source import Example, caption_text, fingerprint, is_strange
from dit_jax.errors import Unavailable, UserError
from dit_jax.storage.paths import local_path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".ppm", ".tif", ".tiff")


class ImageFolder:
    """Image files in one folder per class, with labels that number the sorted class folders; or in a single folder.

    Class folders are searched recursively. A folder that contains images but no folders is a data set without labels:
    num_classes is 0 and every label is 0, which is the null label of a network for 0 classes. Images are numbered by
    sorted relative path. The text in `name.txt` next to `name.jpg` is the caption of that image, that in `name.long.txt` its long
    caption. Files with other suffixes or none, names that begin with a dot, and folders such as @eaDir and __MACOSX are not part
    of the data set; they are counted and said.

    Args:
        path: the folder that contains the class folders or images, or one that contains such a folder per split.
        split: name of that folder, such as `train`; empty if there are no splits. A slice at its end, as in `train[:90%]` or
            `[300:]`, takes that part of the images in the order of the SHA-256 of their relative paths, whatever their classes
            and names are; `[:300]` and `[300:]` have no image in common.

    Raises:
        UserError: the folder does not exist or has no images, the slice takes none or more than there are, it mixes images and
            class folders, or a class has no images or reaches one folder by two paths, as through a link to a folder above it;
            and from `source[i]`, a file cannot be read (Unavailable) or a caption is not UTF-8.
    """

    def __init__(self, path: str | os.PathLike, split: str = ""):
        if not str(path):
            raise UserError("data.path is empty; give a folder of images, or one that holds one sub-folder of images per class")
        split, part = parse_split(split)
        self.path = path = local_path(path) / split
        layout = f"{path}: expected <path>/<class name>/*.jpg, or <path>/*.jpg (suffixes {', '.join(IMAGE_SUFFIXES)})"
        if not path.is_dir():
            raise UserError(f"image folder {path} {'is not a folder' if path.exists() else 'does not exist'}")
        with os.scandir(path) as entries:
            visible = sorted((e for e in entries if not is_strange(e.name)), key=lambda e: e.name)
        loose = [e.name for e in visible if e.name.lower().endswith(IMAGE_SUFFIXES) and not is_dir(e)]
        self.class_names = tuple(e.name for e in visible if is_dir(e))
        self.num_classes = len(self.class_names)
        if loose and self.class_names:
            raise UserError(f"{len(loose)} images such as {loose[0]} are in no class folder of {layout}; move them")
        if not loose and not self.class_names:
            raise UserError(f"no class folders and no images in {layout}")
        images, labels, texts = [], [], {}
        others: collections.Counter[str] = collections.Counter()
        for label, name in enumerate(self.class_names or [""]):
            files = sorted(files_below(path, name, IMAGE_SUFFIXES, others, {}))
            images += (of_class := [file for file in files if file[0].lower().endswith(IMAGE_SUFFIXES)])
            if not of_class:
                raise UserError(f"class folder {name!r} holds no images, in {layout}; fill or remove it")
            labels += [label] * len(of_class)
            texts |= {text: size for text, size in files if text.endswith(CAPTION_SUFFIX)}
        if part is not None:
            kept = of_slice([name for name, _ in images], part, f"{path}", "images")
            images, labels = [images[i] for i in kept], [labels[i] for i in kept]
        self._files = tuple(name for name, _ in images)
        self.labels = np.asarray(labels, np.int32)
        wanted = {caption_file(name, suffix) for name in self._files for suffix in (CAPTION_SUFFIX, LONG_SUFFIX)}
        captions = sorted((text, texts[text]) for text in wanted & texts.keys())
        self._captions = frozenset(text for text, _ in captions)
        self.has_captions = bool(captions)
        say_what_is_left_out(path, others, "images")
        say_numbering(path, self.class_names)
        facts = {"class_names": self.class_names, "count": len(images), "files": images}
        self.fingerprint = fingerprint(name="image_folder", **facts, **({"captions": captions} if captions else {}))

    def __len__(self) -> int:
        return len(self._files)

    def sizes(self, upright: bool = False) -> np.ndarray:
        """See `Source`: from the headers of the files."""

        def measure(index: int) -> tuple[float, float, float, float]:
            file = self.path / self._files[index]
            try:
                with open(file, "rb") as opened:
                    return 1, *image_size(opened, str(file), upright), 0
            except OSError as error:
                raise Unavailable(f"{file}: {error.strerror}") from error

        return sizes_of(len(self), measure)

    def __getitem__(self, index: int) -> Example:
        name = self._files[index]
        example: Example = {"image": self._read(name), "label": int(self.labels[index]), "name": str(self.path / name)}
        short, long = (caption_file(name, suffix) for suffix in (CAPTION_SUFFIX, LONG_SUFFIX))
        if short in self._captions:
            example["caption"] = caption_text(self._read(short), str(self.path / short))
        if long in self._captions:
            example["caption_long"] = caption_text(self._read(long), str(self.path / long))
        return example

    def _read(self, name: str) -> bytes:
        file = self.path / name
        try:
            return file.read_bytes()
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            raise Unavailable(f"{file}: {error.strerror}; the folder changed after it was listed, restore it", missing) from error
