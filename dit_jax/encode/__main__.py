"""Encodes a data set into a latent cache: moments of each image and of its mirror image, in shards that training memory-maps.

    python -m dit_jax.encode --data=folder:photographs --codec=sd-vae-ft-mse --resolution=256 --out=cache
    python -m dit_jax.encode --data=tfds:imagenet2012:/data/tfds --split=train --codec=sd-vae-ft-mse --resolution=256 --out=cache
    python -m dit_jax.encode --config=xl2_imagenet256 --config.data.path=... --config.codec.path=... --out=cache
    python -m dit_jax.encode --data=clips:videos --frames=17 --codec=runs/causal_vae --resolution=128 --out=cache
    python -m dit_jax.encode --verify --out=cache

A config with `buckets` gives one cache for each bucket, in the sub-folders of --out that training reads. Of a clip, the middle
frames are encoded.

The same command resumes an interrupted one. For a finished cache it checks every file and encodes damaged shards again. Several
processes divide the shards among themselves: start the command once per host, with an --out on a shared file system.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from absl import flags

from dit_jax import config_file
from dit_jax.errors import UserError
from dit_jax.runtime import command_line, console, processes
from dit_jax.storage.paths import local_path

if TYPE_CHECKING:
    from dit_jax.encode.writer import Job

command_line.group("What to encode")
DATA = flags.DEFINE_string(
    "data", None, "Data set: digits, folder:PATH (or PATH alone), clips:PATH, tfds:NAME:PATH or tars:PATTERN."
)
SPLIT = flags.DEFINE_string("split", None, "Split of --data, as in train or train[:50%], where the data set has splits.")
CODEC = flags.DEFINE_string(
    "codec",
    None,
    "Folder of a diffusers AutoencoderKL, of clips AutoencoderKLWan, or workdir of a run that trained an autoencoder.",
)
RESOLUTION = flags.DEFINE_string("resolution", None, "Size in pixels: one number for squares, or height x width, as in 256x384.")
FRAMES = flags.DEFINE_integer("frames", None, "Encode clips of this many frames, from the middle of each. Default: images.")
FPS = flags.DEFINE_float("fps", None, "Frames per second of the clips. Default: as they are stored.")
OUT = flags.DEFINE_string("out", None, "Output folder of the latent cache.")
CONFIG = config_file.define_flags(
    "Training config whose data, transform and codec are taken, in place of --data, --split, --codec and --resolution."
)
command_line.group("How to encode")
MIRROR = flags.DEFINE_boolean(
    "mirror", None, "Encode mirrored images too. Default: yes, or --config.transform.flip where --config is given."
)
UPRIGHT = flags.DEFINE_boolean(
    "upright",
    None,
    "Apply the EXIF orientation of photographs. Default: no, or --config.transform.upright where --config is given.",
)
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Dtype of the codec's computation. Default: float32.")
VERIFY = flags.DEFINE_boolean("verify", False, "Check every file of a finished cache and change nothing.")
command_line.group("Speed and files")
BATCH_SIZE = flags.DEFINE_integer(
    "device_batch_size",
    16,
    "Images per device and call: a multiple of 8 (any number on a CPU). The bytes written do not depend on it.",
)
NUM_THREADS = flags.DEFINE_integer("num_threads", 16, "Number of threads per process that read and decode images.")
SHARD_RECORDS = flags.DEFINE_integer("shard_records", None, "Records per shard. Default: as many as fit in 512 MiB.")
MAX_BAD_SHARE = flags.DEFINE_float(
    "max_bad_share",
    0.001,
    "Largest share of the records, in 0 to 1, that may be unreadable. Those are left out and listed; more is an error.",
)
processes.define_flags()


SETTINGS = {"data", "split", "codec", "resolution", "frames", "fps", "dtype", "mirror", "upright"}
EFFORT = {"device_batch_size", "num_threads", "shard_records", "max_bad_share", *processes.FLAGS}
USES = {
    "--verify": {"verify"},
    "encoding": {*SETTINGS, *EFFORT, "config", command_line.CONFIG_FIELD},
}


def check_flags() -> None:
    """Raises a UserError for a flag that is missing or without effect."""
    if OUT.value is None:
        raise UserError("give --out=<folder of the cache>")
    command_line.check_uses(USES, "--verify" if VERIFY.value else "encoding")
    given = [flag.name for flag in (DATA, SPLIT, CODEC, RESOLUTION, FRAMES, FPS, DTYPE) if flag.value is not None]
    if CONFIG.given and given:
        raise UserError(
            f"--config and --{given[0]} are both given: omit one of them; override a field of the config with, for example, "
            "--config.transform.resolution=64"
        )


def job_of_flags():
    from dit_jax.data.size import parse_size
    from dit_jax.data.sources.named import named_source
    from dit_jax.encode.writer import Job
    from dit_jax.interop import vae

    data, codec_path, resolution = DATA.value, CODEC.value, RESOLUTION.value
    if data is None or codec_path is None or resolution is None:
        given = {"data": data, "codec": codec_path, "resolution": resolution}
        missing = [f"--{name}" for name, value in given.items() if value is None]
        raise UserError(f"give {', '.join(missing)}; or --config=<name or file>, which has them")
    size, path = parse_size(resolution), vae.find(codec_path)
    codec = vae.read_codec(path, DTYPE.value or "float32")
    return Job(
        named_source(data, SPLIT.value),
        codec,
        vae.load_diffusers(path, codec),
        size,
        MIRROR.value is not False,
        bool(UPRIGHT.value),
        BATCH_SIZE.value,
        SHARD_RECORDS.value,
        FRAMES.value,
        FPS.value,
    )


def jobs_of_config() -> dict[str, Job]:
    """{sub-folder: job} of a config: "" without buckets, else one for each bucket, of the examples that belong to it."""
    from dit_jax.build import Run
    from dit_jax.encode.writer import Job, Members

    run = Run(CONFIG.read())
    if not run.has_codec_weights:
        raise UserError(
            f"the config has task.name = {run.config.task.name!r} and codec.name = {run.config.codec.name!r}: a config that "
            "diffuses in the latents of an autoencoder (kl_vae, vq_vae, causal_vae) is needed"
        )
    if run.entry != "image":
        raise UserError(
            "the config's data.name is 'latents', which is already encoded: give the images with --data, --codec and --resolution"
        )
    run = run.with_codec_weights()
    transform, source, params = run.transform, run.source, run.codec_params
    mirror = transform.flip if MIRROR.value is None else MIRROR.value
    upright = getattr(transform, "upright", False) if UPRIGHT.value is None else UPRIGHT.value
    fps = getattr(transform, "fps", None)

    def job(part, chosen) -> Job:
        *frames, height, width, _ = part.image_shape
        return Job(
            chosen,
            run.codec,
            params,
            (height, width),
            mirror,
            upright,
            BATCH_SIZE.value,
            SHARD_RECORDS.value,
            frames[0] if frames else None,
            fps if frames else None,
        )

    if not len(run.buckets):
        return {"": job(run, source)}
    members = run.buckets.members(source.sizes(upright) if hasattr(source, "sizes") else None, len(source), fps)
    triples = zip(run.buckets.all, run.parts, members, strict=True)
    return {str(bucket): job(part, Members(source, numbers)) for bucket, part, numbers in triples}


def summary(manifest: dict) -> dict:
    """JSON summary of a finished cache; prints the statistics of the latents and the scale of unit variance."""
    from dit_jax.storage.sealed import sealed

    latents, (*grid, _) = manifest["latents"], manifest["moments"]["shape"]
    mean, std = latents["mean"], latents["std"]
    center = sum(mean) / len(mean)
    scale = (sum(s**2 + (m - center) ** 2 for m, s in zip(mean, std, strict=True)) / len(std)) ** -0.5
    console.say(
        f"latents before scaling, per channel: mean {[round(x, 4) for x in mean]}, std {[round(x, 4) for x in std]}; the "
        f"codec's scale is {manifest['codec']['scale']}, and {scale:.5f} would make the variance 1"
    )
    if manifest["bad_records"]["count"]:
        console.say(f"{manifest['bad_records']['count']} unreadable records were skipped; manifest.json lists them")
    return {
        "images": manifest["count"],
        "shards": len(manifest["shards"]),
        "bad_records": manifest["bad_records"]["count"],
        "latent_shape": [*grid, len(mean)],
        "views": manifest["views"],
        "unit_scale": scale,
        "manifest_sha256": hashlib.sha256(sealed(manifest)).hexdigest(),
    }


def main() -> dict:
    check_flags()
    assert OUT.value is not None  # see `check_flags`
    out = local_path(OUT.value)
    if VERIFY.value:
        from dit_jax.data.latents import LatentCache

        cache = LatentCache(out, verify=True)
        console.say(f"{out}: {len(cache)} records, every file is intact")
        return {"out": str(out), **summary(cache.manifest), "verified": True}
    processes.join()
    if not CONFIG.given:
        return encoded(job_of_flags(), out)
    jobs = jobs_of_config()
    if "" in jobs:
        return encoded(jobs[""], out)
    return {"out": str(out), "buckets": {name: encoded(job, out / name) for name, job in jobs.items()}}


def encoded(job: Job, out: Path) -> dict:
    """Writes one cache; returns its summary."""
    from dit_jax.encode.writer import encode

    console.say(
        f"encoding {len(job.source)} records in {job.num_shards} shards of up to {job.records_per_shard}, on "
        f"{jax.device_count()} devices of {jax.process_count()} processes"
    )
    manifest, rate = encode(job, out, MAX_BAD_SHARE.value, NUM_THREADS.value)
    return {"out": str(out), **summary(manifest), "images_per_second": rate}


if __name__ == "__main__":
    console.run(main, continues=True, phase="encoding")
