"""Draws images from the moving-average weights of a trained run; needs only its folder.

    python -m dit_jax.sample --workdir=runs/digits --num_samples=100 --labels=3,5 --guidance_scale=1.5 --out=x.npz

Writes x.npz (arr_0: uint8 [N, H, W, C], labels: int32 [N], made_by: JSON) and x.png, a grid of the first 100.
"""

import time
from pathlib import Path

import jax
import ml_collections
from absl import flags

from dit_jax import console
from dit_jax.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run of dit_jax.main.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; the newest good one if not given.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 64, "How many images.")
LABELS = flags.DEFINE_list("labels", [], "Classes in turn, as in 3,5; all classes in turn if not given.")
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", None, "1 is off; the config's if not given.")
SAMPLER = flags.DEFINE_string("sampler", None, "ddpm or ddim; the config's if not given.")
NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Sampling steps; the config's if not given.")
SEED = flags.DEFINE_integer("seed", 0, "Image k depends on the seed, k and its label.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Images at a time, over all devices; the config's if not given.")
OUT = flags.DEFINE_string("out", "samples.npz", "Where the images go.")


def override(config: ml_collections.ConfigDict):
    """Puts the flags' choices into the config's sampler and guidance."""
    if SAMPLER.value is not None and SAMPLER.value != config.sampler.name:
        config.sampler = ml_collections.ConfigDict({"name": SAMPLER.value, "num_steps": config.sampler.num_steps})
    if NUM_STEPS.value is not None:
        config.sampler.num_steps = NUM_STEPS.value
    if GUIDANCE_SCALE.value is not None:
        config.guidance.scale = GUIDANCE_SCALE.value


def parse_labels(texts: list[str]) -> tuple[int, ...]:
    try:
        return tuple(int(text) for text in texts)
    except ValueError:
        raise UserError(f"--labels={','.join(texts)}: whole numbers with commas between them are needed, as in 3,5") from None


def main() -> dict:
    if WORKDIR.value is None:
        raise UserError("give --workdir=<folder of a run of dit_jax.main>")
    out = Path(OUT.value).expanduser().absolute()
    if out.suffix != ".npz":
        raise UserError(f"--out={OUT.value} must end in .npz")
    from dit_jax import build
    from dit_jax.training import samples_file
    from dit_jax.training.checkpoint import restore_subtree
    from dit_jax.training.generate import Generator, spread_labels
    from dit_jax.training.state import abstract_state
    from dit_jax.training.workdir import read_config

    config = ml_collections.ConfigDict(read_config(WORKDIR.value))
    override(config)
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}  # the devices at hand now, whatever trained it
    mesh = build.mesh(config)
    task = build.task(config)
    labels = spread_labels(NUM_SAMPLES.value, task.num_classes, parse_labels(LABELS.value))
    ways = build.rows_per_step(mesh)
    batch_size = BATCH_SIZE.value or -(-min(config.evaluation.batch_size, NUM_SAMPLES.value) // ways) * ways
    generator = Generator(task, mesh, build.sampler(config), build.guidance(config), batch_size, SEED.value)
    try:
        restored, _, step = restore_subtree(Path(WORKDIR.value).expanduser().absolute() / "checkpoints",
                                            {"ema_params": abstract_state(task.init, mesh).ema_params}, STEP.value)
    except FileNotFoundError as error:
        raise UserError(str(error)) from None
    constants = build.codec_params(config, mesh)
    console.say(f"sampling from step {step} of {WORKDIR.value}: {dict(config.sampler)}, guidance {config.guidance.scale}")
    start = time.monotonic()
    images = generator(restored["ema_params"], constants, labels, say_progress=True)
    seconds = time.monotonic() - start
    if jax.process_index() == 0:
        samples_file.write(out, images, labels, samples_file.describe(config, step, SEED.value))
    evaluations = config.sampler.num_steps * (2 if config.guidance.scale != 1 else 1)
    return {"out": str(out), "grid": str(out.with_suffix(".png")), "num_samples": len(images), "seconds": seconds,
            "evaluations": evaluations, "step": step}


if __name__ == "__main__":
    console.run(main)
