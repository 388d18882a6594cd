"""Writes loss_curves.json: the loss and the norm of the gradients of short runs, at steps 25, 50, 75 and 100.

    PYTHONPATH=tests/support python tests/golden/make_loss_curves.py [GROUP ...]

Each value is the mean over the steps since the point before. Named groups replace their part of the file. Record again only
when a change of the numbers is wanted, and say why in the commit.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from golden_runs import GOLDEN, overrides, records, run
from PIL import Image

FILE = GOLDEN / "loss_curves.json"
NUMBERS = ("loss", "grad_norm", "mse", "vb", "l1", "kl", "discriminator")
EVERY = {
    "num_steps": 100,
    "batch_size": 32,
    "log.every_steps": 25,
    "checkpoint.every_steps": 100,
    "preview.every_steps": 0,
    "evaluation.num_images": 0,
}
NETWORK = {"model.depth": 2, "model.width": 32, "model.heads": 4, "model.patch_size": 4}
CODEC = {"codec.block_out_channels": "(8,16)", "codec.norm_groups": 4}
DISCRIMINATOR = {
    "task.discriminator_weight": 0.5,
    "task.discriminator_start_step": 40,
    "task.discriminator.base_features": 8,
    "task.discriminator.num_layers": 1,
    "task.discriminator.norm_groups": 4,
}
# The fields by which the recipe for folders reads the digits: it has no warm-up, decay or clipping, which a flag cannot unset.
DIGITS = {
    "data.name": "digits",
    "data.split": "all",
    "transform.channels": 1,
    "transform.flip": False,
    "codec.image_channels": 1,
    "codec.mean": -0.39,
    "codec.std": 0.75,
    "optimizer.learning_rate": 1e-3,
}


def digits(argument="", **fields):
    """configs/digits.py with a small network and noise prediction; fields by dotted path with "__" for the dot."""
    prediction = {} if "process=" in argument else {"process.prediction": "noise"}
    return _curve("digits.py" + argument, NETWORK | _schedule() | prediction | _dotted(fields))


def plain(num_classes=10, **fields):
    """The digits with the recipe for folders: AdamW with a constant rate and nothing else."""
    return _curve(f"folder.py:S/4,8,{num_classes}", NETWORK | DIGITS | _dotted(fields))


def autoencoder(config="vae_digits.py", **fields):
    return _curve(config, CODEC | _schedule() | _dotted(fields))


def latent(**fields):
    """The digits in the latents of the group's autoencoder."""
    return _curve(
        "digits_latent.py", NETWORK | CODEC | _schedule() | {"model.patch_size": 2, "codec.path": "autoencoder"} | _dotted(fields)
    )


def cached(**fields):
    """configs/folder_latent.py on a cache of the digits."""
    sizes = {"codec.image_channels": 1, "codec.latent_channels": 2, "transform.channels": 1, "transform.flip": True}
    return _curve(
        "folder_latent.py:S/2,8,10",
        {"model.depth": 2, "model.width": 32, "model.heads": 4}
        | CODEC
        | sizes
        | {"codec.path": "autoencoder", "data.path": "cache", "optimizer.learning_rate": 1e-3}
        | _dotted(fields),
    )


def _schedule():
    return {"optimizer.learning_rate": 2e-3, "optimizer.warmup_steps": 20, "optimizer.decay_steps": 120}


def _dotted(fields):
    return {path.replace("__", "."): value for path, value in fields.items()}


def _curve(config, fields):
    return [f"--config=configs/{config}", *overrides(EVERY | fields)]


GROUPS = {
    "quick": {
        "digits": digits(),
    },
    "blocks": {
        "adaln": digits(":conditioning=adaln"),
        "cross_attention": digits(":conditioning=cross_attention"),
        "in_context": digits(":conditioning=in_context"),
        "patch 2, 4 blocks": digits(model__patch_size=2, model__depth=4),
        "no labels": plain(0),
        "written out": digits(model__unroll=True, model__remat="none"),
        "bfloat16": digits(model__dtype="bfloat16"),
    },
    "gaussian": {
        "noise, fixed variance": digits(process__variance="fixed_small"),
        "x0, learned variance": digits(process__prediction="x0"),
        "x0, fixed variance": digits(process__prediction="x0", process__variance="fixed_large"),
        "v, learned variance": digits(process__prediction="v"),
        "v, fixed variance": digits(process__prediction="v", process__variance="fixed_small"),
        "noise, min-SNR": digits(process__min_snr_gamma=5.0),
        "x0, min-SNR": digits(process__prediction="x0", process__min_snr_gamma=5.0, process__variance="fixed_small"),
        "v, min-SNR": digits(process__prediction="v", process__min_snr_gamma=5.0, process__variance="fixed_small"),
        "cosine": digits(process__schedule="cosine"),
        "scaled linear": digits(process__schedule="scaled_linear"),
        "100 timesteps": digits(process__num_timesteps=100),
    },
    "flow": {
        "linear": digits(":process=flow"),
    },
    "interpolants": {
        "gvp": digits(":process=flow", process__interpolant="gvp"),
        "logit-normal": digits(
            ":process=flow", process__time_distribution="logit_normal", process__logit_mean=-0.5, process__logit_std=1.2
        ),
        "shift": digits(":process=flow", process__shift=3.0),
        "spare channels": digits(":process=flow", process__spare_channels=True),
    },
    "edm": {
        "log-normal": digits(":process=edm"),
        "interpolated cosine, soft-min-SNR": digits(
            ":process=edm",
            process__time_distribution="interpolated_cosine",
            process__log_sigma_mean=-1.2,
            process__image_side=8,
            process__low_side=4,
            process__loss_weight="soft_min_snr",
        ),
        "snr": digits(":process=edm", process__loss_weight="snr"),
    },
    "recipe": {  # the first steps of configs/digits.py as it is
        "digits as they are": [
            "--config=configs/digits.py",
            *overrides({k: v for k, v in EVERY.items() if k != "batch_size"} | {"optimizer.decay_steps": 1000}),
        ],
    },
    "optimizer": {
        "constant rate": plain(),
        "weight decay": plain(optimizer__weight_decay=0.3),
        "warm-up": plain(optimizer__warmup_steps=60),
        "decay": plain(optimizer__decay_steps=110),
        "clipping": plain(optimizer__clip_norm=0.05),
        "moments": plain(optimizer__b1=0.5, optimizer__b2=0.95, optimizer__eps=1e-4),
        "microbatches": plain(microbatches=4),
        "seed 1": plain(seed=1),
        "every label": plain(task__label_dropout=0.0),
    },
    "autoencoder": {
        "discriminator": autoencoder(**DISCRIMINATOR),  # which starts at step 40
    },
    "autoencoders": {
        "grid": autoencoder(),
        "plane": autoencoder("vae_digits_plane.py", **{"codec.block_out_channels": "(8,16,16,16)"}),
    },
    "latents": {
        "encoded in the step": latent(),
    },
    "latents of a cache": {
        "cache": cached(),
        "resident cache": cached(loader__resident=True),
    },
    "images": {
        "folder": _curve("folder.py:S/4,8,2", NETWORK | {"data.path": "images", "optimizer.learning_rate": 1e-3}),
    },
    "images of an autoencoder": {
        "folder, autoencoder": _curve("vae_folder.py:8", CODEC | {"data.path": "images"} | _schedule()),
    },
}


def prepare(group: str, folder: Path) -> list[list]:
    """What a group's runs read, and the calls that make the rest of it."""
    if group.startswith("latents"):
        train = [word for word in autoencoder() if "num_steps" not in word]
        calls = [["main", *train, "--config.num_steps=30", "--workdir=autoencoder"]]
        if group == "latents of a cache":
            calls += [["encode", "--data=digits", "--codec=autoencoder", "--resolution=8", "--out=cache"]]
        return calls
    if group in ("images", "images of an autoencoder"):
        rng = np.random.default_rng(0)
        for number in range(48):
            # Smooth and unlike its mirror image.
            y, x = np.mgrid[0:12, 0:16] / 12
            waves = np.sin(rng.uniform(1, 6, 3) * x[..., None] + rng.uniform(1, 6, 3) * y[..., None] + rng.uniform(0, 6, 3))
            path = folder / "images" / f"class{number % 2}" / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((127.5 + 127 * waves).round().astype(np.uint8)).save(path)
    return []


def curves(group: str, folder: Path) -> dict[str, dict]:
    """{name: {"step": [25, ...], "loss": [...], ...}} of a group's runs."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = {name: f"run{number}" for number, name in enumerate(GROUPS[group])}
    calls = [["main", *GROUPS[group][name], f"--workdir={workdir}"] for name, workdir in runs.items()]
    run(folder, prepare(group, folder) + calls)
    found = {}
    for name, workdir in runs.items():
        rows = records(folder / workdir)
        found[name] = {"step": [row["step"] for row in rows]} | {
            number: [float(f"{row[number]:.7g}") for row in rows if number in row] for number in NUMBERS if number in rows[-1]
        }
    return found


def main():
    golden = json.loads(FILE.read_text()) if FILE.exists() else {}
    for group in sys.argv[1:] or GROUPS:
        with tempfile.TemporaryDirectory() as folder:
            golden[group] = curves(group, Path(folder))
        print(group, json.dumps(golden[group]), flush=True)
    text = json.dumps({group: golden[group] for group in GROUPS if group in golden}, indent=1)
    # One line per list of numbers.
    for old, new in (("[\n    ", "["), (",\n    ", ", "), ("\n   ]", "]")):
        text = text.replace(old, new)
    FILE.write_text(text + "\n")


if __name__ == "__main__":
    main()
