"""One of Stability's files with all parts, converted: samples from prompts, beside diffusers' pipeline of the same parts."""

import jax
import numpy as np
import pytest
import tiny
from dit_files import held
from ldm_names import ldm_names
from tokenizer_files import write_clip, write_t5
from verbs import run_verbs

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


@pytest.fixture(scope="module", autouse=True)
def sizes():
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), size in SIZES.items():
            patch.setitem({"clip_text": clip_text, "t5": t5}[module].SIZES, name, size)
        yield


def config():
    """That of the transformer."""
    c = recipes.sd3()
    c.model = {**registry.defaults("model", "mmdit"), "name": "mmdit", "patch_size": 2, "depth": 2, "width": 128, "heads": 2}
    c.model.update({"context_width": 48, "pooled_width": 40, "table_side": 12, "qk_norm": True})
    c.codec.update(CODEC)
    c.transform.resolution = 8
    c.conditioner.update({"lengths": (12, 12, 9), "dtype": "float32"})
    c.sampler.num_steps = 3
    return c


def parts(folder, missing=()):
    """The options of `load` for the other parts."""
    used = [name for name in ENCODERS if name not in missing]
    return {
        "codec": folder / "vae",
        "text_encoders": [f"{name}={folder / ENCODERS[name]}" for name in used],
        "tokenizers": [f"{name}={folder / 'tokens' / name[:2]}" for name in used],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The single file in `sd3.safetensors`, its parts as `convert --part` writes them, and `ours.safetensors`."""
    folder, rng = tmp_path_factory.mktemp("sd3"), np.random.default_rng(5)

    def random(shapes, size=0.3):
        return {name: held((size * rng.standard_normal(shape)).astype(np.float32)) for name, shape in shapes.items()}

    transformer = random(shapes_of(weights.sections_of(config().to_dict())), 0.1)
    sections = weights.sections_of(config().to_dict())
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
    write_clip(folder / "tokens" / "cl", TEXTS)
    write_t5(folder / "tokens" / "t5", TEXTS)
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
    tokens = [transformers.CLIPTokenizer.from_pretrained(folder / "tokens" / "cl", model_max_length=12) for _ in range(2)]
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
        tokenizer_3=transformers.T5TokenizerFast.from_pretrained(folder / "tokens" / "t5") if with_t5 else None,
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
@pytest.mark.parametrize("missing", [(), ("t5_xxl",)])
def test_prompts_equal_diffusers(folder, missing, capsys):
    """Catches a tokenizer with other padding, a pooled text of another layer, encoders in another order, a shift that is lost,
    and a missing T5 that leaves its tokens out."""
    pipe = dit_jax.load(folder / "ours.safetensors", **parts(folder, missing))
    assert ("names no weights of t5_xxl, which contributes zeros" in capsys.readouterr().err) == bool(missing)
    samples = pipe(prompt=TEXTS[:2], negative_prompt=TEXTS[2], seed=4)
    noise = pipe.run.task.initial_noise(image_keys(4, np.arange(2)))
    expected = 255 * theirs(folder, np.asarray(noise), not missing)
    assert samples.images.std() > 20 and samples.images.shape == (2, 8, 8, 3)
    assert np.abs(samples.images - expected).max() < 1
    if not missing:
        other = pipe(prompt=TEXTS[:2], seed=4).images
        assert np.abs(other.astype(float) - expected).max() > 5


@pytest.mark.slow
def test_the_verb_draws_from_prompts(folder, tmp_path):
    """Catches flags that the library has and the verb loses: the parts, a prompt, a negative prompt, a missing T5."""
    (tmp_path / "sizes.py").write_text(SETS_SIZES)
    verb = ["sample", "--import=sizes.py", f"--weights={folder / 'ours.safetensors'}", "--prompt=" + TEXTS[0]]
    calls = []
    for missing, out in (((), "a.npz"), (("t5_xxl",), "b.npz")):
        own = parts(folder, missing)
        flags = [f"--codec_path={own['codec']}", *(f"--{name}={','.join(own[name])}" for name in ("text_encoders", "tokenizers"))]
        calls.append([*verb, *flags, f"--negative_prompt={TEXTS[2]}", "--num_samples=1", "--seed=4", f"--out={out}"])
    for status, _, stderr in run_verbs(tmp_path, calls):
        assert status == 0, stderr
    images = []
    for out in ("a.npz", "b.npz"):
        with np.load(tmp_path / out) as file:
            assert file["captions"].tolist() == TEXTS[:1] and file["negative_prompts"].tolist() == TEXTS[2:]
            images.append(file["arr_0"])
    assert images[0].shape == (1, 8, 8, 3) and (images[0] != images[1]).any()
