"""Small tars and images for the tests of tar sources and of prepare."""

import io
import tarfile

import numpy as np
from PIL import Image


def encoded(value: int, kind: str = "PNG", size=(12, 10), mode="RGB") -> bytes:
    """An image file whose pixels depend on `value`."""
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], len(mode)), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, kind)
    return file.getvalue()


def tar_bytes(members, form=tarfile.PAX_FORMAT) -> bytes:
    """A tar of {name: bytes}, or of pairs; None instead of bytes is a folder, a TarInfo instead of a name stays as it is."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
            info.size = len(data or b"")
            tar.addfile(info, io.BytesIO(data or b""))
    return file.getvalue()


def write_tar(path, members, form=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, form))
    return path


def write_ilsvrc_train(path, classes: dict[str, int]):
    """A tar of class tars, {wnid: number of images}, in the order given; returns {name of the image: bytes}."""
    images, outer = {}, {}
    for wnid, count in classes.items():
        files = {f"{wnid}_{i}.JPEG": encoded(len(images) + i, "JPEG") for i in range(count)}
        images |= files
        outer[f"{wnid}.tar"] = tar_bytes(files)
    write_tar(path, outer)
    return images


def write_ilsvrc_validation(path, count: int):
    files = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": encoded(1000 + i, "JPEG") for i in range(count)}
    write_tar(path, dict(reversed(files.items())))
    return files
