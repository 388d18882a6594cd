"""Scores samples against a reference, makes references, compares results, and measures the validation loss of a run.

    python -m dit_jax.evaluate --samples=x.npz --reference=digits --features=pixels
    python -m dit_jax.evaluate --samples=x.npz --reference=VIRTUAL_imagenet256_labeled.npz --features=inception --weights=inception.safetensors
    python -m dit_jax.evaluate --make_reference=ref.npz --data=photographs --resolution=256 --features=inception --weights=inception.safetensors
    python -m dit_jax.evaluate --table=a.json,b.json --format=markdown
    python -m dit_jax.evaluate --samples=x.npz --metrics=clip_score --features=clip --weights=clip-vit-base-patch32/model.safetensors
    python -m dit_jax.evaluate --samples=clips.npz --reference=real.npz --features=i3d --weights=i3d.safetensors --protocol=styleganv
    python -m dit_jax.evaluate --validation=runs/digits --split=test

Metrics: fid (the Frechet distance in the chosen features, with a bootstrap interval), sfid, is, precision, recall, kid, clip_score,
and frame_cosine (of consecutive frames of clips). In i3d features, of clips, fid is the Frechet video distance, fvd. The result is
also written to a file, with everything that the numbers depend on. A reference that is not comparable with the samples is
refused. After an interruption, the same command resumes. Several processes divide the images among themselves.
"""  # noqa: E501

from pathlib import Path

import jax
from absl import flags

from dit_jax.errors import UserError
from dit_jax.runtime import command_line, console, processes
from dit_jax.storage.atomic import check_writable, write_atomic
from dit_jax.storage.claim import claim_file
from dit_jax.storage.paths import local_path

command_line.group("Score samples")
SAMPLES = flags.DEFINE_string(
    "samples", None, "Images to score: an npz with arr_0 (uint8 [N, H, W, C]) or a sample folder of dit_jax.sample."
)
REFERENCE = flags.DEFINE_string(
    "reference",
    None,
    "What to compare with: an npz of statistics (from --make_reference, ADM or pytorch-fid), an npz of images, or a "
    "data set as in --data, cropped to the size of the samples. Not needed for --metrics=is and clip_score.",
)
FEATURES = flags.DEFINE_string(
    "features",
    "pixels",
    "Feature extractor: pixels (for tiny images), pixels8 (means of 8 x 8 cells), inception, dinov2 (fid is then FD-DINOv2), or "
    "clip (CLIPScore, if the samples have captions), or i3d (fvd, of clips). Those of images take the frames of clips.",
)
WEIGHTS = flags.DEFINE_string(
    "weights",
    None,
    "Weights of the extractor: a .safetensors file of dit_jax.convert; of clip, the one in a folder of Hugging Face.",
)
PROTOCOL = flags.DEFINE_string(
    "protocol",
    None,
    "How clips become the input of i3d: styleganv, videogpt, tf or cd_fvd; recorded in the result. Default: styleganv.",
)
METRIC_NAMES = flags.DEFINE_list(
    "metrics",
    None,
    "Comma-separated list of fid, sfid, is, precision, recall, kid, clip_score, frame_cosine. Default: all that are possible.",
)
OUT = flags.DEFINE_string(
    "out", None, "Output file. Default: <samples>.<features>.json, or <run>.validation.json. Of --table: the screen."
)
command_line.group("Make a reference")
MAKE_REFERENCE = flags.DEFINE_string(
    "make_reference", None, "Write the statistics of --data to this npz instead of scoring samples."
)
DATA = flags.DEFINE_string(
    "data", None, "Data set: digits, an npz, folder:PATH (or PATH alone), clips:PATH, tfds:NAME:PATH or tars:PATTERN."
)
SPLIT = flags.DEFINE_string(
    "split",
    None,
    "Split of the data set in --data or --reference, or of the run's for --validation, as in train[:50%], where it has splits.",
)
RESOLUTION = flags.DEFINE_string(
    "resolution", None, "Size in pixels that --data is cropped to: one number for squares, or height x width, as in 256x384."
)
FRAMES = flags.DEFINE_integer("frames", None, "Frames of the clips of --data, from the middle of each. Default: images.")
FPS = flags.DEFINE_float("fps", None, "Frames per second of the clips of --data. Default: as they are stored.")
CHANNELS = flags.DEFINE_integer("channels", 3, "Channels of --data: 3 (RGB) or 1 (grey).")
KEEP_FEATURES = flags.DEFINE_boolean(
    "keep_features",
    None,
    "Store the features in --make_reference too; precision, recall and KID need them. Default: yes up to 50,000 images.",
)
command_line.group("Measure the validation loss")
VALIDATION = flags.DEFINE_string(
    "validation",
    None,
    "Folder of a run: measure the error of its weights on the held-out examples that its config names, or --split and --path.",
)
STEP = flags.DEFINE_string(
    "step", None, "Checkpoint: a step, or `best` for the best score during training. Default: the newest intact checkpoint."
)
AVERAGE = flags.DEFINE_string(
    "average",
    "default",
    "Weights of the run: its moving average, none for the weights themselves, or another average: 0.9995, power:0.075.",
)
PATH = flags.DEFINE_string("path", None, "Path of the held-out examples, in place of the run's data.path.")
command_line.group("Compare results")
TABLE = flags.DEFINE_list("table", None, "Comma-separated result files to compare in one table.")
FORMAT = flags.DEFINE_string("format", "text", "Format of --table: text, csv or markdown.")
command_line.group("Details of the scores")
REPLICATES = flags.DEFINE_integer(
    "replicates",
    1_000,
    "Number of bootstrap replicates for the interval of fid. 0 turns the interval off and stores no features.",
)
LEVEL = flags.DEFINE_float("level", 0.95, "Confidence level of the bootstrap interval, between 0 and 1.")
KID_SUBSET_SIZE = flags.DEFINE_integer("kid_subset_size", 1_000, "Images in each of the 100 subsets of KID.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Images per call of one process.")
processes.define_flags()

KEPT_IMAGES = 50_000


def make_table(results: list[str]) -> dict:
    from dit_jax.evaluate.table import table

    text = table(results, FORMAT.value)
    if OUT.value is None:
        print(text, flush=True)
        return {"results": len(results)}
    path = result_path(OUT.value)
    with claim_file(path, "writing the table"):
        write_atomic(path, text + "\n")
    return {"results": len(results), "out": str(path)}


def options():
    from dit_jax.evaluate.scores import Options

    metrics = None if METRIC_NAMES.value is None else tuple(METRIC_NAMES.value)
    return Options(metrics, KID_SUBSET_SIZE.value, REPLICATES.value, LEVEL.value, BATCH_SIZE.value, protocol=PROTOCOL.value)


def result_path(name: str) -> Path:
    """The absolute path; the first process checks that it can be written, before any work is done."""
    path = local_path(name).absolute()
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    if jax.process_index() == 0:
        try:
            check_writable(path)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); give another file") from None
    return path


def make_reference(out: str) -> dict:
    from dit_jax.data.size import parse_size
    from dit_jax.evaluate.extractors import load
    from dit_jax.evaluate.images import DIGITS_SHAPE, Images, NpzImages, cropped
    from dit_jax.evaluate.result_files import write_reference

    if DATA.value is None:
        raise UserError("give --data=<digits, an npz, a folder, tfds:NAME:PATH or tars:PATTERN> for --make_reference")
    if not out.endswith(".npz"):
        raise UserError(f"--make_reference={out} must end in .npz")
    path = result_path(out)
    images: Images
    if DATA.value.endswith(".npz"):
        images = NpzImages(local_path(DATA.value))
    else:
        is_digits = DATA.value == "digits"
        if RESOLUTION.value is None and not is_digits:
            raise UserError(f"give --resolution=<side, or height x width, in pixels> for --data={DATA.value}")
        size = parse_size(RESOLUTION.value) if RESOLUTION.value is not None else DIGITS_SHAPE[:2]
        channels = DIGITS_SHAPE[2] if is_digits else CHANNELS.value
        images = cropped(DATA.value, size, channels, SPLIT.value, FRAMES.value, FPS.value)
    keep = len(images) <= KEPT_IMAGES if KEEP_FEATURES.value is None else KEEP_FEATURES.value
    made = write_reference(path, images, load(FEATURES.value, WEIGHTS.value, PROTOCOL.value), keep, options())
    console.say(f"wrote statistics of {len(images)} images to {path}, {'with' if keep else 'without'} their features")
    return {
        "out": str(path),
        "num_reference": len(images),
        "reference_sha256": made.sha256,
        "keeps_features": keep,
        "outputs": list(made.moments),
        "extractor": made.recipe["extractor"],
    }


def score() -> dict:
    from dit_jax.evaluate.result_files import write_scores
    from dit_jax.evaluate.scores import METRICS, WITHOUT_REFERENCE

    wanted = set(METRIC_NAMES.value or ())
    alone = bool(wanted) and wanted <= set(WITHOUT_REFERENCE)
    if SAMPLES.value is None or (REFERENCE.value is None and not alone):
        raise UserError("give --samples=<npz or folder of dit_jax.sample> and --reference=digits, a folder or an npz")

    samples = local_path(SAMPLES.value)
    if not samples.exists():
        raise UserError(f"--samples={SAMPLES.value} does not exist; give an npz of images or a folder of dit_jax.sample")
    stem = samples.with_suffix("") if samples.suffix == ".npz" else samples
    path = result_path(OUT.value or f"{stem}.{FEATURES.value}.json")
    result = write_scores(path, SAMPLES.value, REFERENCE.value, FEATURES.value, WEIGHTS.value, options(), SPLIT.value)
    for remark in result["remarks"]:
        console.say(remark)
    numbers = ", ".join(f"{name} {result[name]:.6g}" for name in METRICS if name in result)
    if "fid_interval" in result:
        low, high = result["fid_interval"]
        numbers = numbers.replace(",", f" ({LEVEL.value:.0%}: {low:.6g} to {high:.6g}),", 1)
    console.say(f"{numbers}: {result['num_samples']} samples in {FEATURES.value} features, {path}")
    return result


def measure_validation(folder: str) -> dict:
    from dit_jax.evaluate.result_files import write_validation

    run = local_path(folder).absolute()
    path = result_path(OUT.value or f"{run}.validation.json")
    result = write_validation(path, run, STEP.value, AVERAGE.value, SPLIT.value, PATH.value)
    console.say(f"validation loss {result['validation_loss']:.6g} of step {result['step']}, {path}")
    return result


EXTRACTOR = {"split", "features", "weights", "protocol", "batch_size", *processes.FLAGS}
USES = {
    "--table": {"table", "format", "out"},
    "--make_reference": {"make_reference", "data", "resolution", "channels", "frames", "fps", "keep_features", *EXTRACTOR},
    "--validation": {"validation", "step", "average", "split", "path", "out", *processes.FLAGS},
    "--samples": {"samples", "reference", "metrics", "out", "kid_subset_size", "replicates", "level", *EXTRACTOR},
}


def check_flags() -> None:
    """Raises a UserError for a flag without effect."""
    tasks = {
        "samples": SAMPLES.value,
        "make_reference": MAKE_REFERENCE.value,
        "table": TABLE.value,
        "validation": VALIDATION.value,
    }
    asked = [name for name, value in tasks.items() if value]
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} are different tasks: give one of them")
    task = asked[0] if asked else "samples"
    command_line.check_uses(USES, f"--{task}")
    unused: dict[str, str] = {}
    if task == "samples":
        wanted = set(METRIC_NAMES.value or ("fid", "kid"))
        given = f"--metrics={','.join(METRIC_NAMES.value or ())}"
        unused |= {} if "fid" in wanted else {"replicates": given, "level": given}
        unused |= {} if "kid" in wanted else {"kid_subset_size": given}
        unused |= {} if REPLICATES.value else {"level": "--replicates=0"}
        unused |= {} if wanted & {"fid", "sfid", "precision", "recall", "kid"} else {"reference": given}
        unused |= {"split": "no --reference"} if REFERENCE.value is None else {}
    elif task == "make_reference" and DATA.value is not None:
        if DATA.value.endswith(".npz"):
            unused |= dict.fromkeys(("split", "resolution", "channels", "frames", "fps"), f"--data={DATA.value}, an npz")
        elif DATA.value == "digits":
            unused["channels"] = "--data=digits, which has one channel"
    for name in sorted(unused):
        if flags.FLAGS[name].present:
            raise UserError(f"--{name} has no effect with {unused[name]}; omit it")


def main() -> dict:
    check_flags()
    if TABLE.value:
        return make_table(TABLE.value)
    processes.join()
    if VALIDATION.value:
        return measure_validation(VALIDATION.value)
    return make_reference(MAKE_REFERENCE.value) if MAKE_REFERENCE.value else score()


if __name__ == "__main__":
    console.run(main, phase="scoring")
