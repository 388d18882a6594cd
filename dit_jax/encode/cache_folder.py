"""The folder of a latent cache while it is made: what it was begun with, which shards are whole, the manifest at the end."""

import contextlib
import hashlib
import math
from pathlib import Path

import numpy as np

from dit_jax.data.latent_files import FORMAT, MANIFEST, SETTINGS, shard_file
from dit_jax.errors import UserError
from dit_jax.runtime.console import say
from dit_jax.storage.atomic import is_partial, remove_leftovers, write_atomic
from dit_jax.storage.claim import LOCK, claim
from dit_jax.storage.sealed import damage, digest, read_sealed, sealed, write_sealed

LISTED = 100  # bad records in the manifest; the facts of the shards have all


@contextlib.contextmanager
def claimed(folder: Path, wanted: dict, process_index: int):
    """The settings of the folder, the wanted ones if it has none; the first process claims the folder while the block runs.

    Raises:
        UserError: it holds something else, or a cache of another job; it cannot be written; another command is at work in it.
    """
    with claim(folder, "encoding", "--out") if process_index == 0 else contextlib.nullcontext():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            settings = stored_settings(folder, wanted)
            if settings is None:
                settings = wanted
                write_sealed(folder / SETTINGS, settings)  # every process writes the same: none has to wait for another
        except OSError as error:
            raise UserError(f"--out={folder} cannot be written ({error.strerror}): give another folder") from None
        yield settings


def stored_settings(folder: Path, wanted: dict) -> dict | None:
    """The settings of a folder that a job with the wanted ones may go on with; None where there are none, or damaged ones.

    Raises:
        UserError: a folder with other settings, with the differing fields; a folder that holds something else.
    """
    try:
        settings = read_sealed(folder / SETTINGS)
    except FileNotFoundError:
        # What a process of this command may have made before this one looked.
        names = sorted(path.name for path in folder.iterdir())
        strange = [name for name in names if not (name.startswith(SETTINGS) or name == LOCK or is_partial(name))]
        if (folder / SETTINGS).exists():  # by now
            return stored_settings(folder, wanted)
        if strange:
            raise UserError(
                f"--out={folder} holds {strange[0]} and no {SETTINGS}: give an empty folder, or one that does not exist"
            ) from None
        return None
    except UserError as error:
        say(f"{error}; written again")
        return None
    if settings["format"] != FORMAT:
        raise UserError(f"{folder} has cache format {settings['format']} and this dit_jax writes {FORMAT}: give another --out")
    if lines := differences(settings["encoding"], wanted["encoding"]):
        raise UserError(
            f"{folder} holds a cache of something else; give another --out, or go on with that one. Different:\n  "
            + "\n  ".join(lines)
        )
    return settings


def differences(stored: dict, wanted: dict, prefix: str = "") -> list[str]:
    """Lines "field: there -> here" of what differs between two objects of JSON."""
    lines = []
    for key in sorted(stored.keys() | wanted.keys()):
        old, new = stored.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old!r} there, {new!r} now")
    return lines


def sound_shards(folder: Path, shards: range, total: int, settings_digest: str) -> dict[int, dict]:
    """{k: facts} of the shards that are written and whole; says which are damaged.

    Raises:
        UserError: a shard that was written under other settings.
    """
    found = {}
    for k in shards:
        try:
            facts = read_sealed(folder / shard_file(k, total, "facts"))
        except FileNotFoundError:
            continue
        except UserError as error:
            say(f"{error}; the shard is encoded again")
            continue
        if facts["settings"] != settings_digest:
            raise UserError(f"shard {k} in {folder} was encoded with other settings than {SETTINGS} has: give another --out")
        found[k] = facts
    damaged = damage(folder, [file for facts in found.values() for file in facts["files"].values()], hashes=True)
    for k, facts in list(found.items()):
        for file in facts["files"].values():
            if file["name"] in damaged:
                say(f"{folder}: {damaged[file['name']]}; the shard is encoded again")
                found.pop(k, None)
    return found


def finish(folder: Path, max_bad_share: float, first: bool) -> dict:
    """The manifest of a folder whose shards are all written, itself written by the first process unless it is there.

    Raises:
        UserError: shards that this process does not see; too many bad records in all.
    """
    settings = read_sealed(folder / SETTINGS)
    encoding = settings["encoding"]
    records = encoding["source"]["records"]
    total = -(-records // encoding["shard_records"])
    try:
        facts = [read_sealed(folder / shard_file(k, total, "facts")) for k in range(total)]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: all processes need the same --out, in a file system they share") from None
    if strangers := [k for k, shard in enumerate(facts) if shard["settings"] != digest(settings)]:
        raise UserError(
            f"shards {strangers} in {folder} were encoded with other settings than {SETTINGS} has: did the "
            "processes get the same flags and data? Give another --out"
        )
    bad = [record for shard in facts for record in shard["bad_records"]]
    check_bad(bad, records, max_bad_share)
    manifest = manifest_of(settings, facts, bad)
    text = sealed(manifest)
    path = folder / MANIFEST
    if first and not (path.exists() and path.read_bytes() == text):
        if path.exists():
            say(f"{path} is not what the shards say: written again")
        write_atomic(path, text)
        remove_leftovers(folder)
        for leftover in folder.glob(f"{SETTINGS}.*"):  # of killed commands of earlier versions
            leftover.unlink()
    return manifest


def check_bad(bad: list, records: int, max_bad_share: float):
    if len(bad) / records > max_bad_share:
        first = "; ".join(f"record {index}: {reason}" for index, reason in bad[:3])
        raise UserError(
            f"at least {len(bad)} of {records} records cannot be read ({len(bad) / records:.2%}, and "
            f"--max_bad_share allows {max_bad_share:.2%}): restore them, or allow more. {first}"
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
    """Mean and std per channel of a latent before scaling: the variance is that of the means plus the mean posterior variance.

    pixels: of the latents of one record, all views together.
    """
    count = pixels * sum(shard["count"] for shard in facts)

    def average(name: str) -> np.ndarray:
        return np.array([math.fsum(x) for x in zip(*(shard["sums"][name] for shard in facts), strict=True)]) / count

    mean, square, variance = average("mean"), average("square"), average("variance")
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(square - mean**2, 0) + variance).tolist()}
