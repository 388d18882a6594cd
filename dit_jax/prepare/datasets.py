"""Converts images into a TFDS data set; implements `python -m dit_jax.prepare`.

`<out>/<dataset>/1.0.0/` contains the shards, TFDS's metadata, bad_records.txt if there are bad records, and preparation.json:
the settings and, for each finished shard, its records, bytes and bad records. The images of a shard and their order are a
function of (source, seed), so that a shard can be written at any time, always with the same bytes.
"""

import contextlib
import hashlib
import io
import re
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dit_jax.data.image_files import FORMATS, decode
from dit_jax.data.loader import tolerated_bad_records
from dit_jax.data.size import size_json
from dit_jax.data.sources import IMAGE_SUFFIXES, TFDS, Example, ImageFolder
from dit_jax.data.sources.source import is_strange
from dit_jax.data.sources.tar_headers import TarScan, opened
from dit_jax.data.sources.tars import PACKED, TarShards, TarSource
from dit_jax.data.stored_clips import FILMS
from dit_jax.data.transforms import center_crop
from dit_jax.errors import UserError
from dit_jax.prepare.array_records import measure, shard_path, tf_example, write_metadata, write_shard, writing
from dit_jax.prepare.ilsvrc import CLASS_TAR, VALIDATION_IMAGE, IlsvrcTrain, IlsvrcValidation
from dit_jax.runtime import console
from dit_jax.storage.atomic import remove_leftovers, write_atomic, write_json
from dit_jax.storage.bounded import check_form, read_json
from dit_jax.storage.claim import claim, strange_names
from dit_jax.storage.paths import local_path

FORMAT, VERSION, PLAN, BAD_LIST = 1, "1.0.0", "preparation.json", "bad_records.txt"
PNG_LEVEL = 4  # within 1 % of the size at Pillow's default of 6, in half the time
SIZED = 512  # number of records whose mean size determines the number of shards
CLIPS = "train from them as they are: data.name=clips for a folder, data.name=tars for tars"
MAX_SHARDS = 99_999  # a shard's name has five digits
NAME = re.compile(r"[a-z][a-z0-9_]*")
OWN = re.compile(
    r".*\.array_record-\d{5}-of-\d{5}|preparation\.json|bad_records\.txt|(dataset_info|features)\.json|.*labels\.txt"
)
SHARD_FORM = {"records": int, "bytes": int, "bad": [[str]]}
SPLIT_FORM = {"source": str, "images": int, "seed": int, "shard_bytes": int, "order": str, "mean_bytes": int, "shards": [object]}
PLAN_FORM = {"resolution": object, "captions": bool, "class_names": [str], "splits": {}, "complete": bool}
Files = ImageFolder | TarSource  # whose examples hold the bytes of image files


@dataclass(frozen=True)
class Request:
    """The data set to write and its settings.

    Fields:
        out: TFDS data_dir, the folder that gets a folder called `dataset`.
        dataset: name in TFDS, lower case, digits and _; none of TFDS's own.
        seed: of the order of the records, at least 0.
        shard_bytes: about the size of a shard, at least 1.
        size: None keeps the files bit for bit; (H, W) stores the centre crop of that height and width, RGB, as PNG.
        num_threads: that read and crop; changes the speed only.
        max_bad_share: of the images of a split that may be unreadable and left out, in [0, 1).

    Raises:
        UserError: a value out of range, or a name that TFDS has or does not take.
    """

    out: Path
    dataset: str
    seed: int = 0
    shard_bytes: int = 256 << 20
    size: tuple[int, int] | None = None
    num_threads: int = 16
    max_bad_share: float = 0.001

    def __post_init__(self):
        for name, lowest in (("seed", 0), ("shard_bytes", 1), ("num_threads", 1)):
            if getattr(self, name) < lowest:
                raise UserError(f"{name}={getattr(self, name)} must be at least {lowest}")
        if self.size is not None and min(self.size) < 1:
            raise UserError(f"size={self.size} must be at least 1 pixel in height and width; None keeps the files")
        if not 0 <= self.max_bad_share < 1:
            raise UserError(f"max_bad_share={self.max_bad_share} must lie in [0, 1)")
        if not NAME.fullmatch(self.dataset):
            raise UserError(
                f"dataset={self.dataset!r} must be lower-case letters, digits and _, starting with a letter: my_imagenet"
            )
        import tensorflow_datasets as tfds

        with contextlib.suppress(tfds.core.DatasetNotFoundError):
            tfds.builder_cls(self.dataset)
            raise UserError(
                f"dataset={self.dataset}: TFDS has code for a data set of this name and would not read this one: "
                f"choose another name, such as my_{self.dataset}"
            )

    @property
    def resolution(self) -> int | list[int]:
        """The size as recorded in the plan: 0 for none, R for R x R, otherwise [H, W]."""
        return 0 if self.size is None else size_json(self.size)

    @property
    def folder(self) -> Path:
        return self.out / self.dataset / VERSION

    def shards(self, plan: dict, split: str) -> list[tuple[Path, dict | None]]:
        """(file, facts in the plan) of every shard of a split; the facts are None until it is written."""
        facts = plan["splits"][split]["shards"]
        return [(shard_path(self.folder, self.dataset, split, i, len(facts)), shard) for i, shard in enumerate(facts)]


@dataclass(frozen=True)
class BadRecord:
    """A skipped image and the reason."""

    name: str
    reason: str


def open_source(path: str, class_names_file: str = "", class_names: tuple[str, ...] | None = None) -> Files:
    """Opens the source at `path`: a folder of images or class folders, ILSVRC's train or validation tar, or WebDataset tars.

    Args:
        path: a folder (of images, class folders, or tars), a tar, a glob or a brace pattern.
        class_names_file: for WebDataset tars, as in TarShards.
        class_names: the classes of the existing data set; None uses the source's own.

    Raises:
        UserError: nothing exists there, a folder mixes tars with folders or images, or the classes differ.
    """
    given, first = local_path(path), None
    if given.is_file():
        with opened(given) as fd:
            first = next(iter(TarScan(fd, str(given))), None)
    inside = sorted(entry for entry in given.iterdir() if not is_strange(entry.name)) if given.is_dir() else []
    tars = [entry.name for entry in inside if entry.name.endswith((".tar", *PACKED))]
    if clips := [entry.name for entry in inside if entry.name.lower().endswith(FILMS)]:
        raise UserError(f"{path} holds clips, such as {clips[0]}, and prepare packs images; {CLIPS}")
    others = [entry.name for entry in inside if entry.is_dir() or entry.name.lower().endswith(IMAGE_SUFFIXES)]
    if tars and others:
        raise UserError(
            f"{path} contains both tars ({tars[0]}, ...) and folders or images ({others[0]}, ...): give a pattern for the tars"
        )
    source: Files
    if given.is_dir() and not tars:
        source = ImageFolder(path)
    elif first and CLASS_TAR.fullmatch(first.name):
        source = IlsvrcTrain(path)
    elif first and VALIDATION_IMAGE.fullmatch(first.name):
        source = IlsvrcValidation(path, class_names=class_names)
    else:
        source = TarShards(path, None if class_names is None else len(class_names), class_names_file)
    if isinstance(source, TarSource) and source.has_films:
        raise UserError(f"{path} holds clips, and prepare packs images; {CLIPS}")
    strange = [name for name in source.class_names if not name.isprintable()]  # among them names that are not UTF-8
    if strange:
        raise UserError(
            f"{len(strange)} class names in {path} cannot be written to the list of labels, which is UTF-8 with a name per line, "
            f"such as {strange[0]!a}: rename the folder"
        )
    if class_names_file and not isinstance(source, TarShards):
        raise UserError(
            f"class_names_file={class_names_file} is for WebDataset tars, but the classes of {path} already have names"
        )
    if class_names is not None and source.class_names != class_names:
        theirs, ours = set(source.class_names) - set(class_names), set(class_names) - set(source.class_names)
        raise UserError(
            f"{path} has {source.num_classes} classes, but the data set has {len(class_names)}; only in {path}: "
            f"{_some(theirs)}; only in the data set: {_some(ours)}. Every split needs the same classes in the same order"
        )
    return source


def prepare(request: Request, paths: dict[str, str], class_names_file: str = "") -> dict:
    """Writes splits of a data set, or resumes an interrupted call, and verifies the data set.

    Memory: about 100 bytes per image for its position, and 2 num_threads images.

    Args:
        request: what to write.
        paths: {split: source, as for `open_source`}. The first determines the classes, unless the data set already has some.
        class_names_file: names of the classes of WebDataset tars.

    Returns:
        {"out", "dataset", "splits": {name: {"records", "shards", "bytes"}}, "classes", "bad_records": [{"split", "name",
        "reason"}]} of the complete data set.

    Raises:
        UserError: a source cannot be read; the folder contains something else, or was started with other settings; another
            process writes there; too many bad records; the disk is full. Finished shards are kept, and the same call resumes.
    """
    for split in paths:
        if not NAME.fullmatch(split) or split == "all":
            raise UserError(
                f"split={split!r} must be lower-case letters, digits and _, starting with a letter, and not 'all': train"
            )
    sources = {} if request.folder.exists() else _opened(paths, class_names_file)  # what is refused leaves no folder
    with claim(request.folder, "writing shards", "--dataset or --out"):
        plan = _read_plan(request.folder)
        remove_leftovers(request.folder)
        if plan or not sources:
            sources = _opened(paths, class_names_file, tuple(plan["class_names"]) if plan else None)
        for split, source in sources.items():
            console.say(f"{split}: {len(source):,} images of {len(source.class_names) or 'no'} classes in {paths[split]}")
        plan = _planned(request, plan, sources)
        missing = {split: _missing(request, plan, split) for split in sources}
        if plan["complete"] and not any(missing.values()):
            console.say(f"{request.folder} is already complete; verifying it")
        else:
            _check_space(request, plan, missing)
            _save(request.folder, plan)
            for split, source in sources.items():
                _write_split(request, plan, split, source, missing[split])
            _finish(request, plan)
        return _verified(request, plan)


def _opened(paths: dict[str, str], class_names_file: str, class_names: tuple[str, ...] | None = None) -> dict[str, Files]:
    """The source of every split. The first determines the classes, unless `class_names` does."""
    sources: dict[str, Files] = {}
    for split, path in paths.items():
        sources[split] = open_source(path, class_names_file, class_names)
        class_names = sources[split].class_names
    return sources


def _read_plan(folder: Path) -> dict | None:
    file, remedy = folder / PLAN, f"remove {folder} and start again"
    try:
        plan = read_json(file, remedy, {"format": int})
    except FileNotFoundError:
        if strange := strange_names(folder, re.compile("")):
            raise UserError(
                f"{folder} contains {_some(strange)} but no {PLAN}: it was not written by this command; give another --dataset"
            ) from None
        return None
    if plan["format"] != FORMAT:
        raise UserError(f"{file} has format {plan['format']}, not {FORMAT}; {remedy}")
    check_form(plan, PLAN_FORM, str(file), remedy)
    if not plan["complete"] and (strange := strange_names(folder, OWN)):
        raise UserError(
            f"{folder} contains {_some(strange)}, which this command did not write: remove it, or give another --dataset"
        )
    for split, facts in plan["splits"].items():
        if not NAME.fullmatch(split):  # a name of files
            raise UserError(f"{file} has a split {split!r}; {remedy}")
        check_form(facts, SPLIT_FORM, str(file), remedy, f"splits.{split}")
        for number, shard in enumerate(facts["shards"]):
            if shard is not None:
                check_form(shard, SHARD_FORM, str(file), remedy, f"splits.{split}.shards[{number}]")
    return plan


def _save(folder: Path, plan: dict) -> None:
    with writing(folder):
        write_json(folder / PLAN, plan)


def _order(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)


def _planned(request: Request, plan: dict | None, sources: dict[str, Files]) -> dict:
    """The plan with all requested splits.

    Raises:
        UserError: it was started with other settings, or another split of it is unfinished.
    """
    captions = any(source.has_captions for source in sources.values())
    plan = plan or {
        "format": FORMAT,
        "resolution": request.resolution,
        "captions": captions,
        "class_names": next(iter(sources.values())).class_names,
        "splits": {},
        "complete": False,
    }
    # If another split has captions, a split without them gets empty ones.
    _compare(request, "", plan, {"resolution": request.resolution, "captions": captions or plan["captions"]})
    for split, facts in plan["splits"].items():
        if split not in sources and None in facts["shards"]:
            raise UserError(f"split {split} of {request.folder} is unfinished: first run the command that started it again")
    for split, source in sources.items():
        order = _order(request.seed, len(source))
        pinned = {
            "source": source.fingerprint,
            "images": len(source),
            "seed": request.seed,
            "shard_bytes": request.shard_bytes,
            "order": hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16],
        }  # NumPy does not guarantee that a seed's order never changes
        if split in plan["splits"]:
            _compare(request, f"split {split}: ", plan["splits"][split], pinned)
            continue
        records = (_record(source[i], request, plan) for i in order[:SIZED].tolist())
        mean = np.mean([len(record) if isinstance(record, bytes) else 0 for record in records])
        count = min(max(-(-round(mean * len(source)) // request.shard_bytes), 1), len(source))
        if count > MAX_SHARDS:
            raise UserError(
                f"{len(source):,} images of {mean:,.0f} bytes in shards of {request.shard_bytes:,} bytes would be "
                f"{count:,} files, more than {MAX_SHARDS:,}: raise --shard_mib"
            )
        plan["splits"][split] = {**pinned, "mean_bytes": round(mean), "shards": [None] * count}
        plan["complete"] = False
    return plan


def _compare(request: Request, where: str, there: dict, asked: dict) -> None:
    lines = [f"{where}{key}: {there[key]!r} there, {value!r} requested" for key, value in asked.items() if there[key] != value]
    if lines:
        raise UserError(
            f"{request.folder} was started with other settings or another source; use those, or give another "
            "--dataset. Different:\n  " + "\n  ".join(lines)
        )


def _missing(request: Request, plan: dict, split: str) -> list[int]:
    """Numbers of the shards that are missing or differ in size from the plan."""
    missing = []
    for number, (file, facts) in enumerate(request.shards(plan, split)):
        size = file.stat().st_size if file.exists() else None
        if facts is None or size != facts["bytes"]:
            missing.append(number)
            if facts and size is not None:
                console.say(f"{file.name} has {size:,} bytes instead of {facts['bytes']:,}: writing it again")
    return missing


def _check_space(request: Request, plan: dict, missing: dict[str, list[int]]) -> None:
    needed = 0
    for split, numbers in missing.items():
        facts = plan["splits"][split]
        needed += facts["mean_bytes"] * facts["images"] * len(numbers) // len(facts["shards"])
    free = shutil.disk_usage(request.folder).free
    if needed > free:
        raise UserError(
            f"about {needed / 2**20:,.0f} MiB remain to be written, but {request.out} has only {free / 2**20:,.0f} MiB "
            "free: free space or give another --out"
        )


def _write_split(request: Request, plan: dict, split: str, source: Files, missing: list[int]) -> None:
    facts = plan["splits"][split]
    images, order, shards = facts["images"], _order(request.seed, facts["images"]), request.shards(plan, split)
    ends = [images * number // len(shards) for number in range(len(shards) + 1)]
    bad = [BadRecord(*one) for i, shard in enumerate(facts["shards"]) if i not in missing for one in shard["bad"]]
    progress = console.Progress(f"{request.dataset} {split}: images", sum(ends[i + 1] - ends[i] for i in missing))
    done = 0

    def good(records: Iterable[bytes | BadRecord]) -> Iterator[bytes]:
        nonlocal done
        for record in records:
            done += 1
            progress.update(done)
            if isinstance(record, bytes):
                yield record
                continue
            bad.append(record)
            if len(bad) > tolerated_bad_records(images, request.max_bad_share):
                examples = "; ".join(f"{one.name}: {one.reason}" for one in bad[:3])
                raise UserError(
                    f"{len(bad)} images of split {split} are bad so far, more than the share of "
                    f"{request.max_bad_share} of {images:,} ({examples}): restore them, or raise --max_bad_share"
                )

    with ThreadPoolExecutor(request.num_threads) as pool:
        for number in missing:
            file, known = shards[number][0], len(bad)
            records = _in_threads(pool, request, plan, source, order[ends[number] : ends[number + 1]].tolist())
            count, size = write_shard(file, good(records))
            facts["shards"][number] = {"records": count, "bytes": size, "bad": [[one.name, one.reason] for one in bad[known:]]}
            _save(request.folder, plan)


def _in_threads(
    pool: ThreadPoolExecutor, request: Request, plan: dict, source: Files, numbers: list[int]
) -> Iterator[bytes | BadRecord]:
    """Yields the records of examples in their order, computing a few in advance."""

    def record(number: int) -> bytes | BadRecord:
        return _record(source[number], request, plan)

    waiting = deque()
    try:
        for number in numbers:
            waiting.append(pool.submit(record, number))
            if len(waiting) >= 2 * request.num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _record(example: Example, request: Request, plan: dict) -> bytes | BadRecord:
    """Converts an example to a record; a `BadRecord` if its image cannot be read."""
    image, name = example["image"], example["name"].encode("utf-8", "backslashreplace").decode()
    assert isinstance(image, bytes)  # of `Files`
    if not image:
        return BadRecord(name, "zero bytes")
    try:
        Image.open(io.BytesIO(image), formats=FORMATS)
    except Image.DecompressionBombError:
        pass  # it is a huge image; whoever decodes it decides what to do
    except Exception:  # Pillow's readers raise OSError, SyntaxError, struct.error, ...
        return BadRecord(name, f"not one of {', '.join(FORMATS)}; it begins with {image[:8]!r}")
    if request.size:
        try:
            picture = center_crop(decode(image, 3, name), request.size)
        except UserError as error:
            return BadRecord(name, str(error))
        file = io.BytesIO()
        picture.save(file, "PNG", compress_level=PNG_LEVEL)
        image = file.getvalue()
    fields: dict[str, bytes | int] = {"image": image}
    if plan["class_names"]:
        fields["label"] = example["label"]
    if plan["captions"]:
        fields["caption"] = example.get("caption", "").encode()
    return tf_example(fields)


def _finish(request: Request, plan: dict) -> None:
    """Writes the list of bad records and TFDS's metadata, and marks the plan as complete."""
    bad = _bad_records(plan)
    if bad:
        with writing(request.folder / BAD_LIST):
            lines = (f"{one['split']}\t{one['name']}\t{one['reason']}\n" for one in bad)
            write_atomic(request.folder / BAD_LIST, "".join(lines))
    splits = {split: [(shard["records"], shard["bytes"]) for shard in facts["shards"]] for split, facts in plan["splits"].items()}
    write_metadata(request.folder, request.dataset, splits, plan["class_names"], plan["captions"], request.size)
    plan["complete"] = True
    _save(request.folder, plan)


def _bad_records(plan: dict) -> list[dict]:
    return [
        {"split": split, "name": name, "reason": reason}
        for split, facts in sorted(plan["splits"].items())
        for shard in facts["shards"]
        for name, reason in shard["bad"]
    ]


def _verified(request: Request, plan: dict) -> dict:
    """Checks the bytes and records of every shard and TFDS's count of records; returns the result."""
    result = {}
    for split in plan["splits"]:
        shards = plan["splits"][split]["shards"]
        for (file, _), facts in zip(request.shards(plan, split), shards, strict=True):
            try:
                measured = measure(file)
            except (OSError, RuntimeError) as error:
                raise UserError(f"{file} cannot be read ({error}): remove it and run the command again") from None
            if measured != (facts["records"], facts["bytes"]):
                raise UserError(
                    f"{file} has {measured[0]} records in {measured[1]:,} bytes instead of {facts['records']} in "
                    f"{facts['bytes']:,}: remove it and run the command again"
                )
        records = sum(facts["records"] for facts in shards)
        counted = len(TFDS(request.dataset, str(request.out), split, label_key="label" if plan["class_names"] else None))
        if counted != records:
            raise UserError(
                f"TFDS counts {counted} records in split {split} of {request.folder}, but {records} were written: "
                f"remove that folder and run the command again"
            )
        result[split] = {"records": records, "shards": len(shards), "bytes": sum(facts["bytes"] for facts in shards)}
    return {
        "out": str(request.out),
        "dataset": request.dataset,
        "splits": result,
        "classes": len(plan["class_names"]),
        "bad_records": _bad_records(plan),
    }


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "") or "none"
