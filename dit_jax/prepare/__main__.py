"""Converts a folder of images, ImageNet's tars or WebDataset tars into a TFDS data set in ArrayRecord files, for random access.

    python -m dit_jax.prepare --source=ILSVRC2012_img_train.tar --validation_source=ILSVRC2012_img_val.tar \\
        --out=data --dataset=my_imagenet
    python -m dit_jax.prepare --source=photos --out=data --dataset=my_photos
    python -m dit_jax.prepare --source='shards/train-{0000..0099}.tar' --out=data --dataset=my_pairs --resolution=256 \\
        --captions=captions.jsonl

Nothing is unpacked, TensorFlow is not needed, and the data set may have any size. The records are shuffled. The same command
gives the same bytes and resumes after an interruption; a command with another --split adds that split. To read the data set, use
tfds.data_source("my_imagenet", data_dir="data"), or data.name=tfds, data.dataset=my_imagenet, data.path=data in a config.
"""

import os

import jax
from absl import flags

from dit_jax.errors import UserError
from dit_jax.runtime import command_line, console
from dit_jax.storage.paths import local_path

command_line.group("Input and output")
SOURCE = flags.DEFINE_string(
    "source",
    None,
    "Input: a folder of class folders or of images; ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar, unextracted; "
    "or tars in the WebDataset layout, as a folder, a glob or train-{0000..0099}.tar.",
)
OUT = flags.DEFINE_string("out", None, "TFDS data_dir. The data set is written to <out>/<dataset>/1.0.0.")
DATASET = flags.DEFINE_string(
    "dataset", None, "Name of the new data set: lower-case letters, digits and _. It must not be a name of TFDS."
)
VALIDATION = flags.DEFINE_string("validation_source", None, "Input of a second split, called validation. Same forms as --source.")
SPLIT = flags.DEFINE_string("split", "train", "Name of the split made from --source.")
CLASS_NAMES = flags.DEFINE_string(
    "class_names_file", "", "Text file with the class names of WebDataset tars, one per line. Default: 0, 1, 2, ..."
)
CAPTIONS = flags.DEFINE_string(
    "captions",
    "",
    'Long captions of a captioner, a line of {"name", "caption_long", "model"} for each image. The name is the path within '
    "--source, or <tar>:<key>. They become the feature caption_long, in place of long captions of the source.",
)
command_line.group("Records")
RESOLUTION = flags.DEFINE_string(
    "resolution",
    "0",
    "0 keeps every file bit for bit. R, or HxW as in 256x384, stores the centre crop that training takes (the paper's), RGB, as "
    "PNG, without loss. Worth it for large photographs: to read and crop to 256 takes 1.1 times as long from a JPEG of 400x350 "
    "as from its stored crop of 110 KB, 4 times from 1024x768, 13 times from 2048x1536 (one core). It fixes the resolution, "
    "and leaves out truncated files, which 0 keeps.",
)
SEED = flags.DEFINE_integer("seed", 0, "Random seed of the order of the records.")
SHARD_MIB = flags.DEFINE_float("shard_mib", 256, "Approximate size of a shard in MiB.")
MAX_BAD_SHARE = flags.DEFINE_float(
    "max_bad_share",
    0.001,
    "Largest share of a split, in 0 to 1, that may be empty files or not images. Those are left out and listed; more "
    "is an error.",
)
THREADS = flags.DEFINE_integer("num_threads", max(4, os.cpu_count() or 1), "Number of threads that read and crop images.")


def main() -> dict:
    source, out, dataset = SOURCE.value, OUT.value, DATASET.value
    if not (source and out and dataset):
        raise UserError("give --source=<folder or tars>, --out=<folder> and --dataset=<name>")
    from dit_jax.data.size import parse_size
    from dit_jax.prepare import datasets

    paths = {SPLIT.value: source}
    if VALIDATION.value is not None:
        if SPLIT.value == "validation":
            raise UserError("--split=validation and --validation_source name the same split; give one of them")
        paths["validation"] = VALIDATION.value
    if not SHARD_MIB.value > 0:
        raise UserError(f"--shard_mib={SHARD_MIB.value} must be above 0")
    request = datasets.Request(
        out=local_path(out),
        dataset=dataset,
        seed=SEED.value,
        shard_bytes=max(round(SHARD_MIB.value * 2**20), 1),
        size=None if RESOLUTION.value == "0" else parse_size(RESOLUTION.value),
        num_threads=THREADS.value,
        max_bad_share=MAX_BAD_SHARE.value,
        captions=CAPTIONS.value,
    )
    result = datasets.prepare(request, paths, CLASS_NAMES.value)
    for split, facts in result["splits"].items():
        console.say(f"{split}: {facts['records']:,} records in {facts['shards']} shards, {facts['bytes'] / 2**30:.2f} GiB")
    if result["bad_records"]:
        console.say(f"{len(result['bad_records'])} bad records are left out: {request.folder / datasets.BAD_LIST}")
    return result


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing is computed, and an accelerator may be in use
    console.run(main, continues=True, phase="preparing")
