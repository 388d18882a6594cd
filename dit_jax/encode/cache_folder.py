"""The folder of a latent cache during encoding: its settings, its finished shards, and the manifest at the end."""

import contextlib
import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dit_jax.data.latent_files import FORMAT, MANIFEST, SETTINGS, SUFFIXES, shard_file
from dit_jax.data.loader import tolerated_bad_records
from dit_jax.errors import UserError
from dit_jax.runtime.console import say
from dit_jax.storage.atomic import remove_leftovers, write_atomic
from dit_jax.storage.claim import claim, strange_names
from dit_jax.storage.sealed import damage, digest, read_sealed, sealed, write_sealed

FACTS_FORM = {"settings": str, "count": int, "files": {}, "bad_records": [object], "sums": {}, "captions": int}
OWN = re.compile(
    rf"{re.escape(SETTINGS)}.*|{re.escape(MANIFEST)}|\d{{5}}-of-\d{{5}}({'|'.join(map(re.escape, SUFFIXES.values()))})"
)
LISTED = 100  # number of bad records in the manifest; the facts of the shards list all


@contextlib.contextmanager
def claimed(folder: Path, wanted: dict, process_index: int) -> Iterator[dict]:
    """Context manager that yields the folder's settings (the wanted ones if it has none); the first process claims the folder.

    Raises:
        UserError: the folder contains something else or a cache of another job, cannot be written, or is in use.
    """
    with claim(folder, "encoding", "--out") if process_index == 0 else contextlib.nullcontext():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            settings = stored_settings(folder, wanted)
            if settings is not None and not (folder / MANIFEST).exists() and (strange := strange_names(folder, OWN)):
                raise UserError(
                    f"--out={folder} contains {strange[0]}, which this command did not write: remove it, or give another folder"
                )
            if settings is None:
                settings = wanted
                write_sealed(folder / SETTINGS, settings)  # all processes write equal settings, so none has to wait
        except OSError as error:
            raise UserError(f"--out={folder} cannot be written ({error.strerror}): give another folder") from None
        yield settings


def stored_settings(folder: Path, wanted: dict) -> dict | None:
    """Reads a folder's settings and checks that a job with the wanted ones can resume; None if there are none or damaged ones.

    Raises:
        UserError: the folder has other settings (lists the differing fields), or contains something else.
    """
    try:
        settings = read_sealed(folder / SETTINGS, {"format": int, "encoding": {}})
    except FileNotFoundError:
        # Another process of this command may already have created files.
        strange = strange_names(folder, re.compile(rf"{re.escape(SETTINGS)}.*"))
        if (folder / SETTINGS).exists():  # created in the meantime
            return stored_settings(folder, wanted)
        if strange:
            raise UserError(
                f"--out={folder} contains {strange[0]} but no {SETTINGS}: give an empty folder, or one that does not exist"
            ) from None
        return None
    except UserError as error:
        say(f"{error}; writing it again")
        return None
    if settings["format"] != FORMAT:
        raise UserError(f"{folder} has cache format {settings['format']}, but this dit_jax writes {FORMAT}: give another --out")
    if lines := differences(settings["encoding"], wanted["encoding"]):
        raise UserError(
            f"{folder} contains a cache with other settings; give another --out, or use those settings. Different:\n  "
            + "\n  ".join(lines)
        )
    return settings


def differences(stored: dict, wanted: dict, prefix: str = "") -> list[str]:
    """Lines "field: ... there, ... now" for each difference between two JSON objects."""
    lines = []
    for key in sorted(stored.keys() | wanted.keys()):
        old, new = stored.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old!r} there, {new!r} now")
    return lines


def intact_shards(folder: Path, shards: range, total: int, settings_digest: str) -> dict[int, dict]:
    """{k: facts} of the intact shards; prints which shards are damaged.

    Raises:
        UserError: a shard was written with other settings.
    """
    intact = {}
    for k in shards:
        try:
            facts = read_sealed(folder / shard_file(k, total, "facts"), FACTS_FORM)
        except FileNotFoundError:
            continue
        except UserError as error:
            say(f"{error}; encoding the shard again")
            continue
        if facts["settings"] != settings_digest:
            raise UserError(f"shard {k} in {folder} was encoded with other settings than those in {SETTINGS}: give another --out")
        intact[k] = facts
    damaged = damage(folder, [file for facts in intact.values() for file in facts["files"].values()], hashes=True)
    for k, facts in list(intact.items()):
        for file in facts["files"].values():
            if file["name"] in damaged:
                say(f"{folder}: {damaged[file['name']]}; encoding the shard again")
                intact.pop(k, None)
    return intact


def finish(folder: Path, max_bad_share: float, first: bool) -> dict:
    """Returns the manifest of a folder with all shards; the first process writes it unless it exists.

    Raises:
        UserError: this process does not see all shards; there are too many bad records.
    """
    settings = read_sealed(folder / SETTINGS)
    encoding = settings["encoding"]
    records = encoding["source"]["records"]
    total = -(-records // encoding["shard_records"])
    try:
        facts = [read_sealed(folder / shard_file(k, total, "facts"), FACTS_FORM) for k in range(total)]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: all processes need the same --out, on a shared file system") from None
    if strangers := [k for k, shard in enumerate(facts) if shard["settings"] != digest(settings)]:
        raise UserError(
            f"shards {strangers} in {folder} were encoded with other settings than those in {SETTINGS}: start all "
            "processes with the same flags and data, and with another --out"
        )
    bad = [record for shard in facts for record in shard["bad_records"]]
    check_bad(bad, records, max_bad_share)
    manifest = manifest_of(settings, facts, bad)
    text = sealed(manifest)
    path = folder / MANIFEST
    if first and not (path.exists() and path.read_bytes() == text):
        if path.exists():
            say(f"{path} does not match the shards; writing it again")
        write_atomic(path, text)
    if first:  # every other process has finished its shards
        remove_leftovers(folder)
        for leftover in folder.glob(f"{SETTINGS}.*"):  # of killed commands of earlier versions
            leftover.unlink()
    return manifest


def check_bad(bad: list, records: int, max_bad_share: float) -> None:
    if len(bad) > tolerated_bad_records(records, max_bad_share):
        first = "; ".join(f"record {index}: {reason}" for index, reason in bad[:3])
        raise UserError(
            f"at least {len(bad)} of {records} records cannot be read ({len(bad) / records:.2%}, but "
            f"--max_bad_share allows {max_bad_share:.2%}): restore them, or raise --max_bad_share. {first}"
        )


def manifest_of(settings: dict, facts: list[dict], bad: list) -> dict:
    encoding = settings["encoding"]
    *grid, _ = encoding["moments"]["shape"]

    def file(name: str, content: dict) -> dict:
        text = sealed(content)
        return {"name": name, "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}

    own = [file(shard_file(k, len(facts), "facts"), shard) for k, shard in enumerate(facts)]
    shards = [{"count": shard["count"], "files": {**shard["files"], "facts": f}} for shard, f in zip(facts, own, strict=True)]
    return {
        "format": FORMAT,
        "codec": {**encoding["codec"], "scale": settings["scale"], "shift": settings["shift"]},
        "transform": encoding["transform"],
        "views": encoding["views"],
        "moments": encoding["moments"],
        "source": encoding["source"],
        "count": sum(shard["count"] for shard in facts),
        "bad_records": {"count": len(bad), "first": bad[:LISTED]},
        "latents": latent_statistics(facts, encoding["views"] * math.prod(grid)),
        "num_classes": encoding["num_classes"],
        "class_names": encoding["class_names"],
        "captions": sum(shard["captions"] for shard in facts),
        "made_with": settings["made_with"],
        "settings": file(SETTINGS, settings),
        "shards": shards,
    }


def latent_statistics(facts: list[dict], pixels: int) -> dict[str, list[float]]:
    """Mean and std per channel of latents before scaling; the variance is that of the means plus the mean posterior variance.

    pixels: number of latent pixels of one record, over all views.
    """
    count = pixels * sum(shard["count"] for shard in facts)

    def average(name: str) -> np.ndarray:
        return np.array([math.fsum(x) for x in zip(*(shard["sums"][name] for shard in facts), strict=True)]) / count

    mean, square, variance = average("mean"), average("square"), average("variance")
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(square - mean**2, 0) + variance).tolist()}
