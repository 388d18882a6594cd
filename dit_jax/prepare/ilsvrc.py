"""Random access to ImageNet's original archives (ILSVRC 2012) without unpacking them."""

import dataclasses
import functools
import importlib.resources
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dit_jax.data.sources import tar_index
from dit_jax.data.sources.tar_headers import Member, TarScan, opened
from dit_jax.data.sources.tar_index import Row, TarIndex
from dit_jax.data.sources.tars import TarSource
from dit_jax.errors import UserError
from dit_jax.storage.paths import local_path

CLASS_TAR = re.compile(r"(?:.*/)?(n\d{8})\.tar")
VALIDATION_IMAGE = re.compile(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG")


class IlsvrcTrain(TarSource):
    """ILSVRC2012_img_train.tar, which contains one nXXXXXXXX.tar per class; labels number the sorted WordNet ids.

    TFDS and torchvision number the classes in the same way. Examples are ordered by class, then as in the class's tar. The class
    names are the WordNet ids.

    Args:
        path: the file.
        cache_index: whether to read and write the index file next to it (see `tar_index.cached`).

    Raises:
        UserError: the file is damaged, a member is not a class tar, or a class is duplicated or has no images.
    """

    def __init__(self, path: str, cache_index: bool = True):
        file = local_path(path)
        with opened(file):
            index = tar_index.cached([file], "ilsvrc_train", functools.partial(_index_train, file), cache_index)
        if not len(index):
            raise UserError(f"{file} contains no images")
        firsts = np.unique(index.label, return_index=True)[1]
        super().__init__([file], index, len(firsts), [index.name(int(i)).split("/")[0] for i in firsts], "ilsvrc_train")


class IlsvrcValidation(TarSource):
    """ILSVRC2012_img_val.tar; image number k has the k-th label of a list, by default the one in TFDS.

    Examples are ordered as in the tar.

    Args:
        path: the file.
        labels: the WordNet id of every image, in the order of the image numbers.
        class_names: the WordNet ids in the order of their labels; by default the 1,000 sorted ids.
        cache_index: whether to read and write the index file next to it (see `tar_index.cached`).

    Raises:
        UserError: the file is damaged or has members of other names, images are missing or duplicated, a label is not a class, or
            TFDS lacks the list.
    """

    def __init__(
        self, path: str, labels: Sequence[str] | None = None, class_names: Sequence[str] | None = None, cache_index: bool = True
    ):
        file = local_path(path)
        labels = _tfds_list("validation_labels.txt") if labels is None else list(labels)
        class_names = _tfds_list("labels.txt") if class_names is None else list(class_names)
        unknown = sorted(set(labels) - set(class_names))
        if unknown:
            raise UserError(
                f"{file}: {len(unknown)} labels, such as {unknown[0]}, are not among the "
                f"{len(class_names)} classes of the data set ({', '.join(class_names[:3])}, ...)"
            )
        with opened(file):
            index = tar_index.cached([file], "ilsvrc_validation", functools.partial(_index_validation, file), cache_index)
        numbers = np.sort(index.label)  # the index has image numbers in place of labels
        if not np.array_equal(numbers, np.arange(len(labels))):
            missing = sorted(set(range(len(labels))) - set(numbers.tolist()))
            problem = f"image number {missing[0] + 1} is missing" if missing else "some are duplicated or have higher numbers"
            raise UserError(
                f"{file} contains {len(index):,} images, but there are {len(labels):,} labels: {problem}; download it again"
            )
        label_of = {name: label for label, name in enumerate(class_names)}
        by_number = np.array([label_of[name] for name in labels], np.int64)
        index = dataclasses.replace(index, label=by_number[index.label])
        super().__init__([file], index, len(class_names), class_names, "ilsvrc_validation")


def _index_train(file: Path) -> TarIndex:
    with opened(file) as fd:
        class_tars: dict[str, Member] = {}
        for member in TarScan(fd, str(file)):
            name = CLASS_TAR.fullmatch(member.name)
            if not name or name[1] in class_tars:
                raise UserError(
                    f"{file}: member {member.name} is not nXXXXXXXX.tar, or is duplicated; is this ImageNet's train tar?"
                )
            class_tars[name[1]] = member
        return tar_index.scanned(
            functools.partial(_class_rows, fd, file, class_tars[wnid], wnid, label)
            for label, wnid in enumerate(sorted(class_tars))
        )


def _class_rows(fd: int, file: Path, tar: Member, wnid: str, label: int) -> list[Row]:
    scan = TarScan(fd, f"{file}:{tar.name}", tar.offset, tar.offset + tar.size)
    rows = [Row(f"{wnid}/{member.name}", 0, member.offset, member.size, label) for member in scan]
    if not rows:
        raise UserError(f"{scan.what} contains no images; download the file again")
    return rows


def _index_validation(file: Path) -> TarIndex:
    """The index, with image numbers (from 0) in place of labels."""
    rows = []
    with opened(file) as fd:
        for member in TarScan(fd, str(file)):
            name = VALIDATION_IMAGE.fullmatch(member.name)
            if not name or int(name[1]) < 1:
                raise UserError(
                    f"{file}: member {member.name} is not ILSVRC2012_val_<8 digits from 1>.JPEG; is this ImageNet's "
                    "validation tar?"
                )
            rows.append(Row(member.name, 0, member.offset, member.size, int(name[1]) - 1))
    return tar_index.of_rows(rows)


def _tfds_list(name: str) -> list[str]:
    """The lines of one of TFDS's label lists of ImageNet."""
    file = importlib.resources.files("tensorflow_datasets") / "datasets" / "imagenet2012" / name
    try:
        return file.read_text().split()
    except OSError as error:
        raise UserError(f"this tensorflow-datasets lacks {file} ({error.strerror}): install version 4.9.9 or later") from None
