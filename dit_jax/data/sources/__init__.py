"""Data sets as random access: a number in, one undecoded example out.

Letters: H, W, C are the height, width and channels of an image as stored.
"""

import functools
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np

from dit_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
CAPTION_SUFFIX = ".txt"


class Example(TypedDict):
    """One record of a source; `name` is what an error message calls it, `caption` a text that describes the image."""

    image: np.ndarray | bytes
    label: int
    name: NotRequired[str]
    caption: NotRequired[str]


class Source(Protocol):
    """A data set that gives example i in any order, from many threads at once.

    It is pickled into the worker processes of the loader, so files are opened on first use and never travel.
    `fingerprint` changes when the examples or their numbering do: resuming compares it.
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


class Digits:
    """1,797 handwritten digits, uint8 [8, 8, 1], ten classes: the smallest real image data set; needs no download.

    Args:
        split: "train" is the first 1,500, "test" the last 297 (other writers), "all" both.

    Raises:
        UserError: unknown split.
    Source: scikit-learn `load_digits`, intensities 0..16 mapped to round(255 v / 16).
    """

    num_classes = 10
    class_names = tuple("0123456789")

    def __init__(self, path: str = "", split: str = "all"):
        if path:
            raise UserError(f"data.path is {path!r}, but the digits come with scikit-learn: leave it empty")
        splits = {"all": slice(None), "train": slice(1500), "test": slice(1500, None)}
        if split not in splits:
            raise UserError(f"the digits have no split {split!r}: choose one of {', '.join(splits)}")
        from sklearn.datasets import load_digits

        digits = load_digits()
        self._images = np.round(digits.images * 255 / 16).astype(np.uint8)[splits[split], :, :, None]
        self._labels = digits.target[splits[split]]
        self.fingerprint = fingerprint(
            name="digits",
            version=hashlib.sha256(self._images.tobytes() + self._labels.astype("<i4").tobytes()).hexdigest(),
            split=split,
            count=len(self._images),
            class_names=self.class_names,
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        return {"image": self._images[index], "label": int(self._labels[index]), "name": f"digit {index}"}


class ImageFolder:
    """Image files under one folder per class, labels numbering the class folders in sorted order; or a flat folder.

    Class folders are searched to any depth. A folder that holds images and no folders is a data set without labels:
    num_classes is 0 and every label is 0, which is the null label of a network for 0 classes. Images are numbered by
    sorted relative path. The text in `name.txt` beside `name.jpg` is that image's caption. Files of other suffixes and
    names that begin with a dot are not part of the data set.

    Args:
        path: the folder that holds the class folders or images, or one that holds such a folder per split.
        split: name of that folder, as in `train`; empty if there are no splits.

    Raises:
        UserError: no such folder, no images, images beside class folders, a class without images; and from `source[i]`,
            a file that cannot be read or a caption that is not UTF-8.
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
            found = sorted(_files_below(path, name))
            images += (of_class := [file for file in found if file[0].lower().endswith(IMAGE_SUFFIXES)])
            if not of_class:
                raise UserError(f"class folder {name!r} holds no images, in {layout}; fill or remove it")
            labels += [label] * len(of_class)
            texts |= {text: size for text, size in found if text.endswith(CAPTION_SUFFIX)}
        self._files = tuple(name for name, _ in images)
        self._labels = np.asarray(labels, np.int32)
        captions = sorted((text, texts[text]) for text in {_caption_file(name) for name in self._files} & texts.keys())
        self._captions = frozenset(text for text, _ in captions)
        self.has_captions = bool(captions)
        facts = {"class_names": self.class_names, "count": len(images), "files": images}
        self.fingerprint = fingerprint(name="image_folder", **facts, **({"captions": captions} if captions else {}))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        name = self._files[index]
        example: Example = {"image": self._read(name), "label": int(self._labels[index]), "name": str(self.path / name)}
        text = _caption_file(name)
        if text in self._captions:
            example["caption"] = _caption(self._read(text), str(self.path / text))
        return example

    def _read(self, name: str) -> bytes:
        file = self.path / name
        try:
            return file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}; the folder changed after it was listed, restore it") from error


def _caption_file(image_file: str) -> str:
    return image_file.rpartition(".")[0] + CAPTION_SUFFIX


def _caption(text: bytes, name: str) -> str:
    try:
        return text.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"the caption {name} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error


def _files_below(root: Path, folder: str) -> Iterator[tuple[str, int]]:
    """(path relative to root, size in bytes) of every image and text under root/folder, links followed."""
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
    """In bytes; -1 for a link that leads nowhere, which reading will find to be a bad record."""
    try:
        return entry.stat().st_size
    except OSError:
        return -1


class TFDS:
    """A TensorFlow Datasets data set read by random access, images left encoded; needs no TensorFlow.

    Nothing is downloaded or prepared: the data set must lie at `path` in a format with random access (array_record).

    Args:
        dataset: as TFDS writes it, `imagenet2012`, `name/config` or `name/config:1.0.0`.
        path: the TFDS data_dir, the folder that holds a folder called `dataset`.
        split: a split or a slice of one, `train`, `train[:50%]`.
        image_key: name of the Image feature.
        label_key: name of the ClassLabel feature; None reads a data set without labels: num_classes is 0 and every
            label is 0, which is the null label of a network for 0 classes.
        caption_key: name of the Text feature that describes the image; None for no captions.

    Raises:
        UserError: no such data set, split or feature, no random access, shards missing; and from
            `source[i]`, a record that cannot be read.
    """

    def __init__(
        self,
        dataset: str,
        path: str,
        split: str,
        image_key: str = "image",
        label_key: str | None = "label",
        caption_key: str | None = None,
    ):
        if not path:
            raise UserError(f"data.path is empty; give the TFDS folder (data_dir) that holds {dataset}")
        self.dataset, self.path, self.split = dataset, os.path.expanduser(path), split
        self.image_key, self.label_key, self.caption_key = image_key, label_key, caption_key
        self._lock = threading.Lock()
        info = self._builder.info
        self._check_features(info.features)
        self._check_split(info)
        # Reads no file yet; where the data set has several formats, info.splits now means the array_record files.
        self._length = len(self._records)
        self._check_shards(info)
        label = info.features[label_key] if label_key is not None else None
        self.num_classes = label.num_classes if label is not None else 0
        self.class_names = tuple(label.names) if label is not None else ()
        self.fingerprint = fingerprint(
            name=info.full_name,
            split=split,
            count=self._length,
            class_names=self.class_names,
            shards=[[os.path.basename(i.filename), i.skip, i.take] for i in info.splits[split].file_instructions],
            **({} if caption_key is None else {"caption_key": caption_key}),
        )

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_builder", "_records")}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())

    @functools.cached_property
    def _builder(self):
        import tensorflow_datasets as tfds

        root = tfds.core.Path(self.path)
        if not root.exists():
            raise UserError(f"TFDS folder {self.path} does not exist: pass the data_dir the data set was prepared in")
        try:
            builder = tfds.builder(self.dataset, data_dir=self.path, try_gcs=False)
        except (tfds.core.DatasetNotFoundError, ValueError, AssertionError, ImportError) as error:
            raise self._not_found(root) from error
        if not (tfds.core.Path(builder.data_dir) / "dataset_info.json").exists():
            raise self._not_found(root)
        return builder

    def _not_found(self, root) -> UserError:
        found = ", ".join(sorted(p.name for p in root.iterdir())[:20]) or "nothing"
        hint = ""
        if (root / "dataset_info.json").exists():
            hint = "; this is the folder of one version: pass the folder that holds the folder of the data set"
        return UserError(
            f"TFDS data set {self.dataset!r} is not prepared in {self.path}, which holds {found}{hint}. Prepare it with "
            f"tfds.builder({self.dataset!r}, data_dir={self.path!r}, file_format='array_record').download_and_prepare()"
        )

    def _check_features(self, features) -> None:
        import tensorflow_datasets as tfds

        wanted = [("image_key", self.image_key, tfds.features.Image)]
        if self.label_key is not None:
            wanted.append(("label_key", self.label_key, tfds.features.ClassLabel))
        if self.caption_key is not None:
            wanted.append(("caption_key", self.caption_key, tfds.features.Text))
        for argument, key, kind in wanted:
            if key not in features or not isinstance(features[key], kind):
                listing = ", ".join(f"{k}: {type(v).__name__}" for k, v in features.items())
                what = {"label_key": "labels", "caption_key": "captions"}.get(argument)
                remedy = f"; {argument}=None reads it without {what}" if what else ""
                raise UserError(f"{argument}={key!r} names no {kind.__name__} feature of {self.dataset} ({listing}){remedy}")

    def _check_split(self, info) -> None:
        written = sorted(f.value for f in info.available_file_formats())
        if "array_record" not in written:
            raise UserError(
                f"{self.dataset} in {self.path} is written as {' and '.join(written)}, which has no random access: "
                f"prepare it with file_format='array_record', or convert it with the TFDS script convert_format"
            )
        try:
            count = info.splits[self.split].num_examples
        except (KeyError, ValueError, AssertionError) as error:
            raise UserError(
                f"{self.dataset} has no split {self.split!r}: it has {', '.join(info.splits) or 'none'}; slices are "
                f"written train[:50%]"
            ) from error
        if not count:
            raise UserError(f"split {self.split!r} of {self.dataset} is empty")

    def _check_shards(self, info) -> None:
        files = {os.path.basename(i.filename) for i in info.splits[self.split].file_instructions}
        folder = info.data_dir
        # On a bucket (gs://) the reader is the first to tell.
        missing = sorted(files - set(os.listdir(folder)) if os.path.isdir(folder) else ())
        if missing:
            raise UserError(
                f"{len(missing)} of {len(files)} shards of {self.dataset} split {self.split!r} are missing from {folder}, "
                f"the first is {missing[0]}: copy or prepare the data set again"
            )

    @functools.cached_property
    def _records(self):
        import tensorflow_datasets as tfds

        # Undecoded, the image needs no TensorFlow here and keeps the transform in charge of its pixels.
        decoders = {self.image_key: tfds.decode.SkipDecoding()}
        return self._builder.as_data_source(split=self.split, decoders=decoders, file_format="array_record")

    @property
    def text_features(self) -> tuple[str, ...]:
        """Names of the features that could be a caption_key."""
        import tensorflow_datasets as tfds

        return tuple(name for name, kind in self._builder.info.features.items() if isinstance(kind, tfds.features.Text))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        with self._lock:  # two threads must not open the files twice
            records = self._records
        name = f"{self.dataset} split {self.split!r} record {index}"
        try:
            record = records[index]
        except Exception as error:  # array_record raises its own kinds for a broken chunk, tfds others for a bad field
            raise UserError(f"{name} in {self.path} cannot be read ({error}): copy that shard again") from error
        image, label = record[self.image_key], 0 if self.label_key is None else record[self.label_key]
        caption = b"" if self.caption_key is None else record[self.caption_key]
        if not image or label is None or caption is None:  # what array_record makes of some truncated files
            raise UserError(f"{name} in {self.path} is empty: copy that shard again")
        if self.label_key is not None and not 0 <= label < self.num_classes:
            raise UserError(f"{name} has label {label}, outside [0, {self.num_classes}): prepare the data set again")
        example: Example = {"image": image, "label": int(label), "name": name}
        if self.caption_key is not None:
            example["caption"] = _caption(caption, f"of {name}")
        return example
