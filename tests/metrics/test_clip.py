"""CLIP's vision tower, its preprocessing and CLIPScore; transformers is the oracle where it is installed."""

import json

import jax
import jax.numpy as jnp
import metric_networks
import numpy as np
import pytest
import tiny
from PIL import Image

from dit_jax.errors import UserError
from dit_jax.evaluate import extractors, scores
from dit_jax.interop import clip_vision
from dit_jax.metrics.clip import VisionTransformer, clip_scores, preprocessed

SIZES = {"B/32": ((12, 768, 12, 3072, 512, 224, 32), 87_849_216), "L/14": ((24, 1024, 16, 4096, 768, 224, 14), 303_966_208)}


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    """Catches a bias, norm or position too many, of which the published weights know nothing."""
    fields, count = SIZES[size]
    shapes = clip_vision.shapes_of(VisionTransformer(*fields, "quick_gelu"))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count


@pytest.mark.parametrize("height, width", [(20, 33), (61, 40), (50, 47)])
def test_preprocessing_is_pillows(height, width):
    """Catches a resize of both sides, another kernel, or a crop that is not central."""
    images = metric_networks.photographs(height, width)
    size = 40
    shorter = min(height, width)
    new = (size * width // shorter, size * height // shorter)
    pictures = [np.asarray(Image.fromarray(x).resize(new, Image.Resampling.BICUBIC)) for x in images]
    left, top = ((side - size) // 2 for side in new)
    wanted = np.stack(pictures)[:, top : top + size, left : left + size] / 255
    wanted = (wanted - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    np.testing.assert_allclose(preprocessed(jnp.asarray(images), size), wanted, atol=1e-5)


def test_formulas():
    """Catches a maximum of the mean instead of the mean of maxima, embeddings that are not normalised, and a wrong factor."""
    images, texts = np.array([[3.0, 0.0], [0.0, 2.0]], np.float32), np.array([[1.0, 0.0], [0.0, -5.0]], np.float32)
    assert clip_scores(images, texts) == {"clip_score": 1.25, "clip_score_100": 50.0, "clip_cosine_100": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(folder of a random CLIP as transformers writes it, the module)."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    path = tmp_path_factory.mktemp("clip")
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": len(words),
    }
    text |= {"max_position_embeddings": 12, "eos_token_id": len(words) - 1, "hidden_act": "gelu"}
    vision = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 80}
    vision |= {"image_size": 40, "patch_size": 8, "hidden_act": "quick_gelu"}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    model = transformers.CLIPModel(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    return path, model


def test_embeddings_equal_transformers(folder):
    """Catches the norm before the blocks, the class token's place, the order of pixels in a patch, and a tower's activation that
    is taken from the other's; a bfloat16 case within its rounding."""
    import torch

    path, model = folder
    extractor, params = clip_vision.load(path / "model.safetensors")
    x = np.random.default_rng(0).normal(size=(3, 40, 40, 3)).astype(np.float32)
    with torch.no_grad():
        out = model.vision_model(pixel_values=torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
        wanted = model.visual_projection(out.pooler_output).numpy()
    apply = jax.jit(lambda params, x: extractor.network.apply({"params": params}, x))
    assert tiny.distance(apply(params["vision"], x), wanted) < 1e-5
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(np.float32), params["vision"])
    assert 1e-5 < tiny.distance(apply(half, x), wanted) < 0.05
    ids = np.array([[52, 0, 27, 53, 53, 53], [52, 1, 2, 3, 28, 53]])
    with torch.no_grad():
        out = model.text_model(input_ids=torch.from_numpy(ids))
        wanted = model.text_projection(out.pooler_output).numpy()
    embed = extractor.text.encoder.apply({"params": params["text"]}, ids)
    assert tiny.distance(embed.projected, wanted) < 1e-5


def test_captions_of_a_file_are_scored(folder, tmp_path):
    """Catches captions that meet another image, a score without its network and formula, and a file without captions that is
    scored with empty ones."""
    path, _ = folder
    weights, rng = str(path / "model.safetensors"), np.random.default_rng(0)
    images, captions = (
        rng.integers(0, 256, (5, 50, 44, 3), np.uint8),
        np.array(["a cat", "two", "b", "a dog on a very long road", "c"]),
    )
    np.savez(tmp_path / "x.npz", arr_0=images, captions=captions)
    result = scores.evaluate(str(tmp_path / "x.npz"), None, "clip", weights)
    loaded = extractors.load("clip", weights)
    features = np.asarray(loaded.extractor(loaded.params, images)["features"])
    texts, _ = loaded.extractor.text(loaded.params, captions[::-1].tolist())
    wanted = clip_scores(features, texts[::-1])
    assert {name: result[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    assert result["clip_formulas"]["clip_score"] == "2.5 max(cos, 0)" and "patch 8" in result["extractor"]["network"]
    assert any("1 of 5 captions are longer than CLIP's 12 tokens" in remark for remark in result["remarks"])
    np.savez(tmp_path / "y.npz", arr_0=images)
    with pytest.raises(UserError, match="metric clip_score: the samples have no captions"):
        scores.evaluate(str(tmp_path / "y.npz"), None, "clip", weights, scores.Options(("clip_score",)))
    np.savez(tmp_path / "z.npz", arr_0=images, captions=captions[:3])
    with pytest.raises(UserError, match="3 captions for 5 images"):
        scores.evaluate(str(tmp_path / "z.npz"), None, "clip", weights)
