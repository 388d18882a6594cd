"""Random access to TensorFlow Datasets, without TensorFlow."""

import contextlib
import errno
import functools
import importlib.util
import os
import reprlib
import threading
from collections.abc import Iterator
from typing import Any

from dit_jax.data.sources import tf_examples
from dit_jax.data.sources.source import Example, caption_text, fingerprint
from dit_jax.data.stored_clips import FrameFiles
from dit_jax.errors import Unavailable, UserError
from dit_jax.storage.bounded import parsed

# TFDS imports the module of any other name in features.json, which runs the code in it.
FEATURE_TYPES = frozenset(
    f"tensorflow_datasets.core.features.{name}"
    for name in (
        "audio_feature.Audio",
        "bounding_boxes.BBoxFeature",
        "class_label_feature.ClassLabel",
        "dataset_feature.Dataset",
        "feature.Tensor",
        "features_dict.FeaturesDict",
        "image_feature.Image",
        "labeled_image.LabeledImage",
        "scalar.Scalar",
        "sequence_feature.Sequence",
        "tensor_feature.Tensor",
        "text_feature.Text",
        "translation_feature.Translation",
        "translation_feature.TranslationVariableLanguages",
        "video_feature.Video",
    )
)
TYPE_KEYS = ("pythonClassName", "python_class_name", "type")  # of today's files, in both spellings of a protocol buffer; of older
DEEPEST = 50  # of nested values in features.json

_OF_THE_STORAGE = ("NOT_FOUND", "UNAVAILABLE", "DEADLINE_EXCEEDED", *map(os.strerror, (errno.ENOENT, errno.EIO, errno.ESTALE)))
DEFAULT_FOLDER = "~/tensorflow_datasets"  # as in TFDS
_VIDEO = threading.Lock()  # held while TFDS's class is changed


class TFDS:
    """A TensorFlow Datasets data set with random access and encoded images; TensorFlow is not needed.

    Nothing is downloaded or prepared: the data set must exist at `path` in a format with random access (array_record).

    Args:
        dataset: name in TFDS: `imagenet2012`, `name/config` or `name/config:1.0.0`.
        path: the TFDS data_dir, the folder that contains a folder called `dataset`; empty for TFDS's default, $TFDS_DATA_DIR
            or ~/tensorflow_datasets.
        split: a split or a slice of one: `train`, `train[:50%]`.
        image_key: name of the Image feature.
        label_key: name of the ClassLabel feature; None reads a data set without labels: num_classes is 0 and every
            label is 0, which is the null label of a network for 0 classes.
        caption_key: name of the Text feature that describes the image; None for no captions.
        caption_long_key: the same of a second, long caption.
        video_key: name of the Video feature of clips, in place of `image_key`; None for images. TFDS stores each frame as an
            image file.
        fps: frames per second of the clips, which TFDS does not store; None if it is not known.

    Raises:
        UserError: the data set, split or feature does not exist, there is no random access, or shards are missing; and from
            `source[i]`, a record cannot be read (Unavailable where the storage does not give it).
    """

    def __init__(
        self,
        dataset: str,
        path: str,
        split: str,
        image_key: str = "image",
        label_key: str | None = "label",
        caption_key: str | None = None,
        caption_long_key: str | None = None,
        video_key: str | None = None,
        fps: float | None = None,
    ):
        if fps is not None and (video_key is None or not 0 < fps < float("inf")):
            raise UserError(f"data.fps={fps} is the rate of clips, above 0, and needs data.video_key; set it to None otherwise")

        path = path or os.environ.get("TFDS_DATA_DIR") or DEFAULT_FOLDER
        self.dataset, self.path, self.split = dataset, os.path.expanduser(path), split
        self.image_key, self.label_key, self.caption_key = image_key, label_key, caption_key
        self.caption_long_key, self.has_captions = caption_long_key, caption_key is not None
        self.video_key, self.fps = video_key, fps
        self._lock = threading.Lock()
        info = self._builder.info
        self._folder = str(info.data_dir)
        self._check_features(info.features)
        self._check_split(info)
        # Reads no file yet. If the data set has several formats, info.splits now refers to the array_record files.
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
            **({} if caption_long_key is None else {"caption_long_key": caption_long_key}),
            **({} if video_key is None else {"video_key": video_key, "fps": fps}),
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
            raise UserError(
                f"the TFDS folder {self.path} does not exist; give the data_dir of {self.dataset} (--config.data.path=...), or "
                f"{self._remedy()}"
            )
        try:
            name, _ = tfds.core.naming.parse_builder_name_kwargs(self.dataset)
            if name.namespace:
                raise UserError(
                    f"data.dataset={self.dataset!r} names a collection of data sets, {name.namespace!r}: leave it out"
                )
            for depth in ("*", "*/*"):  # <version> or <config>/<version>
                for file in root.glob(f"{name.name}/{depth}/features.json"):
                    check_features_file(file)
            with _video_without_tensorflow():
                builder = tfds.builder(self.dataset, data_dir=self.path, try_gcs=False)
        except UserError:
            raise
        except (tfds.core.DatasetNotFoundError, ValueError, AssertionError, ImportError) as error:
            raise self._not_found(root) from error
        except Exception as error:  # of a protocol buffer, for example
            raise UserError(
                f"TFDS data set {self.dataset!r} in {self.path} cannot be opened ({error}): prepare it again"
            ) from error
        if not (tfds.core.Path(builder.data_dir) / "dataset_info.json").exists():
            raise self._not_found(root)
        return builder

    def _not_found(self, root) -> UserError:
        found = ", ".join(sorted(p.name for p in root.iterdir())[:20]) or "nothing"
        hint = ""
        if (root / "dataset_info.json").exists():
            hint = "; this is the folder of one version: pass the folder that holds the folder of the data set"
        return UserError(
            f"TFDS data set {self.dataset!r} is not prepared in {self.path}, which holds {found}{hint}; {self._remedy()}"
        )

    def _remedy(self) -> str:
        """How to get the data set. Of ImageNet, TFDS downloads nothing, and our `prepare` needs no TensorFlow."""
        if self.dataset.split("/")[0].split(":")[0] == "imagenet2012":
            return (
                "prepare it from the two tars of image-net.org: python -m dit_jax.prepare --source=ILSVRC2012_img_train.tar "
                f"--validation_source=ILSVRC2012_img_val.tar --out={self.path} --dataset=ilsvrc2012, then "
                "give --config.data.dataset=ilsvrc2012"
            )
        return (
            f"prepare it with tfds.builder({self.dataset!r}, data_dir={self.path!r}, file_format='array_record')"
            ".download_and_prepare()"
        )

    def _check_features(self, features) -> None:
        import tensorflow_datasets as tfds

        wanted: list[tuple[str, str, Any]] = [("image_key", self.image_key, tfds.features.Image)]
        if self.video_key is not None:
            wanted = [("video_key", self.video_key, tfds.features.Sequence)]
        if self.label_key is not None:
            wanted.append(("label_key", self.label_key, tfds.features.ClassLabel))
        if self.caption_key is not None:
            wanted.append(("caption_key", self.caption_key, tfds.features.Text))
        if self.caption_long_key is not None:
            wanted.append(("caption_long_key", self.caption_long_key, tfds.features.Text))
        for argument, key, kind in wanted:
            if key not in features or not isinstance(features[key], kind):
                clips = [name for name, feature in features.items() if isinstance(feature, tfds.features.Sequence)]
                if argument == "image_key" and clips:
                    raise UserError(f"{self.dataset} has clips: give data.video_key={clips[0]!r}, and transform.name=clip")
                listing = ", ".join(f"{k}: {type(v).__name__}" for k, v in features.items())
                what = {"label_key": "labels", "caption_key": "captions", "caption_long_key": "long captions"}.get(argument)
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
        folder, files = str(info.data_dir), set()
        for instruction in info.splits[self.split].file_instructions:
            place, name = os.path.split(os.fspath(instruction.filename))
            if os.path.normpath(place) != os.path.normpath(folder):
                raise UserError(
                    f"{folder}/dataset_info.json names the shard {instruction.filename}, which is outside of its folder"
                )
            files.add(name)
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
        decoders = {self.image_key: tfds.decode.SkipDecoding()} if self.video_key is None else None
        return self._builder.as_data_source(split=self.split, decoders=decoders, file_format="array_record")

    @property
    def text_features(self) -> tuple[str, ...]:
        """Names of the features that could be a caption_key."""
        import tensorflow_datasets as tfds

        return tuple(name for name, kind in self._builder.info.features.items() if isinstance(kind, tfds.features.Text))

    def __len__(self) -> int:
        return self._length

    def _is_away(self, error: Exception) -> bool:
        """Whether an error of a read is one of the storage, not of the file's content."""
        if any(sign in str(error) for sign in _OF_THE_STORAGE) or (isinstance(error, OSError) and error.errno is not None):
            return True
        return not os.path.isfile(os.path.join(self._folder, "dataset_info.json"))

    def __getitem__(self, index: int) -> Example:
        name = f"{self.dataset} split {self.split!r} record {index}"
        try:
            with self._lock:  # two threads must not open the files twice
                records = self._records
            record = records[index] if self.video_key is None else self._undecoded(records, index)
        except Exception as error:  # array_record raises its own kinds for a broken chunk, tfds others for a bad field
            if self._is_away(error):
                with self._lock:  # a reader that met an error of the storage fails for ever
                    self.__dict__.pop("_records", None)
                raise Unavailable(f"{name} in {self.path}: {error}") from error
            raise UserError(f"{name} in {self.path} cannot be read ({error}): copy that shard again") from error
        image, label = record[self.video_key or self.image_key], 0 if self.label_key is None else record[self.label_key]
        caption = b"" if self.caption_key is None else record[self.caption_key]
        if not image or label is None or caption is None:  # what array_record makes of some truncated files
            raise UserError(f"{name} in {self.path} is empty: copy that shard again")
        if self.label_key is not None and not 0 <= label < self.num_classes:
            raise UserError(f"{name} has label {label}, outside [0, {self.num_classes}): prepare the data set again")
        example: Example = {"label": int(label), "name": name}
        if self.video_key is None:
            example["image"] = image
        else:
            example |= {"video": FrameFiles(image, name, self.fps or 0.0), "fps": self.fps or 0.0}
        if self.caption_key is not None:
            example["caption"] = caption_text(caption, f"of {name}")
        if self.caption_long_key is not None:
            example["caption_long"] = caption_text(record[self.caption_long_key], f"of {name}")
        return example

    def _undecoded(self, records: Any, index: int) -> dict[str, Any]:
        """The values of a record of clips; TFDS decodes all frames, or none without TensorFlow."""
        found = tf_examples.features(records.data_source[index])
        single = (self.label_key, self.caption_key, self.caption_long_key)
        values = {key: next(iter(found.get(key, ())), None) for key in single if key is not None}
        video = str(self.video_key)
        return {**values, video: found.get(video, ())}


@contextlib.contextmanager
def _video_without_tensorflow() -> Iterator[None]:
    """TFDS makes its Video feature with TensorFlow; without it, the feature is read as the sequence of images that it is."""
    if importlib.util.find_spec("tensorflow") is not None:
        yield
        return
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.features.video_feature import Video

    def images(_cls, value: Any) -> Any:
        shape = value["shape"] if isinstance(value, dict) else [int(size) for size in value.shape.dimensions]
        frame = tuple(None if size is None or int(size) < 0 else int(size) for size in shape[1:]) or None
        return tfds.features.Sequence(tfds.features.Image(shape=frame))

    with _VIDEO:
        own = Video.__dict__["from_json_content"]
        Video.from_json_content = classmethod(images)
        try:
            yield
        finally:
            Video.from_json_content = own


def check_features_file(file) -> None:
    """Raises UserError if a features.json names a type of feature that is not TFDS's own, or a feature that is no file name.

    Args:
        file: path, local or of a bucket.
    """
    waiting = [(parsed(file.read_bytes(), str(file), "copy the data set again"), 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > DEEPEST:
            raise UserError(f"{file} is nested more than {DEEPEST} levels deep: copy the data set again")
        if isinstance(value, list):
            waiting += [(item, depth + 1) for item in value]
        if not isinstance(value, dict):
            continue
        for key, inner in value.items():
            _check_feature(file, key, inner)
            # Older files have JSON in texts, which TFDS parses too.
            if isinstance(inner, str) and inner.lstrip()[:1] in ("{", "["):
                inner = parsed(inner, str(file), "copy the data set again")
            waiting.append((inner, depth + 1))


def _check_feature(file, key: str, value: Any) -> None:
    if key in TYPE_KEYS and isinstance(value, str) and value not in FEATURE_TYPES:
        raise UserError(
            f"{file} has a feature of type {value:.200}, and TFDS would run code of that name: dit_jax opens only data sets of "
            "TFDS's own features"
        )
    if "/" in key or "\\" in key or key in ("", ".", ".."):  # TFDS reads <feature>.labels.txt
        raise UserError(f"{file} has a feature called {reprlib.repr(key)}, which is no file name")
