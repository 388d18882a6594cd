"""Functions that return the complete configs of the papers; `configs/*.py` call them.

A config has one section per object. Most sections are the `name` and keyword arguments of a constructor, so the constructors in
`build.py` are the schema:
  task       training task       model     network                 process    diffusion process
  codec      autoencoder         data      source of examples      transform  of an example
  loader     reading of batches  optimizer                         sampler, guidance, forecast of previews and the final samples
The others are read by the training loop: seed, num_steps, batch_size (global), microbatches, ema_decay, mesh, checkpoint, log,
profile, preview, evaluation (of the final samples), scoring (of cheaper ones while training).
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import ml_collections
from ml_collections import config_dict

import dit_jax.models.registered  # noqa: F401 - registers the networks
from dit_jax import registry
from dit_jax.data.captions import Captions
from dit_jax.data.retries import RETRY_SECONDS
from dit_jax.data.sources.digits import WORDS, pair_captions
from dit_jax.data.sources.rolling_digits import all_captions
from dit_jax.diffusion.samplers import default_sampler
from dit_jax.encoders.tokens import BytePairs
from dit_jax.errors import UserError
from dit_jax.models import hourglass, mmdit, sizes, unet, video_dit
from dit_jax.models import pixart as pixart_network
from dit_jax.models.sizes import MODELS as MODELS
from dit_jax.models.sizes import SIZES as SIZES
from dit_jax.tasks.adaptation import TARGETS

_FEATURES = (
    "of the Frechet distance: pixels (for tiny images), pixels8 (means of 8 x 8 cells), inception, dinov2, clip, or registered"
)
MEANINGS = {  # of the fields that no constructor's docstring has; all fields are listed by `config_reference`
    "seed": "Of the initial parameters, the order of the data, the noise and the samples; 0 to 2**32 - 1.",
    "num_steps": "Training steps.",
    "batch_size": "Images of a step, over all hosts and devices.",
    "microbatches": "Parts of the batch, computed in sequence, over which gradients are averaged: less memory, the same step.",
    "ema_decay": "Decay per step of the parameters' moving average, with which samples are drawn.",
    "ema_warmup": "The average's decay is at most (1 + step) / (10 + step): short runs do not sample their initial weights.",
    "averages": "Further moving averages, as ('0.9995', 'power:0.05', 'power:0.1'): decays, or relative widths (EDM2).",
    "init.weights": "What training starts from: a run, a file of convert, an official .pt, a diffusers folder; empty: random.",
    "init.step": "Checkpoint of a run in init.weights; the newest if unset.",
    "init.average": "Parameters of a run in init.weights: default (the moving average), none, or the name of an average.",
    "init.class_names": "File with the names of the classes of init.weights, one per line, where a run does not say them.",
    "init.freeze": "Patterns of parameters that keep their values, as ('blocks/.*', 'time_embedding/.*').",
    "init.lora.rank": "Rank of low-rank adapters, which are trained alone; 0 is off.",
    "init.lora.alpha": "Scale of the adapters' product times the rank; the rank if unset.",
    "init.lora.targets": "Patterns of the kernels that get adapters; the default stands for those of the network's kind.",
    "init.lora.train": "Patterns of parameters that are trained whole beside the adapters.",
    "imports": "Files of --import that registered constructors; set by the command line.",
    "mesh.zero1": "Split the optimizer's state and the moving average over fsdp, but not the parameters (ZeRO stage 1).",
    "mesh.offload": "Kept in host memory between steps: none, optimizer, or optimizer_and_ema.",
    "codec.path": "Weights of a VAE: a diffusers folder, a .safetensors file, or the workdir of a run that trained one.",
    "codec.sha256": "SHA-256 that the weights must have; any if empty. Set when they are read.",
    "task.perceptual_path": "Weights of LPIPS from `dit_jax.convert --from=lpips`; needed where perceptual_weight is above 0.",
    "log.every_steps": "Prints and records loss, rate and time every so many steps.",
    "log.wandb": "Name of a Weights & Biases project to log to; off if empty.",
    "log.watchdog_seconds": "Ends a process (75) if a step, batch or save takes so long, or other work 4 times so long; 0: off.",
    "preview.every_steps": "Draws a grid of images every so many steps; 0 turns previews off.",
    "preview.num_images": "Images of a preview.",
    "preview.prompts": "Of previews and samples of a network that takes text, in turn; empty: what captions.templates make.",
    "evaluation.num_images": "Images made at the end of the run, and scored if there is a reference; 0 for none.",
    "evaluation.batch_size": "Images that are drawn at a time, over all devices.",
    "evaluation.features": f"Features {_FEATURES}; none if empty.",
    "evaluation.weights": "The extractor's weights, a file of dit_jax.convert; empty for pixels.",
    "evaluation.reference": "What samples are scored against: digits, a folder, tfds:NAME:PATH, an npz of images or statistics.",
    "evaluation.split": "Split of the data set that is reconstructed and scored; the training split if unset.",
    "evaluation.normalize": "What the latents' scale makes 1: scale (their variance over all channels) or channel (of each).",
    "validation.split": "Held-out split of data whose loss is measured at the end, as test, or [90%:] of a folder; empty: off.",
    "validation.path": "Held-out data in place of data.path, as of another latent cache; empty: data.path.",
    "scoring.every_steps": "Scores samples against evaluation.reference every so many steps, and keeps the best; 0 is off.",
    "scoring.num_images": "Images of such a score.",
}


def model(size: str) -> dict:
    """Fields of the paper's model "S/8" .. "XL/2".

    Raises:
        UserError: no such size or patch.
    """
    return {
        "name": "dit",
        **sizes.fields(size),
        "mlp_ratio": 4.0,
        "conditioning": "adaln_zero",
        "attention": "auto",
        "remat": "auto",
        "unroll": config_dict.placeholder(bool),
        "position_grid": config_dict.placeholder(tuple),
        "dtype": "float32",
        "param_dtype": "float32",
    }


def loader(data: str = "") -> dict:
    """The section `loader` for a data set: a latent cache has a loader of its own, other records are read by threads."""
    reading = {"resident": False} if data == "latents" else {"num_workers": 0, "num_threads": 16, "max_bad_share": 0.001}
    return {**reading, "retry_seconds": RETRY_SECONDS}


def training() -> ml_collections.ConfigDict:
    """The fields that every config has, with the optimizer of the paper (section 4)."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "num_steps": 400_000,
            "batch_size": 256,
            "microbatches": 1,
            "ema_decay": 0.9999,
            "ema_warmup": False,
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1, "zero1": False, "offload": "none"},
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-4,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "warmup_steps": 0,
                "decay_steps": config_dict.placeholder(int),
                "clip_norm": config_dict.placeholder(float),
            },
            "loader": loader(),
            "checkpoint": {"every_steps": 5_000, "keep_last": 3, "keep_every_steps": 100_000},
            "log": {"every_steps": 100, "wandb": "", "watchdog_seconds": 1800.0},
            "profile": {"start_step": 0, "num_steps": 0},
            "preview": {"every_steps": 10_000, "num_images": 64},
            "evaluation": {"num_images": 0, "batch_size": 128, "features": "pixels", "weights": ""},
        }
    )


def decay_to_the_end(c: ml_collections.ConfigDict) -> None:
    """Makes the learning rate fall to zero at the last step: decay_steps follows num_steps, until it is set."""
    c.optimizer.decay_steps = c.get_ref("num_steps") + 0  # the sum is a reference of its own: setting it leaves num_steps


def diffusion() -> ml_collections.ConfigDict:
    """`training` for a diffusion model: labels, condition dropout, guidance, and scores of samples against a reference."""
    c = training()
    c.task = {"name": "diffusion", "cond_dropout": 0.1, "masks": ()}
    c.averages = ()
    c.init = init()
    c.conditioner = {"name": "labels"}
    c.guidance = {"name": "classifier_free", "scale": 1.0, "channels": config_dict.placeholder(int), "low": 0.0, "high": 1.0}
    c.guidance.update({"skip_layers": (), "skip_scale": 2.8, "skip_low": 0.01, "skip_high": 0.2})
    c.guidance.update({"schedule": "constant", "power": 4.0, "image_scale": 1.0})
    c.forecast = {"interval": 1, "order": 2, "warmup_steps": 3}
    c.evaluation.reference = ""
    c.validation = {"split": "", "path": ""}
    c.scoring = {"every_steps": 0, "num_images": 10_000, "sampler": default_sampler("dpmpp") | {"num_steps": 16}}
    return c


def init() -> dict:
    """The section `init`: training starts from random parameters and trains all of them."""
    return {
        "weights": "",
        "step": config_dict.placeholder(int),
        "average": "default",
        "class_names": "",
        "freeze": (),
        "lora": {"rank": 0, "alpha": config_dict.placeholder(float), "targets": TARGETS, "train": ()},
    }


def gaussian() -> dict:
    """The paper's process: linear betas, noise prediction, learned-range variance."""
    return {
        "name": "gaussian",
        "schedule": "linear",
        "num_timesteps": 1000,
        "prediction": "noise",
        "variance": "learned_range",
        "min_snr_gamma": config_dict.placeholder(float),
    }


def flow() -> dict:
    """SiT's process: linear interpolant, velocity, uniform times."""
    return {
        "name": "flow",
        "interpolant": "linear",
        "time_distribution": "uniform",
        "logit_mean": 0.0,
        "logit_std": 1.0,
        "shift": 1.0,
        "spare_channels": False,
        "convention": "sit",
        "sampling_grid": "uniform",
    }


def edm() -> dict:
    """EDM's process for images in [-1, 1]: log-normal noise levels, and the loss weight of the paper."""
    return {
        "name": "edm",
        "sigma_data": 0.5,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "rho": 7.0,
        "time_distribution": "log_normal",
        "log_sigma_mean": -1.2,
        "log_sigma_std": 1.2,
        "image_side": config_dict.placeholder(int),
        "low_side": 32,
        "high_side": config_dict.placeholder(int),
        "loss_weight": "edm",
    }


def image_transform(resolution: int, channels: int, flip: bool) -> dict:
    """Square centre crops; `size` (height, width) overrides the resolution if it is set."""
    return {
        "name": "image",
        "resolution": resolution,
        "channels": channels,
        "flip": flip,
        "upright": False,
        "size": config_dict.placeholder(tuple),
    }


def clip_transform(frames: int, resolution: int, channels: int, flip: bool) -> dict:
    """Square centre crops of clips of `frames` frames, as they are stored; `fps` chooses another rate, `size` another shape."""
    image = image_transform(resolution, channels, flip)
    del image["upright"]
    return {**image, "name": "clip", "frames": frames, "fps": config_dict.placeholder(float), "crop": "center"}


ADAFACTOR = {
    "decay_rate": 0.8,
    "min_factored_size": 128,
    "clipping_threshold": 1.0,
    "momentum": config_dict.placeholder(float),
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "decay_steps": config_dict.placeholder(int),
    "decay": "cosine",
    "decay_start": config_dict.placeholder(int),
    "clip_norm": config_dict.placeholder(float),
    "groups": (),
}
MUON = {
    "learning_rate": 0.02,
    "beta": 0.95,
    "nesterov": True,
    "num_iterations": 5,
    "consistent_rms": config_dict.placeholder(float),
    "adam_learning_rate": 1e-3,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "decay_steps": config_dict.placeholder(int),
    "decay": "cosine",
    "decay_start": config_dict.placeholder(int),
    "groups": (),
}
PROCESSES = {"gaussian": gaussian, "flow": flow, "edm": edm}
# The digits' codec gives them unit variance, which is twice the deviation that EDM's defaults are for.
DIGITS_PROCESS: dict[str, dict] = {"gaussian": {"prediction": "v"}, "edm": {"sigma_data": 1.0, "log_sigma_mean": -0.5}}
DIGITS_SAMPLER = {"gaussian": "dpmpp", "flow": "heun", "edm": "heun"}


def imagenet() -> dict:
    """ImageNet's training split as TFDS stores it; an empty `path` is TFDS's default folder."""
    return {
        "name": "tfds",
        "dataset": "imagenet2012",
        "path": "",
        "split": "train",
        "caption_key": config_dict.placeholder(str),
    }


def section(kind: str, name: str) -> dict:
    """Fields of a section that add to or replace its constructor's defaults; paths that a user must give are "".

    Args:
        kind: the section, as in "codec"; name: its constructor, as in "kl_vae".
    """
    if kind == "process" and name in PROCESSES:
        return PROCESSES[name]()
    if kind == "data" and name in ("folder", "clips", "tfds", "tars", "latents"):
        return {"path": ""}
    if kind == "codec" and name in ("kl_vae", "vq_vae", "causal_vae"):  # scale and shift are read with the weights
        return {"path": "", "sha256": "", "scale": config_dict.placeholder(object), "shift": config_dict.placeholder(object)}
    return {}


def choices(arg: str, names: tuple[str, ...]) -> dict[str, str]:
    """ "key=value,key=value" -> dict, for the text after the colon of --config=file.py:text.

    Raises:
        UserError: a key is not one of `names` or is repeated, or a part is not key=value.
    """
    chosen = {}
    for part in filter(None, arg.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not value or key not in names or key in chosen:
            raise UserError(f"config argument {part!r}: write each of {', '.join(names)} at most once, as in {names[0]}=...")
        chosen[key] = value
    return chosen


def latents() -> dict:
    """A latent cache, which `python -m dit_jax.encode` writes; set `path`."""
    return {"name": "latents", "path": "", "verify": True}


def dit(size: str = "XL/2", resolution: int = 256, cached: bool = False) -> ml_collections.ConfigDict:
    """DiT on ImageNet in the latent space of Stable Diffusion's VAE (Peebles & Xie 2023), which is downloaded on first use.

    Args:
        size: of the paper's models, "S/8" .. "XL/2".
        resolution: 256 or 512 in the paper.
        cached: train from a latent cache, and set `data.path` to it. Otherwise images are encoded inside the training step,
            and come from TFDS's default folder unless `data.path` is set.
    """
    c = diffusion()
    c.model = {**model(size), "num_classes": 1000, "dtype": "bfloat16"}
    c.process = gaussian()
    c.codec = {"name": "kl_vae", "path": "sd-vae-ft-mse", "sha256": "", "scale": 0.18215}
    c.data = latents() if cached else imagenet()
    if cached:
        c.loader = loader("latents")
    c.transform = image_transform(resolution, 3, flip=True)
    c.sampler = {**default_sampler("ddpm"), "num_steps": 250}
    return c


def sit(size: str = "XL/2", resolution: int = 256, cached: bool = False) -> ml_collections.ConfigDict:
    """SiT on ImageNet (Ma et al. 2024): DiT's networks and optimizer, with a flow instead of the Gaussian process.

    As in SiT's code, the network has the C channels that DiT uses for the variance; they are unused, so that its weights fit.
    The arguments are those of `dit`.
    """
    c = dit(size, resolution, cached)
    c.process = {**flow(), "spare_channels": True}
    c.sampler = default_sampler("sde")
    return c


def diffit(resolution: int = 256, cached: bool = False) -> ml_collections.ConfigDict:
    """DiffiT on ImageNet (Hatamizadeh et al. 2023), with the data, process, optimizer and autoencoder of `dit`.

    Samples are guided as the paper's: on 3 of 4 channels, at 256 with a scale that grows from 1 at noise to 4.4 at data, at 512
    with 1.49.

    Args:
        resolution: 256 or 512.
        cached: as of `dit`.

    Raises:
        UserError: another resolution.
    """
    guided: dict[int, dict] = {256: {"scale": 4.4, "schedule": "power_cosine"}, 512: {"scale": 1.49}}
    if resolution not in guided:
        raise UserError(
            f"DiffiT's resolution is 256 or 512, not {resolution}; for another, set model.grid and transform.resolution"
        )
    c = dit("XL/2", resolution, cached)
    tokens = resolution // 16  # per side: 8 pixels a latent, 2 latents a patch
    shared = {key: value for key, value in c.model.items() if key not in ("conditioning", "position_grid")}
    c.model = {**shared, "name": "diffit", "grid": (tokens, tokens)}  # the sizes are those of DiT-XL/2
    c.guidance.update({"channels": 3, **guided[resolution]})
    return c


def finetune(
    size: str = "XL/2", resolution: int = 256, num_classes: int = 1000, lora: bool = False, cached: bool = False
) -> ml_collections.ConfigDict:
    """`dit` from weights on a folder of photographs, one sub-folder per class; set `init.weights` and `data.path`.

    The moving average is shorter than the paper's, and begins without the initial weights (`ema_warmup`).

    Args:
        lora: train adapters of rank 16 and the label table, with a higher rate, in place of all parameters.
        cached: train from a latent cache.
    """
    c = dit(size, resolution, cached)
    c.model.num_classes = num_classes
    if not cached:
        c.data = {"name": "folder", "path": "", "split": ""}
        c.loader = loader()
    c.num_steps, c.batch_size, c.ema_decay, c.ema_warmup = 5_000, 32, 0.999, True
    c.optimizer.update({"learning_rate": 1e-4, "warmup_steps": 100, "clip_norm": 1.0})
    if lora:
        c.init.lora.update({"rank": 16, "train": ("label_embedding/embedding",)})
        c.optimizer.learning_rate = 3e-4
    c.checkpoint.update({"every_steps": 500, "keep_every_steps": config_dict.placeholder(int)})
    c.preview.update({"every_steps": 500, "num_images": 16})
    c.log.every_steps = 20
    c.guidance.scale = 1.5
    return c


def folder(size: str = "S/8", resolution: int = 32, num_classes: int = 1000) -> ml_collections.ConfigDict:
    """DiT directly on the pixels of a folder of photographs, one sub-folder per class; set `data.path`."""
    c = diffusion()
    c.model = {**model(size), "num_classes": num_classes}
    c.process = gaussian()
    c.codec = {"name": "pixels", "image_channels": 3, "mean": 0.0, "std": 0.5}
    c.data = {"name": "folder", "path": "", "split": ""}
    c.transform = image_transform(resolution, 3, flip=True)
    c.sampler = default_sampler("ddpm")
    c.log.every_steps = 20
    return c


def digits(process: str = "gaussian", conditioning: str = "adaln_zero", sampler: str | None = None) -> ml_collections.ConfigDict:
    """A small class-conditional DiT on scikit-learn's 8 x 8 digits: minutes on two CPU cores.

    Raises:
        UserError: no such process or sampler.
    """
    if process not in PROCESSES:
        raise UserError(f"process {process!r} does not exist; choose one of {', '.join(PROCESSES)}")
    c = diffusion()
    c.num_steps, c.batch_size, c.ema_decay = 1_000, 128, 0.99
    c.model = {**model("S/4"), "depth": 4, "width": 128, "heads": 4, "num_classes": 10, "conditioning": conditioning}
    c.process = PROCESSES[process]() | DIGITS_PROCESS.get(process, {})
    c.codec = {"name": "pixels", "image_channels": 1, "mean": -0.39, "std": 0.75}
    c.data = {"name": "digits", "path": "", "split": "all"}
    c.transform = image_transform(8, 1, flip=False)
    c.loader.num_threads = 2
    c.sampler = default_sampler(sampler or DIGITS_SAMPLER[process])
    c.optimizer.update({"learning_rate": 4e-3, "warmup_steps": 100, "clip_norm": 1.0})
    decay_to_the_end(c)
    c.checkpoint.update({"every_steps": 500, "keep_every_steps": config_dict.placeholder(int)})
    c.preview.update({"every_steps": 500, "num_images": 50})
    c.evaluation.update({"num_images": 1_000, "batch_size": 250, "reference": "digits"})
    return c


DIGIT_CAPTIONS: dict[str, Any] = {
    "templates": ("{a} {name}", "a handwritten {name}"),
    "long_templates": ("a handwritten {name} on a black background", "a small picture of a handwritten {name}"),
    "names": WORDS,
    "long_caption_rate": 0.3,
}


def text(c: ml_collections.ConfigDict, encoders: tuple[str, ...], **fields: Any) -> ml_collections.ConfigDict:
    """The config with text as its condition, by these encoders and fields of `encoders.text.Text`."""
    paths = {"weights": (), "tokenizers": (), "sha256": (), "missing": ()}
    sizes = {"lengths": (), "width": 128, "depth": 0, "merges": ()}
    defaults = {**paths, **sizes, "dropout": (), "mask": False, "pooled": True, "trainable": False, "dtype": "bfloat16"}
    c.conditioner = {"name": "text", "encoders": encoders, **defaults, **fields}
    c.captions = {"templates": (), "long_templates": (), "names": (), "long_caption_rate": 0.0}
    c.preview.prompts = ()
    return c


def digits_text(task: str = "digits") -> ml_collections.ConfigDict:
    """Text to image on the digits: a small MM-DiT from scratch, as a flow, with captions such as "a handwritten three".

    Its byte pairs are learned from the captions.

    Args:
        task: "digits", one digit; or "pairs", two side by side on 8 x 16 pixels, "three seven".

    Raises:
        UserError: no such task.
    """
    if task not in ("digits", "pairs"):
        raise UserError(f"task {task!r} does not exist; choose digits or pairs")
    c = digits("flow")
    c.process.time_distribution = "logit_normal"
    if task == "pairs":
        c.data = {"name": "digit_pairs", "path": "", "split": "all", "count": 20_000}
        c.transform.size = (8, 16)
        texts = [text for first in WORDS for second in WORDS for text in pair_captions(first, second)]
    else:
        texts = Captions(**DIGIT_CAPTIONS).all_of(())
    merges = BytePairs.learned(texts, 512).merges
    c = text(c, ("bpe",), lengths=(12,), merges=tuple(itertools.chain(*merges)))
    c.captions.update(DIGIT_CAPTIONS if task == "digits" else {"long_caption_rate": 0.3})
    fields = {"patch_size": 2, "depth": 3, "width": 128, "heads": 4, "qk_norm": True, "context_width": 128, "pooled_width": 128}
    c.model = {"name": "mmdit", **registry.defaults("model", "mmdit"), **fields}
    c.num_steps, c.optimizer.learning_rate = 800, 2e-3
    decay_to_the_end(c)
    c.guidance.scale = 2.0
    c.sampler = {**default_sampler("euler"), "num_steps": 25}
    c.preview.update({"prompts": tuple(texts), "num_images": 40})
    c.evaluation.update({"features": "", "reference": ""})
    return c


def digits_cascade(stage: str = "first") -> ml_collections.ConfigDict:
    """Digits in two stages: the first draws 4 x 4 pixels, the second 8 x 8 from them.

    Args:
        stage: "first", a DiT; "second", a VideoDiT with the lower resolution as its condition; "adm", such a U-Net.

    Raises:
        UserError: no such stage.
    """
    if stage not in ("first", "second", "adm"):
        raise UserError(f"stage {stage!r} does not exist; choose first, second or adm")
    c = digits()
    if stage == "first":
        c.transform.resolution, c.model.patch_size = 4, 1
        c.evaluation.reference, c.evaluation.features = "", ""
        return c
    if stage == "second":
        fields = {"patch_size": 2, "depth": 4, "width": 128, "heads": 4, "num_classes": 10, "windows": ((0, 0, 0),)}
        c.model = {"name": "video_dit", **registry.defaults("model", "video_dit"), **fields, "low_res_channels": 1}
    else:
        fields = {"channels": 32, "multipliers": (1, 2), "num_res_blocks": 1, "attention_factors": (2,), "head_width": 32}
        c.model = {"name": "unet", **registry.defaults("model", "unet"), **fields, "num_classes": 10, "low_res_channels": 1}
        c.optimizer.learning_rate = 2e-3
    c.task.low_resolution = {"sides": 2, "frames": 1, "most_noise": 0.3, "noise": 0.1}
    c.preview.every_steps, c.evaluation.num_images = 0, 0
    return c


MASKS = ("none=0.45", "first=0.37", "first_2=0.05", "last_2=0.05", "ends=0.05", "random=0.03")


def rolling_digits(task: str = "video") -> ml_collections.ConfigDict:
    """Text to video and image on digits that roll over a torus: a small MM-DiT, which also animates, extends and connects clips.

    Clips have 4 frames of 8 x 8 pixels and captions such as "a three rolling left". Of four steps, three are on clips and one is
    on images with captions such as "a three", with as many tokens.

    Args:
        task: "video", or "image" for images alone.

    Raises:
        UserError: no such task.
    """
    if task not in ("video", "image"):
        raise UserError(f"task {task!r} does not exist; choose video or image")
    c = digits_text()
    c.data = {"name": "rolling_digits", "path": "", "split": "all", "frames": 4, "step": 2, "size": 8, "fps": 4.0, "images": True}
    c.transform = clip_transform(4, 8, 1, flip=False)
    c.buckets = {"classes": ((4, 8, 8, 32, 3), (1, 8, 8, 128, 1))}
    texts = all_captions()
    merges = BytePairs.learned(texts, 512).merges
    c = text(c, ("bpe",), lengths=(8,), merges=tuple(itertools.chain(*merges)))
    c.captions.long_caption_rate = 0.0
    c.model.update({"position": "rope", "known_frames": True, "rope_widths": (8, 12, 12), "base_fps": 4.0})
    c.task.masks = MASKS
    c.process.logit_mean = 1.25
    c.num_steps, c.batch_size, c.ema_decay = 3_800, 32, 0.995
    c.optimizer = {"name": "muon", **MUON, "adam_learning_rate": 2e-3, "warmup_steps": 100, "clip_norm": 1.0}
    decay_to_the_end(c)
    c.preview.update({"prompts": tuple(texts[:60]), "num_images": 60})
    c.evaluation.num_images = 120
    if task == "image":
        c.data.update({"frames": 1, "images": False})
        c.transform.frames, c.buckets.classes = 1, ()
        c.task.masks, c.model.known_frames = (), False
        c.batch_size, c.num_steps, c.process.logit_mean = 128, 800, 0.0
        c.preview.update({"prompts": tuple(texts[:10]), "num_images": 40})
    return c


def autoencoder(codec: dict, kl_weight: float = 1e-6) -> ml_collections.ConfigDict:
    """`training` for a KL autoencoder: L1 and KL; the perceptual distance and the discriminator are off.

    codec: fields of the section; its name is "kl_vae" unless it is given.
    """
    c = training()
    c.task = {
        "name": "autoencoder",
        "kl_weight": kl_weight,
        "perceptual_weight": 0.0,
        "perceptual_path": "",
        "discriminator_weight": 0.0,
        "discriminator_start_step": 0,
        "discriminator": {"base_features": 64, "num_layers": 3, "norm_groups": 32},
    }
    flat = {"name": "kl_vae", "use_quant_conv": True} if codec.get("name", "kl_vae") == "kl_vae" else {}
    c.codec = {**flat, "scale": 1.0, "dtype": "float32", **codec}
    c.ema_decay = 0.999
    c.evaluation.update({"split": config_dict.placeholder(str), "normalize": "scale"})
    return c


# Sizes of the autoencoders below; the configs of diffusion models in their latents use the same.
DIGITS_CODEC = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "latent_channels": 2,
    "image_channels": 1,
    "norm_groups": 8,
}
PLANE_CODEC = {**DIGITS_CODEC, "block_out_channels": (32, 64, 64, 64)}
FOLDER_CODEC = {
    "block_out_channels": (16, 32, 64),
    "layers_per_block": 1,
    "latent_channels": 4,
    "image_channels": 3,
    "norm_groups": 8,
}


def vae_f8(resolution: int = 256) -> ml_collections.ConfigDict:
    """Stable Diffusion's autoencoder on ImageNet, as latent diffusion trains it (Rombach et al. 2022, their kl-f8 config).

    Set `task.perceptual_path` to LPIPS's weights, and `data.path` if ImageNet is not in TFDS's default folder.
    """
    sizes = {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
        "image_channels": 3,
        "norm_groups": 32,
        "dtype": "bfloat16",
    }
    c = autoencoder(sizes)
    c.task.update({"perceptual_weight": 1.0, "discriminator_weight": 0.5, "discriminator_start_step": 50_001})
    c.num_steps, c.batch_size, c.ema_decay = 400_000, 96, 0.9999
    c.optimizer.update({"learning_rate": 1e-4, "b1": 0.5, "b2": 0.9})
    c.data = imagenet()
    c.transform = image_transform(resolution, 3, flip=True)
    c.evaluation.update({"num_images": 10_000, "split": "validation", "features": ""})
    return c


def vae_folder(resolution: int = 64) -> ml_collections.ConfigDict:
    """A small autoencoder (f4, 4 channels) on a folder of photographs; set `data.path`."""
    c = autoencoder(FOLDER_CODEC)
    c.num_steps, c.batch_size, c.ema_decay = 1_500, 16, 0.99
    c.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 100, "clip_norm": 1.0})
    decay_to_the_end(c)
    c.data = {"name": "folder", "path": "", "split": ""}
    c.transform = image_transform(resolution, 3, flip=True)
    c.log.every_steps = 20
    c.checkpoint.update({"every_steps": 500, "keep_every_steps": config_dict.placeholder(int)})
    c.preview.update({"every_steps": 500, "num_images": 20})
    c.evaluation.update({"num_images": 100, "features": ""})
    return c


# Sizes of causal autoencoders: a small one for a CPU, and the geometries of W.A.L.T (Gupta et al. 2023) and Wan 2.1.
CLIPS_CODECS: dict[str, dict] = {
    "small": {
        "base": 16,
        "mult": (1, 2, 4),
        "blocks": 1,
        "z": 8,
        "temporal": (True, True),
        "norm": "frame_group",
        "norm_groups": 8,
    },
    "walt": {"base": 128, "mult": (1, 2, 2, 4), "blocks": 2, "z": 8, "temporal": (False, True, True), "dtype": "bfloat16"},
    "wan": {"base": 96, "mult": (1, 2, 4, 4), "blocks": 2, "z": 16, "temporal": (False, True, True), "dtype": "bfloat16"},
}


def vae_clips(size: str = "small", resolution: int = 64, frames: int = 9) -> ml_collections.ConfigDict:
    """A causal autoencoder on a folder of clips; set `data.path`.

    The large sizes have latent diffusion's loss: set `task.perceptual_path` to LPIPS's weights. W.A.L.T's codec is trained for
    2,000 epochs of UCF-101, or 270,000 steps of Kinetics-600, with a batch of 256 at 128 px and 17 frames.

    Args:
        size: of CLIPS_CODECS.
        frames: of a clip; 1 + a multiple of 4.

    Raises:
        UserError: no such size.
    """
    if size not in CLIPS_CODECS:
        raise UserError(f"size {size!r} does not exist; choose one of {', '.join(CLIPS_CODECS)}")
    c = autoencoder({"name": "causal_vae", **CLIPS_CODECS[size]})
    c.data = {"name": "clips", "path": "", "split": "", "fps": config_dict.placeholder(float)}
    c.transform = {
        "name": "clip",
        "frames": frames,
        "resolution": resolution,
        "channels": 3,
        "flip": True,
        "crop": "random",
        "fps": config_dict.placeholder(float),
        "size": config_dict.placeholder(tuple),
    }
    if size != "small":
        c.task.update({"perceptual_weight": 1.0, "discriminator_weight": 0.5, "discriminator_start_step": 50_001})
        c.num_steps, c.batch_size, c.ema_decay = 270_000, 256, 0.9999
        c.optimizer.update({"learning_rate": 1e-4, "b1": 0.5, "b2": 0.9})
        c.evaluation.update({"num_images": 1_000, "features": ""})
        return c
    c.num_steps, c.batch_size, c.ema_decay = 2_000, 4, 0.99
    c.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 50, "clip_norm": 1.0})
    decay_to_the_end(c)
    c.log.every_steps = 20
    c.checkpoint.update({"every_steps": 250, "keep_every_steps": config_dict.placeholder(int)})
    c.preview.update({"every_steps": 500, "num_images": 8})
    c.evaluation.update({"num_images": 0, "batch_size": 8, "features": ""})
    return c


def vae_digits(latent: str = "grid") -> ml_collections.ConfigDict:
    """A small autoencoder on the digits: 8 x 8 pixels to 4 x 4 x 2 numbers ("grid"), or to 2 ("plane").

    Trains on the first 1,500 digits; evaluates on the other 297, which other people wrote.

    Raises:
        UserError: no such latent.
    """
    if latent not in ("grid", "plane"):
        raise UserError(f"latent {latent!r} does not exist; choose grid or plane")
    c = autoencoder(DIGITS_CODEC if latent == "grid" else PLANE_CODEC, kl_weight=1e-3 if latent == "grid" else 0.08)
    c.num_steps, c.batch_size, c.ema_decay = 800, 128, 0.99
    c.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 50, "clip_norm": 1.0})
    decay_to_the_end(c)
    c.data = {"name": "digits", "path": "", "split": "train"}
    c.transform = image_transform(8, 1, flip=False)
    c.loader.num_threads = 2
    c.checkpoint.update({"every_steps": 400, "keep_every_steps": config_dict.placeholder(int)})
    c.preview.update({"every_steps": 400, "num_images": 50})
    c.evaluation.update({"num_images": 297, "batch_size": 100, "split": "test"})
    return c


def in_latents(c: ml_collections.ConfigDict, codec: dict) -> ml_collections.ConfigDict:
    """The config with diffusion in the latents of an autoencoder of these sizes; set `codec.path` to the autoencoder's run.

    The scale and shift of the latents are those that the autoencoder's run measured.
    """
    c.codec = {
        "name": "kl_vae",
        "path": "",
        "sha256": "",
        "use_quant_conv": True,
        **codec,
        "scale": config_dict.placeholder(object),
        "shift": config_dict.placeholder(object),
    }
    return c


def digits_latent() -> ml_collections.ConfigDict:
    """`digits` in the latents of `vae_digits`: set `codec.path` to its workdir. Images are encoded inside the step."""
    c = in_latents(digits(), DIGITS_CODEC)
    c.model.patch_size, c.process.prediction, c.sampler = 1, "noise", default_sampler("ddpm")
    c.num_steps, c.optimizer.learning_rate = 1_200, 2e-3
    return c


def folder_latent(size: str = "S/2", resolution: int = 64, num_classes: int = 0) -> ml_collections.ConfigDict:
    """DiT on a latent cache of a folder of photographs, encoded by `vae_folder`.

    Set `data.path` to the cache (`python -m dit_jax.encode`) and `codec.path` to the autoencoder's workdir.
    """
    c = in_latents(folder(size, resolution, num_classes), FOLDER_CODEC)
    c.data = latents()
    c.loader = loader("latents")
    return c


def hdit(size: str = "L", resolution: int = 256) -> ml_collections.ConfigDict:
    """HDiT on the pixels of ImageNet, with the EDM process (Crowson et al. 2024).

    Times are an interpolated cosine, the loss has the weight soft-min-SNR, and parameters have the rates and decays of
    k-diffusion's groups.

    Args:
        size: "S", "M" or "L".
        resolution: a multiple of 16; 256 in the paper.

    Raises:
        UserError: no such size.
    """
    sizes = {name.removeprefix("HDiT-").removesuffix("@256"): published for name, published in hourglass.PUBLISHED.items()}
    if size not in sizes:
        raise UserError(f"size {size!r} does not exist; choose one of {', '.join(sizes)}")
    c = diffusion()
    fields = {key: value for key, value in sizes[size].fields.items() if key != "out_channels"}
    c.model = {"name": "hourglass", **registry.defaults("model", "hourglass"), **fields, "dtype": "bfloat16"}
    c.process = edm() | {"sigma_min": 0.01, "sigma_max": 160.0, "loss_weight": "soft_min_snr"}
    c.process.update({"time_distribution": "interpolated_cosine", "image_side": resolution})
    c.codec = {"name": "pixels", "image_channels": 3, "mean": 0.0, "std": 1.0}  # sigma_data is the deviation of [-1, 1]
    c.data = imagenet()
    c.transform = image_transform(resolution, 3, flip=True)
    c.sampler = default_sampler("dpmpp_3m_sde") | {"num_steps": 50}
    c.optimizer.update({"learning_rate": 5e-4, "b1": 0.9, "b2": 0.95, "weight_decay": 1e-2})
    c.optimizer.groups = hourglass.GROUPS
    c.ema_warmup = True
    return c


def unet_model(name: str) -> dict:
    """Fields of a published U-Net, "ADM@256" or "LDM-4@256".

    Raises:
        UserError: no such network.
    """
    if name not in unet.PUBLISHED:
        raise UserError(f"{name} is not a U-Net that was published; choose one of {', '.join(unet.PUBLISHED)}")
    fields = {key: value for key, value in unet.PUBLISHED[name].fields.items() if key != "out_channels"}
    return {"name": "unet", **registry.defaults("model", "unet"), **fields, "dtype": "bfloat16"}


ADM_TRAINING = {  # resolution: steps, batch size, learning rate (Dhariwal & Nichol 2021, table 11)
    64: (540_000, 2048, 3e-4),
    128: (4_360_000, 256, 1e-4),
    256: (1_980_000, 256, 1e-4),
    512: (1_940_000, 256, 1e-4),
}


def adm(resolution: int = 256) -> ml_collections.ConfigDict:
    """ADM's U-Net on the pixels of ImageNet (Dhariwal & Nichol 2021).

    Its label table has no null label, so there is no classifier-free guidance; the paper's guidance, by a classifier, is not part
    of this recipe. At 64 px the paper has a dropout of 0.1 in addition.

    Args:
        resolution: 64, 128, 256 or 512.

    Raises:
        UserError: another resolution.
    """
    if resolution not in ADM_TRAINING:
        raise UserError(f"ADM has no network for {resolution} px; choose {', '.join(map(str, ADM_TRAINING))}")
    c = diffusion()
    c.num_steps, c.batch_size, c.optimizer.learning_rate = ADM_TRAINING[resolution]
    c.model = unet_model(f"ADM@{resolution}")
    c.process = gaussian() | ({"schedule": "cosine"} if resolution == 64 else {})
    c.task.cond_dropout = 0.0
    c.codec = {"name": "pixels", "image_channels": 3, "mean": 0.0, "std": 1.0}
    c.data = imagenet()
    c.transform = image_transform(resolution, 3, flip=True)
    c.sampler = {**default_sampler("ddpm"), "num_steps": 250}
    return c


def ldm4(cached: bool = False) -> ml_collections.ConfigDict:
    """LDM-4's U-Net on ImageNet at 256 px, in the latents of VQ-f4 (Rombach et al. 2022; their config cin256-v2).

    Set `codec.path` to the weights of VQ-f4.

    Args:
        cached: train from a latent cache, and set `data.path` to it.
    """
    c = diffusion()
    c.num_steps, c.batch_size = 178_000, 1200
    c.model = unet_model("LDM-4@256")
    c.process = gaussian() | {"schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "variance": "fixed_small"}
    c.codec = {"name": "vq_vae", "path": "", "sha256": "", "scale": 1.0}
    c.data = latents() if cached else imagenet()
    if cached:
        c.loader = loader("latents")
    c.transform = image_transform(256, 3, flip=True)
    c.sampler = {**default_sampler("ddim"), "num_steps": 250, "eta": 1.0}
    c.optimizer.weight_decay = 0.01  # PyTorch's default, which their code leaves
    c.ema_warmup = True
    return c


PROMPTS = (  # of previews
    "a photograph of a red fox in the snow",
    "a watercolour of a harbour in the morning",
    "a wooden chair beside a window",
    "a sign that says hello",
)


def text_model(name: str) -> dict:
    """The section `model` of a published text network, "SD3-medium@1024" or "PixArt-alpha@256".

    Raises:
        UserError: no such network.
    """
    kinds = {"mmdit": mmdit.PUBLISHED, "pixart": pixart_network.PUBLISHED}
    for kind, published in kinds.items():
        if name in published:
            fields = {key: value for key, value in published[name].fields.items() if key != "out_channels"}
            return {"name": kind, **registry.defaults("model", kind), **fields, "dtype": "bfloat16"}
    raise UserError(
        f"{name} is not a published text network; choose one of {', '.join(key for x in kinds.values() for key in x)}"
    )


def sd3(name: str = "SD3-medium@1024", cached: bool = False) -> ml_collections.ConfigDict:
    """Stable Diffusion 3 and 3.5: MM-DiT as a rectified flow on captioned images in tars (Esser et al. 2024).

    Set `data.path` to the tars, `codec.path` to the autoencoder of 16 channels and `conditioner.weights` to the text encoders;
    `convert --part=` takes them out of a file that has all parts. Each encoder is dropped from 46.4 % of the examples (appendix
    B.3), and a tenth of them has the empty prompt, as guidance has it in sampling. Half of the examples that have a long caption
    are trained with it (section 5.2.2). The autoencoder's scale and shift are those of Stability. Batch size, warm-up and number
    of steps are from memory of the paper, which has no full table of them.

    Args:
        name: of the network, one of `models.mmdit.PUBLISHED`.
        cached: train from a latent cache, and set `data.path` to it.

    Raises:
        UserError: no such network.
    """
    c = diffusion()
    c.model = text_model(name)
    c = text(c, ("clip_l", "clip_g", "t5_xxl"), lengths=(77, 77, 256), dropout=(0.464,))
    c.task.cond_dropout = 0.1
    c.process = flow() | {"time_distribution": "logit_normal", "shift": 3.0, "convention": "sd3", "sampling_grid": "sd3"}
    c.codec = section("codec", "kl_vae") | {"name": "kl_vae", "latent_channels": 16, "use_quant_conv": False}
    c.codec.update({"scale": 1.5305, "shift": 0.0609})
    c.batch_size, c.num_steps, c.optimizer.warmup_steps = 1024, 500_000, 1000
    c.captions.long_caption_rate = 0.5
    return _captioned(c, 1024, cached, default_sampler("euler") | {"num_steps": 28}, 4.0 if name == "SD3.5-large@1024" else 5.0)


PIXART_TRAINING = {  # resolution: batch size of 64 GPUs (their configs), steps (from memory of the paper's table of stages)
    256: (64 * 176, 150_000),
    512: (64 * 38, 100_000),
    1024: (32 * 12, 50_000),
}


def pixart(resolution: int = 256, cached: bool = False) -> ml_collections.ConfigDict:
    """PixArt-alpha on captioned images in tars (Chen et al. 2023), and PixArt-Sigma's network at 1024 px (Chen et al. 2024).

    Set `data.path` to the tars and `conditioner.weights` to T5 v1.1 XXL; at 1024 px also `codec.path` to SDXL's autoencoder.
    Rates, decay and warm-up are those of their configs, the text to image stage of the paper. The paper starts it from a
    class-conditional DiT; here it starts from random parameters, or from PixArt's own with `init.weights`.

    Args:
        resolution: 256, 512 or 1024.
        cached: train from a latent cache, and set `data.path` to it.

    Raises:
        UserError: another resolution.
    """
    if resolution not in (256, 512, 1024):
        raise UserError(f"PixArt's resolution is 256, 512 or 1024, not {resolution}; for another, set transform.resolution")
    sigma = resolution == 1024
    c = diffusion()
    c.model = text_model("PixArt-Sigma@1024" if sigma else f"PixArt-alpha@{resolution}")
    c = text(c, ("t5_xxl",), lengths=(300 if sigma else 120,), mask=True, pooled=False)
    c.process = gaussian()
    published = "" if sigma else "sd-vae-ft-mse"
    c.codec = {"name": "kl_vae", "path": published, "sha256": "", "scale": 0.13025 if sigma else 0.18215}
    c.batch_size, c.num_steps = PIXART_TRAINING[resolution]
    # Their code scales a rate of 2e-5 by the root of batch / 256.
    c.optimizer.update({"learning_rate": 2e-5 * (c.batch_size / 256) ** 0.5, "warmup_steps": 1000})
    c.optimizer.update({"eps": 1e-10, "weight_decay": 0.03, "clip_norm": 0.01})
    return _captioned(c, resolution, cached, default_sampler("dpmpp") | {"num_steps": 20}, 4.5)


def _captioned(
    c: ml_collections.ConfigDict, resolution: int, cached: bool, sampler: dict, scale: float
) -> ml_collections.ConfigDict:
    """The data, sampler and guidance of a text network."""
    c.data = latents() if cached else {"name": "tars", "path": ""}
    if cached:
        c.loader = loader("latents")
    c.transform = image_transform(resolution, 3, flip=False)  # a caption may say left and right
    c.sampler = sampler
    c.guidance.scale = scale
    c.preview.prompts = PROMPTS
    return c


LATTE_CODEC = {  # the layout of Stable Diffusion's autoencoder, of which each frame is encoded alone
    "base": 128,
    "mult": (1, 2, 4, 4),
    "z": 4,
    "norm": "frame_group",
    "temporal": (False, False, False),
    "scale": 0.18215,
}
WALT_CODEC = {"base": 128, "mult": (1, 2, 2, 4), "z": 8, "temporal": (False, True, True)}  # 4 frames and 8 x 8 pixels a latent


def _clip_transform(frames: int, height: int, width: int, fps: float | None = None) -> dict:
    """Clips of so many frames and a given size, or of a square, in colour, flipped."""
    c = clip_transform(frames, max(height, width), 3, flip=True)
    return c | ({"fps": fps} if fps else {}) | ({"size": (height, width)} if height != width else {})


def _clips(c: ml_collections.ConfigDict, codec: dict, transform: dict, dataset: str, cached: bool) -> ml_collections.ConfigDict:
    """The codec, data and transform of a network for clips.  dataset: of TFDS; "" for tars."""
    c.codec = {"name": "causal_vae", **section("codec", "causal_vae"), **codec}
    tfds = {"name": "tfds", "dataset": dataset, "path": "", "split": "train", "caption_key": config_dict.placeholder(str)}
    c.data = latents() if cached else tfds if dataset else {"name": "tars", "path": ""}
    if cached:
        c.loader = loader("latents")
    c.transform = transform
    return c


def _video_model(name: str) -> dict:
    """The section `model` of a published network for clips."""
    fields = {key: value for key, value in video_dit.VideoDiT.published[name].fields.items() if key != "out_channels"}
    return {"name": "video_dit", **registry.defaults("model", "video_dit"), **fields, "dtype": "bfloat16"}


def latte(cached: bool = False) -> ml_collections.ConfigDict:
    """Latte-XL/2 on UCF-101: 16 frames, 3 apart, at 256 px (Ma et al. 2024), in the latents of Stable Diffusion's autoencoder.

    Set `codec.path` to the autoencoder.

    Args:
        cached: train from a latent cache, and set `data.path` to it.
    """
    c = diffusion()
    c.model = _video_model("Latte-XL/2@UCF101")
    c.process = gaussian()
    c.sampler = {**default_sampler("ddpm"), "num_steps": 250}
    c = _clips(c, LATTE_CODEC, _clip_transform(16, 256, 256, fps=25 / 3), "ucf101", cached)
    c.num_steps, c.batch_size = 1_000_000, 40
    c.optimizer.clip_norm = 0.1
    return c


def walt(name: str, cached: bool = False) -> ml_collections.ConfigDict:
    """W.A.L.T's networks for UCF-101 and Kinetics-600 (Gupta et al. 2023), in the latents of a causal autoencoder.

    Velocity, linear betas with a terminal SNR of zero, self-conditioning in 9 of 10 steps, DDIM with 50 steps. Of Kinetics-600
    the first two latents, 5 frames, are given. Set `codec.path` to the run of the autoencoder.

    Args:
        name: "WALT-L@UCF101", "WALT-XL@UCF101" or "WALT-L@K600".
        cached: train from a latent cache, and set `data.path` to it.

    Raises:
        UserError: no such network.
    """
    trained = {"WALT-L@UCF101": ("ucf101", 256, 60_000), "WALT-XL@UCF101": ("ucf101", 256, 60_000)}
    trained |= {"WALT-L@K600": ("kinetics600", 512, 275_000)}  # 360 epochs of 392,000 clips
    if name not in trained:
        raise UserError(f"{name} is not a network of W.A.L.T for one data set; choose one of {', '.join(trained)}")
    dataset, batch_size, steps = trained[name]
    c = _walt(name, steps, batch_size)
    c = _clips(c, WALT_CODEC, _clip_transform(17, 128, 128), "ucf101" if dataset == "ucf101" else "", cached)
    c.optimizer.learning_rate = 5e-4
    decay_to_the_end(c)
    if dataset == "ucf101":
        c.guidance.update({"scale": 4.0, "schedule": "power_cosine"})
    else:
        c.task.cond_dropout, c.task.masks = 0.0, ("first_2=1",)
        c.conditioner = {"name": "none"}
    return c


T2V = {  # of W.A.L.T's three stages: the network, steps, learning rate, (height, width) in pixels
    "base": ("WALT-base@T2V", 550_000, 2e-4, (128, 224)),
    "sr1": ("WALT-SR1@T2V", 675_000, 5e-4, (256, 448)),
    "sr2": ("WALT-SR2@T2V", 275_000, 5e-4, (512, 896)),
}


def walt_t2v(stage: str = "base", cached: bool = False) -> ml_collections.ConfigDict:
    """One of W.A.L.T's three stages from text to 17 frames of 512 x 896 (Gupta et al. 2023, section 5.3): T5 v1.1 XL, Adafactor.

    Set `data.path` to captioned clips in tars, `conditioner.weights` to the text encoder and `codec.path` to the autoencoder's
    run. The base model is told a first latent frame in a tenth of the examples, so that it also animates images. The paper's
    table has a base of 128 x 128 pixels, which its upsamplers cannot start from; here it has their shape.

    Args:
        stage: "base", "sr1" (2 x) or "sr2" (2 x after it).
        cached: train the base from a latent cache, and set `data.path` to it. Upsamplers need the clips.

    Raises:
        UserError: no such stage; a cache for an upsampler.
    """
    if stage not in T2V:
        raise UserError(f"stage {stage!r} does not exist; choose one of {', '.join(T2V)}")
    if cached and stage != "base":
        raise UserError(f"stage {stage} makes its lower resolution from clips, which a latent cache does not have; omit cached")
    name, steps, rate, size = T2V[stage]
    c = _walt(name, steps, 512)
    c = _clips(c, WALT_CODEC, _clip_transform(17, *size, fps=8.0), "", cached)
    c = text(c, ("t5_xl",), lengths=(64,), mask=True, pooled=False)
    c.preview.prompts = PROMPTS
    c.optimizer = {"name": "adafactor", **ADAFACTOR, "learning_rate": rate}
    decay_to_the_end(c)
    c.guidance.update({"scale": 8.0, "schedule": "power_cosine"})
    if stage == "base":
        c.task.masks = ("none=0.9", "first=0.1")
    else:
        c.task.low_resolution = {"sides": 2, "frames": 1, "most_noise": 0.3, "noise": 0.1}
        c.preview.every_steps = 0
    return c


def video_mmdit(cached: bool = False) -> ml_collections.ConfigDict:
    """One MM-DiT for text, images and clips, of Stable Diffusion 3.5 medium's depth and width, as a flow in Wan's latents.

    Of a batch's clips of 17 frames and 256 x 448 pixels some parts are given (`MASKS`), so that the network also animates,
    extends and connects. One step in four is on images of about as many tokens. Set `data.path` to captioned clips in tars,
    `conditioner.weights` to T5 v1.1 XXL and `codec.path` to the weights of Wan's autoencoder.

    Args:
        cached: train from latent caches, one for each bucket, and set `data.path` to them.
    """
    c = diffusion()
    fields = {"patch_size": 2, "depth": 24, "width": 1536, "heads": 24, "qk_norm": True, "position": "rope"}
    fields |= {"pooled_width": 0, "known_frames": True}
    c.model = {"name": "mmdit", **registry.defaults("model", "mmdit"), **fields, "dtype": "bfloat16"}
    c.process = flow() | {"time_distribution": "logit_normal", "shift": 3.0}
    c = _clips(c, {}, _clip_transform(17, 256, 448, fps=8.0), "", cached)
    c = text(c, ("t5_xxl",), lengths=(256,), pooled=False)
    c.preview.prompts = PROMPTS
    c.buckets = {"classes": ((17, 256, 448, 256, 3), (1, 512, 896, 320, 1))}
    c.task.masks = MASKS
    c.num_steps, c.batch_size = 500_000, 256
    c.optimizer.clip_norm = 1.0
    c.sampler = default_sampler("euler") | {"num_steps": 50}
    c.guidance.scale = 6.0
    return c


def _walt(name: str, steps: int, batch_size: int) -> ml_collections.ConfigDict:
    """The network, process and sampler of W.A.L.T."""
    c = diffusion()
    c.model = _video_model(name)
    c.process = gaussian() | {"prediction": "v", "variance": "fixed_small", "zero_terminal_snr": True}
    c.sampler = {**default_sampler("ddim"), "num_steps": 50}
    c.task.self_conditioning = 0.9
    c.num_steps, c.batch_size = steps, batch_size
    return c


# The recipes of published networks (`models.published`), by name: weights of these sizes are converted with these configs.
PUBLISHED: dict[str, Callable[[], ml_collections.ConfigDict]] = {
    **{f"HDiT-{size}@256": partial(hdit, size) for size in "SML"},
    **{f"ADM@{resolution}": partial(adm, resolution) for resolution in ADM_TRAINING},
    "LDM-4@256": ldm4,
    "DiffiT@256": partial(diffit, 256),
    "DiffiT@512": partial(diffit, 512),
    **{name: partial(sd3, name) for name in mmdit.PUBLISHED},
    "PixArt-alpha@256": partial(pixart, 256),
    "PixArt-alpha@512": partial(pixart, 512),
    "PixArt-Sigma@1024": partial(pixart, 1024),
}
