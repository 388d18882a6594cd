"""DiT, U-Net, HDiT and DiffiT at equal GMACs: three sizes on the 8 x 8 digits, two seeds; or one size on photographs at 64 px.

    python -m dit_jax.sweep --sweep=backbones --workdir=runs/backbones
    python -m dit_jax.sweep --sweep=backbones:photos=/data/photographs --workdir=runs/backbones_photos

All networks have the same data, flow, optimizer, batch and steps, and GMACs that differ by at most 5 %. All are conditioned on
the flow's time in [0, 1], as SiT and HDiT are; the U-Net and DiffiT were published with timesteps up to 999.
The photographs are one folder of images without classes. 300 of them train and the others, at least 100, are held out: the split
is a slice of the folder by the SHA-256 of the file names. The digits hold out the 297 that other people wrote.

`backbones:size=S` trains one size of the digits' networks, `backbones:steps=50` is a rehearsal with so many steps.
"""

from dit_jax import recipes
from dit_jax.errors import UserError
from dit_jax.sweep.grid import Sweep


def dit(patch_size, width, depth, heads):
    return {"name": "dit", "patch_size": patch_size, "width": width, "depth": depth, "heads": heads}


def diffit(patch_size, width, depth, heads, side):
    return {**dit(patch_size, width, depth, heads), "name": "diffit", "grid": (side // patch_size, side // patch_size)}


def unet(channels, multipliers, num_res_blocks, attention_factors):
    return {
        "name": "unet",
        "channels": channels,
        "multipliers": multipliers,
        "num_res_blocks": num_res_blocks,
        "attention_factors": attention_factors,
        "head_width": channels,
        "norm_groups": 4,
    }


def hdit(patch_size, widths, depths, kernel_size):
    return {
        "name": "hourglass",
        "patch_size": patch_size,
        "widths": widths,
        "depths": depths,
        "kernel_size": kernel_size,
        "head_width": 32,
        "mapping_width": max(64, widths[0]),
    }


MODELS = {  # about 1.6, 6.4 and 14.4 million multiply-adds for 8 x 8 x 1
    "DiT-S": dit(4, 64, 7, 4),
    "DiT-M": dit(4, 128, 7, 4),
    "DiT-L": dit(4, 192, 7, 6),
    "U-Net-S": unet(8, (1, 2), 2, (2,)),
    "U-Net-M": unet(16, (1, 2), 2, (2,)),
    "U-Net-L": unet(24, (1, 2), 2, (2,)),
    "HDiT-S": hdit(2, (32, 96), (1, 2), 3),
    "HDiT-M": hdit(2, (64, 128), (2, 3), 3),
    "HDiT-L": hdit(2, (96, 192), (2, 3), 3),
    "DiffiT-S": diffit(4, 72, 6, 3, 8),
    "DiffiT-M": diffit(4, 144, 6, 4, 8),
    "DiffiT-L": diffit(4, 216, 6, 6, 8),
}
PHOTO_MODELS = {  # about 0.24 GMACs for 64 x 64 x 3
    "DiT": dit(4, 80, 8, 5),
    "U-Net": unet(16, (1, 1, 2, 4), 1, (4, 8)),
    "HDiT": hdit(4, (96, 192), (2, 3), 7),
    "DiffiT": diffit(4, 80, 8, 5, 64),
}
TRAINED_PHOTOS = 300
STEPS, PHOTO_STEPS = 1_000, 800
SAMPLER_STEPS, PHOTO_SAMPLER_STEPS = 20, 12


def get_sweep(arg=""):
    chosen = recipes.choices(arg, ("photos", "size", "steps"))
    steps = chosen.get("steps", "")
    if steps and not (steps.isdecimal() and int(steps)):
        raise UserError(f"backbones:{arg}: steps is {steps!r}; it must be a number of training steps")
    if "photos" not in chosen:
        return of_digits(chosen.get("size", ""), int(steps or STEPS))
    if "size" in chosen:
        raise UserError(f"backbones:{arg}: there is one size of the networks for photographs; leave out size={chosen['size']}")
    return of_photos(chosen["photos"], int(steps or PHOTO_STEPS))


def of_digits(size, steps):
    models = {name: fields for name, fields in MODELS.items() if name.endswith(size and f"-{size}")}
    if not models:
        raise UserError(f"backbones:size={size}: choose S, M or L, or leave it out for all of them")
    return Sweep(
        title="Backbones at equal GMACs on the 8 x 8 digits",
        base="digits:process=flow",
        variants=variants(models, num_classes=10),
        grid=shared(steps, 64, 2e-3, SAMPLER_STEPS) | {"data.split": ["train"], "validation.split": ["test"]},
        seeds=[0, 1],
        compare="model.name",
        note="1,500 digits of scikit-learn train, 297 by other writers are held out. The reference is all 1,797 of them.",
    )


def of_photos(path, steps):
    return Sweep(
        title="Backbones at equal GMACs on photographs at 64 px",
        base="folder:S/4,64,0",
        variants=variants(PHOTO_MODELS, num_classes=0),
        grid=shared(steps, 16, 1e-3, PHOTO_SAMPLER_STEPS)
        | {
            "process.name": ["flow"],
            "data.path": [path],
            "data.split": [f"[:{TRAINED_PHOTOS}]"],
            "validation.split": [f"[{TRAINED_PHOTOS}:]"],
            "evaluation.num_images": [400],
            "evaluation.batch_size": [64],
            "evaluation.reference": [f"folder:{path}"],
            "evaluation.features": ["pixels8"],
        },
        compare="model.name",
        note=f"{TRAINED_PHOTOS} photographs train and the others are held out, by the order of the SHA-256 of their names. The "
        "reference of the Frechet distance is all of them.",
    )


def variants(models, num_classes):
    return {
        name: {f"model.{field}": value for field, value in {**fields, "num_classes": num_classes}.items()}
        for name, fields in models.items()
    }


def shared(steps, batch_size, learning_rate, sampler_steps):
    """Settings of all runs."""
    return {
        "num_steps": [steps],
        "batch_size": [batch_size],
        "ema_decay": [0.99],
        "optimizer.learning_rate": [learning_rate],
        "optimizer.warmup_steps": [min(100, steps // 10)],
        "optimizer.decay_steps": [steps],
        "optimizer.clip_norm": [1.0],
        "sampler.name": ["heun"],
        "sampler.num_steps": [sampler_steps],
        "preview.every_steps": [0],
        "checkpoint.every_steps": [steps],
        "log.every_steps": [50],
    }
