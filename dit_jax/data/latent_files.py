"""Names of the files of a latent cache.

    settings.json                    everything that determines the bytes; written first
    00007-of-00012.moments.npy       float16 [count * views, h, w, 2c], row views * i + mirror; plain .npy;
                                     c in place of 2c for a codec without a posterior
    00007-of-00012.labels.npy        int32 [count]
    00007-of-00012.index.npy         int64 [count], the number of each record in the source; bad records are skipped
    00007-of-00012.captions.json     count strings or nulls; only if the source has captions
    00007-of-00012.long.json         the same of long captions
    00007-of-00012.json              facts of the shard: counts, bad records, sums, size and SHA-256 of the files above
    manifest.json                    written last: a cache without it is not finished

settings.json, the facts and manifest.json are sealed, see `storage.sealed`.
"""

FORMAT = 1
FILE_FORM = {"name": str, "bytes": int, "sha256": str}
MANIFEST_FORM = {
    "format": int,
    "count": int,
    "views": int,
    "num_classes": int,
    "class_names": [str],
    "moments": {"shape": [int]},
    "codec": {},
    "transform": {},
    "settings": FILE_FORM,
    "shards": [{"count": int, "files": {"moments": FILE_FORM, "labels": FILE_FORM, "index": FILE_FORM}}],
}
MANIFEST, SETTINGS = "manifest.json", "settings.json"
SUFFIXES = {
    "moments": ".moments.npy",
    "labels": ".labels.npy",
    "index": ".index.npy",
    "captions": ".captions.json",
    "long_captions": ".long.json",
    "facts": ".json",
}


def shard_file(shard: int, shards: int, kind: str) -> str:
    """Name of a file of shard `shard` of `shards`; kind is a key of SUFFIXES."""
    return f"{shard:05d}-of-{shards:05d}{SUFFIXES[kind]}"
