"""Converts weights between the paper's .pt, SiT's .pt, diffusers' folders, our runs and our weights files.

    python -m dit_jax.convert --from=official --weights=DiT-XL-2-256x256.pt --out=dit.safetensors
    python -m dit_jax.convert --download=dit-xl2-256 --out=dit.safetensors
    python -m dit_jax.convert --download=sd-vae-ft-mse
    python -m dit_jax.convert --from=workdir --weights=runs/b4 --to=official --out=b4.pt
    python -m dit_jax.convert --from=workdir --weights=runs/lora --to=peft --out=adapter
    python -m dit_jax.convert --from=official --weights=DiT-XL-2-256x256.pt --lora=adapter --out=merged.safetensors
    python -m dit_jax.convert --from=official --weights=sd3_medium_incl_clips.safetensors --out=sd3.safetensors
    python -m dit_jax.convert --from=official --weights=sd3_medium_incl_clips.safetensors --part=vae --out=sd3_vae
    python -m dit_jax.convert --from=diffusers --weights=runs/vae --inflate=0,1,1 --out=causal_vae
    python -m dit_jax.convert --from=lpips --weights=lpips_vgg.pt --out=lpips.safetensors
    python -m dit_jax.convert --download=inception --out=inception.safetensors
    python -m dit_jax.convert --from=inception_tf --weights=classify_image_graph_def.pb --out=inception.safetensors
    python -m dit_jax.convert --from=dinov2 --weights=dinov2_vitl14_pretrain.pth --out=dinov2.safetensors
    python -m dit_jax.convert --from=i3d --weights=i3d_pretrained_400.pt --out=i3d.safetensors

Then: python -m dit_jax.sample --weights=dit.safetensors --labels=207,360 --guidance_scale=4

sd-vae-ft-mse is the autoencoder of DiT and SiT. It is used as it is and kept in ~/.cache/dit_jax/weights, where
--codec_path=sd-vae-ft-mse and --config.codec.path=sd-vae-ft-mse find it; the configs of ImageNet name it.

To write lpips_vgg.pt, the perceptual loss of autoencoders, use PyTorch and `pip install lpips`:
    import lpips, torch
    torch.save(lpips.LPIPS(net="vgg").state_dict(), "lpips_vgg.pt")

The networks of the metrics are Inception-v3 of 2015, as published by pytorch-fid and torch-fidelity or as the frozen TensorFlow
graph in http://download.tensorflow.org/models/image/imagenet/inception-2015-12-05.tgz, and DINOv2, as its .pth or as saved by
transformers.
"""

import jax
from absl import flags

from dit_jax.errors import UserError
from dit_jax.runtime import command_line, console
from dit_jax.storage.paths import local_path

command_line.group("Input and output")
FROM = flags.DEFINE_string(
    "from",
    None,
    "Layout of --weights: official, sit, diffusers, workdir (the moving average of a run), dit_jax, lpips, inception,"
    " inception_tf, dinov2 or i3d. --download sets it.",
)
TO = flags.DEFINE_string(
    "to",
    "dit_jax",
    "Layout of --out: dit_jax (a .safetensors file), official (a .pt or .safetensors file), diffusers (a folder), or peft (a "
    "folder with the adapter of a run).",
)
WEIGHTS = flags.DEFINE_string(
    "weights", None, "File or folder to convert. With --download, the path that is downloaded to: a file; of a VAE, a folder."
)
OUT = flags.DEFINE_string("out", None, "Output file or folder. Optional with --download.")
DOWNLOAD = flags.DEFINE_string(
    "download",
    None,
    "Download these weights first: dit-xl2-256, dit-xl2-512, sit-xl2-256, sd-vae-ft-mse, inception or dinov2-vitl14.",
)
LORA = flags.DEFINE_string("lora", None, "Folder of an adapter in PEFT's layout, which is merged into the weights.")
NAMES = flags.DEFINE_string(
    "names",
    None,
    "Names of the modules of --to=peft: official (DiT's code), diffusers (DiTTransformer2DModel), or dit_jax (our own paths). "
    "Default: official for DiT with adaLN-Zero, dit_jax for other networks.",
)
PART = flags.DEFINE_string(
    "part",
    None,
    "Of a file with a whole Stable Diffusion 3, write the autoencoder (vae) or a text encoder (clip_l, clip_g, t5xxl) to the "
    "folder --out, for codec.path and conditioner.weights. Default: the transformer.",
)
INFLATE = flags.DEFINE_string(
    "inflate",
    None,
    "Write a causal autoencoder of clips, with the same numbers on single frames, from an autoencoder of images (a folder of "
    "diffusers' AutoencoderKL, or the --workdir of a run). For each downsampling, finest first: 1 if it halves the frames too.",
)
command_line.group("What the weights do not say")
LIKE = flags.DEFINE_string(
    "like",
    None,
    "A run's folder or a .safetensors file of dit_jax.convert whose config these weights get. Default: the process, "
    "VAE and sampler of the paper.",
)
KEY = flags.DEFINE_string(
    "key",
    None,
    "Place of the weights in a PyTorch checkpoint, as in ema or state.model. Default: ema, model_ema, model or state_dict, "
    "whichever there is first.",
)
NUM_CLASSES = flags.DEFINE_integer(
    "num_classes",
    None,
    "Number of classes of --from=official and sit. Needed if the label table has as many rows as a usual data set has classes: "
    "its last row may be that of the null label.",
)
HEADS = flags.DEFINE_integer(
    "heads", None, "Number of attention heads. Needed where neither the layout nor the paper's table of models gives it."
)
STEP = flags.DEFINE_integer("step", None, "Checkpoint of --from=workdir. Default: the newest intact one.")
AVERAGE = flags.DEFINE_string(
    "average",
    None,
    "Weights of --from=workdir: none for the weights themselves, or an average, as in 0.9995 or power:0.075. Default: the moving "
    "average of ema_decay.",
)


ADVICE = {"like", "key", "num_classes", "heads", "step", "average"}
USES = {
    "the download of an autoencoder, which is used as it is": {"download", "weights"},
    "--download without --out": {"download", "weights", "from"},
    "a conversion": {"download", "weights", "from", "to", "out", "lora", *ADVICE},
    "--part": {"weights", "from", "part", "out", "key"},
    "--inflate": {"weights", "from", "inflate", "out"},
    "--to=peft": {"weights", "from", "to", "out", "names", "step"},
}


def check_flags() -> None:
    """Raises a UserError for a flag that is missing or without effect, before anything is downloaded or read."""
    from dit_jax.convert import formats, model_parts
    from dit_jax.interop import peft
    from dit_jax.interop.download import PUBLISHED

    layout = FROM.value
    if DOWNLOAD.value is not None:
        if DOWNLOAD.value not in PUBLISHED:
            raise UserError(f"--download={DOWNLOAD.value}: one of {', '.join(PUBLISHED)} is needed")
        published = PUBLISHED[DOWNLOAD.value].layout
        if published == "vae":
            return command_line.check_uses(USES, "the download of an autoencoder, which is used as it is")
        if layout not in (None, published):
            raise UserError(f"--from={layout}: {DOWNLOAD.value} has the layout {published}; leave out --from")
        layout = published
        if OUT.value is None:
            return command_line.check_uses(USES, "--download without --out")
    elif layout is None or WEIGHTS.value is None or OUT.value is None:
        raise UserError("give --from, --weights and --out, or --download")
    if TO.value not in formats.TARGETS:
        raise UserError(f"--to={TO.value}: one of {', '.join(formats.TARGETS)} is needed")
    if layout == TO.value:
        raise UserError(f"--from={layout} --to={TO.value}: nothing would change; copy the file")
    if NAMES.value not in (None, *peft.LAYOUTS):
        raise UserError(f"--names={NAMES.value}: one of {', '.join(peft.LAYOUTS)} is needed")
    if INFLATE.value is not None:
        command_line.check_uses(USES, "--inflate")
        if layout != "diffusers":
            raise UserError(f"--inflate takes an autoencoder in the format of diffusers: give --from=diffusers, not {layout}")
        if set(INFLATE.value.split(",")) - {"0", "1"}:
            raise UserError(f"--inflate={INFLATE.value}: give 0 or 1 for each downsampling, as in 0,1,1")
        return None
    if PART.value is not None:
        command_line.check_uses(USES, "--part")
        if PART.value not in model_parts.PARTS:
            raise UserError(f"--part={PART.value}: one of {', '.join(model_parts.PARTS)} is needed")
        if layout != "official":
            raise UserError(f"--part takes a part of one of Stability's files: give --from=official, not {layout}")
    elif TO.value == "peft":
        command_line.check_uses(USES, "--to=peft")
        if layout != "workdir":
            raise UserError(f"--to=peft writes the adapter of a run: give --from=workdir, not {layout}")
    else:
        command_line.check_uses(USES, "a conversion")
    source(layout, WEIGHTS.value or "")


def source(layout: str, path: str):
    """The weights to convert. Raises a UserError for a flag that their layout does not use."""
    from dit_jax.convert import formats

    like = local_path(LIKE.value) if LIKE.value is not None else None
    return formats.Source(layout, local_path(path), HEADS.value, like, STEP.value, KEY.value, NUM_CLASSES.value, AVERAGE.value)


def download_vae(name: str) -> dict:
    """Downloads a published autoencoder, which needs no conversion; returns its folder and the SHA-256 of its weights."""
    from dit_jax.interop import vae

    folder = vae.published_folder(name) if WEIGHTS.value is None else local_path(WEIGHTS.value)
    sha256 = vae.fetch_published(name, folder)
    return {"downloaded": {"path": str(folder), "sha256": sha256}}


def main() -> dict:
    from dit_jax.convert import formats, model_parts
    from dit_jax.interop.download import PUBLISHED, byte_progress, download

    check_flags()
    layout, path, result = FROM.value, WEIGHTS.value, {}
    if DOWNLOAD.value is not None:
        published = PUBLISHED[DOWNLOAD.value]
        if published.layout == "vae":
            return download_vae(DOWNLOAD.value)
        layout, path = published.layout, path or published.file_name
        console.say(f"{DOWNLOAD.value}: {published.url} -> {path}")
        sha256 = download(published, local_path(path), byte_progress(DOWNLOAD.value))
        result["downloaded"] = {"path": path, "sha256": sha256}
        if OUT.value is None:
            return result
    assert layout is not None and path is not None and OUT.value is not None  # see `check_flags`
    out = local_path(OUT.value)
    if INFLATE.value is not None:
        return model_parts.inflate(path, [part == "1" for part in INFLATE.value.split(",")], out)
    if PART.value is not None:
        return model_parts.write(source(layout, path), PART.value, out)
    if TO.value == "peft":
        return formats.write_adapter(source(layout, path), out, NAMES.value)
    weights = formats.read(source(layout, path))
    if LORA.value is not None:
        weights = formats.with_adapter(weights, LORA.value)
    written = formats.write(weights, TO.value, out)
    console.say(f"{written['parameters']:,} parameters of {path} written to {out}")
    return result | written | {"origin": weights.origin}


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing is computed, and an accelerator may be in use
    console.run(main)
