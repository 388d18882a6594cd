"""Writes a TFDS data set of ArrayRecord shards (records, shards, metadata) without TensorFlow."""

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from dit_jax.errors import UserError
from dit_jax.storage.atomic import commit, partial_path

WRITER_OPTIONS = "group_size:1,uncompressed"  # one record per chunk, for random access; images do not compress further


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns write errors inside the context into a UserError that names `path`; array_record raises RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{path} cannot be written ({error}): free space there, or make it writable, and run the same command "
            "again; finished shards are kept"
        ) from None


def shard_path(folder: Path, dataset: str, split: str, number: int, count: int) -> Path:
    """Path of shard `number` of `count`, named as in TFDS."""
    return folder / f"{dataset}-{split}.array_record-{number:05d}-of-{count:05d}"


def tf_example(fields: Mapping[str, bytes | int | Sequence[bytes]]) -> bytes:
    """Serialises a tf.train.Example of bytes, of several bytes, and of integers >= 0, with features sorted by name.

    TFDS's own serialiser orders the features differently in every process, so that files would differ.
    Source: Protocol Buffers, "Encoding"; TensorFlow's example.proto and feature.proto for the numbers of the fields.
    """
    features = b""
    for key, value in sorted(fields.items()):
        if isinstance(value, int):
            feature = _field(3, _field(1, _varint(value)))
        else:
            feature = _field(1, b"".join(_field(1, one) for one in ([value] if isinstance(value, bytes) else value)))
        features += _field(1, _field(1, key.encode()) + _field(2, feature))
    return _field(1, features)


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def write_shard(file: Path, records: Iterable[bytes]) -> tuple[int, int]:
    """Writes an ArrayRecord file, syncs it to disk and reads it back; returns (records, bytes).

    The file is removed if that fails or if `records` raises.

    Raises:
        UserError: the disk is full or refuses the write, or the file does not hold all records.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    partial = partial_path(file)
    with writing(file):
        writer = ArrayRecordWriter(str(partial), WRITER_OPTIONS)
    count = 0
    try:
        for record in records:
            with writing(file):
                writer.write(record)
            count += 1
        with writing(file):  # a full disk is reported here
            writer.close()
            stored, size = measure(partial)
        if stored != count:
            raise UserError(
                f"{file} holds only {stored} of the {count} records written: check the disk and run the command again"
            )
        with writing(file):
            commit(partial, file)
        return count, size
    except BaseException:
        with contextlib.suppress(RuntimeError):
            writer.close()
        partial.unlink(missing_ok=True)
        raise


def measure(file: Path) -> tuple[int, int]:
    """(records, bytes) of an ArrayRecord file. Raises OSError or RuntimeError if it is not one."""
    from array_record.python.array_record_module import ArrayRecordReader

    size = file.stat().st_size
    reader = ArrayRecordReader(str(file))
    count = reader.num_records()
    reader.close()
    return count, size


def write_metadata(
    folder: Path,
    dataset: str,
    splits: dict[str, list[tuple[int, int]]],
    class_names: Sequence[str],
    captions: bool,
    size: tuple[int, int] | None,
) -> None:
    """Writes TFDS's metadata of the shards in <data_dir>/<dataset>/<version>; replaces that of an earlier call.

    Features: "image"; "label" if there are class names; "caption" (Text) if `captions`.

    Args:
        splits: {name: [(records, bytes) of each shard]}.
        size: (height, width) of PNGs; None for images of any size and format.
    """
    import tensorflow_datasets as tfds

    shape = (*(size or (None, None)), 3)
    features = {"image": tfds.features.Image(shape=shape, encoding_format="png" if size else None)}
    if class_names:
        features["label"] = tfds.features.ClassLabel(names=list(class_names))
    if captions:
        features["caption"] = tfds.features.Text()
    template = tfds.core.ShardedFileTemplate(
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        dataset_name=dataset,
        data_dir=str(folder),
        filetype_suffix="array_record",
    )
    infos = [
        tfds.core.SplitInfo(
            name=name,
            shard_lengths=[records for records, _ in shards],
            num_bytes=sum(size for _, size in shards),
            filename_template=template,
        )
        for name, shards in sorted(splits.items())
    ]
    with writing(folder):  # TFDS writes its files in place; here they appear by rename
        partial = partial_path(folder / "metadata")
        try:
            partial.mkdir()
            names = {shard_path(partial, dataset, name, 0, len(shards)) for name, shards in splits.items()}
            for shard in names:  # TFDS looks for one
                shard.touch()
            tfds.folder_dataset.write_metadata(
                data_dir=str(partial),
                features=tfds.features.FeaturesDict(features),
                split_infos=infos,
                version=folder.name,
                check_data=False,  # the check reads with TensorFlow
            )
            for file in sorted(set(partial.iterdir()) - names):
                commit(file, folder / file.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
