"""One of Stability's files with all parts, converted: samples from prompts, beside diffusers' pipeline of the same parts."""

import jax
import numpy as np
import pytest
import tiny
from dit_files import held
from ldm_names import ldm_names
from tokenizer_files import write_clip, write_t5

import dit_jax
from dit_jax import recipes, registry
from dit_jax.codecs.kl_vae import KLVAE
from dit_jax.convert import formats, model_parts, other_networks
from dit_jax.convert.source import shapes_of
from dit_jax.encoders import clip_text, t5
from dit_jax.interop import clip_text as clip_layout
from dit_jax.interop import t5 as t5_layout
from dit_jax.interop import weights
from dit_jax.interop.tensors import write_safetensors
from dit_jax.sample.generator import image_keys

SIZES = {  # of the encoders that the names of Stable Diffusion 3 stand for here
    ("clip_text", "L/14"): clip_text.Size(2, 16, 2, 16, "quick_gelu"),
    ("clip_text", "bigG/14"): clip_text.Size(2, 24, 2, 24, "gelu"),
    ("t5", "xxl"): t5.Size(2, 48, 2, 32),
}
SETS_SIZES = "from dit_jax.encoders import clip_text, t5\n" + "".join(
    f"{module}.SIZES[{name!r}] = {module}.{size!r}\n" for (module, name), size in SIZES.items()
)
CODEC = {"block_out_channels": (32,), "layers_per_block": 1, "latent_channels": 16, "use_quant_conv": False}
TEXTS = ["a photo of a three", "a handwritten seven, très grand", "blurred"]
ENCODERS = {"clip_l": "clip_l", "clip_g": "clip_g", "t5_xxl": "t5xxl"}  # and the names of the parts
LENGTHS = {"clip_l": 12, "clip_g": 12, "t5_xxl": 9}


@pytest.fixture(scope="module", autouse=True)
def sizes():
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), size in SIZES.items():
            patch.setitem({"clip_text": clip_text, "t5": t5}[module].SIZES, name, size)
        yield


def config(folder, missing=()):
    """That of the transformer, which finds the other parts in the folder."""
    c = recipes.sd3()
    c.model = {**registry.defaults("model", "mmdit"), "name": "mmdit", "patch_size": 2, "depth": 2, "width": 128, "heads": 2}
    c.model.update({"context_width": 48, "pooled_width": 40, "table_side": 12, "qk_norm": True})
    c.codec.update({**CODEC, "path": str(folder / "vae")})
    c.transform.resolution = 8
    used = [name for name in ENCODERS if name not in missing]
    c.conditioner.update({"lengths": tuple(LENGTHS.values()), "dtype": "float32", "missing": missing})
    c.conditioner.weights = tuple(f"{name}={folder / ENCODERS[name]}" for name in used)
    c.conditioner.tokenizers = tuple(f"{name}={folder / 'tokens' / name[:4]}" for name in used)
    c.sampler.num_steps = 3
    return c


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The single file in `sd3.safetensors`, its parts as `convert --part` writes them, and `ours.safetensors`."""
    folder, rng = tmp_path_factory.mktemp("sd3"), np.random.default_rng(5)

    def random(shapes, size=0.3):
        return {name: held((size * rng.standard_normal(shape)).astype(np.float32)) for name, shape in shapes.items()}

    transformer = random(shapes_of(weights.sections_of(config(folder).to_dict())), 0.1)
    sections = weights.sections_of(config(folder).to_dict())
    whole = dict(other_networks.write(formats.Weights(transformer, sections, {}), "official")[0])
    codec = KLVAE(**CODEC)
    vae = tiny.random_params(jax.eval_shape(codec.init, jax.random.key(0)))
    whole |= {f"first_stage_model.{name}": x for name, x in ldm_names(codec, vae, folder).items()}
    for part, size in (("clip_l", "L/14"), ("clip_g", "bigG/14")):
        own = random(clip_layout.shapes_of(clip_text.CLIPText.of(size)))
        if part == "clip_l":  # diffusers takes its pooled text before the projection by making that the identity
            own |= {"projection/kernel": held(np.eye(16, dtype=np.float32))}
        whole |= {model_parts.PARTS[part] + name: x for name, x in clip_layout.to_theirs(own).items()}
    own = t5_layout.to_theirs(random(t5_layout.shapes_of(t5.T5Encoder.of("xxl"))))
    whole |= {model_parts.PARTS["t5xxl"] + name: x for name, x in own.items()}
    write_safetensors(folder / "sd3.safetensors", whole, {"format": "pt"})
    write_clip(folder / "tokens" / "clip", TEXTS)
    write_t5(folder / "tokens" / "t5_x", TEXTS)
    source = formats.Source("official", folder / "sd3.safetensors")
    for part in model_parts.PARTS:
        model_parts.write(source, part, folder / part)
    formats.write(formats.Weights(transformer, sections, {}), "dit_jax", folder / "like.safetensors")
    read = formats.read(formats.Source("official", folder / "sd3.safetensors", like=folder / "like.safetensors"))
    formats.write(read, "dit_jax", folder / "ours.safetensors")
    return folder


def theirs(folder, noise, with_t5):
    """Images f32[N, H, W, 3] in [0, 1] of diffusers' pipeline."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    formats.write(formats.read(formats.Source("dit_jax", folder / "ours.safetensors")), "diffusers", folder / "transformer")
    clip_l, clip_g = (
        transformers.CLIPTextModelWithProjection.from_pretrained(folder / name, eos_token_id=49407)
        for name in ("clip_l", "clip_g")
    )
    tokens = [transformers.CLIPTokenizer.from_pretrained(folder / "tokens" / "clip", model_max_length=12) for _ in range(2)]
    tokens[1].pad_token = tokens[1].convert_ids_to_tokens(0)
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel.from_pretrained(folder / "transformer"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=clip_l,
        tokenizer=tokens[0],
        text_encoder_2=clip_g,
        tokenizer_2=tokens[1],
        text_encoder_3=transformers.T5EncoderModel.from_pretrained(folder / "t5xxl") if with_t5 else None,
        tokenizer_3=transformers.T5TokenizerFast.from_pretrained(folder / "tokens" / "t5_x") if with_t5 else None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt=TEXTS[:2],
        negative_prompt=[TEXTS[2]] * 2,
        latents=torch.tensor(noise.transpose(0, 3, 1, 2).copy()),
        height=8,
        width=8,
        num_inference_steps=3,
        guidance_scale=5.0,
        max_sequence_length=9,
        output_type="np",
    ).images


@pytest.mark.slow
def test_prompts_equal_diffusers(folder):
    """Catches a tokenizer with other padding, a pooled text of another layer, encoders in another order, a shift that is lost."""
    pipe = dit_jax.load(folder / "ours.safetensors", codec=folder / "vae")
    samples = pipe(prompt=TEXTS[:2], negative_prompt=TEXTS[2], seed=4)
    noise = pipe.run.task.initial_noise(image_keys(4, np.arange(2)))
    expected = 255 * theirs(folder, np.asarray(noise), with_t5=True)
    assert samples.images.std() > 20 and samples.images.shape == (2, 8, 8, 3)
    assert np.abs(samples.images - expected).max() < 1
    other = pipe(prompt=TEXTS[:2], seed=4).images
    assert np.abs(other.astype(float) - expected).max() > 5
