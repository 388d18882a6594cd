"""T5 and CLIP text encoders against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dit_files import held
from flax.traverse_util import unflatten_dict

from dit_jax.encoders.clip_text import CLIPText
from dit_jax.encoders.t5 import T5Encoder
from dit_jax.interop import clip_text, t5

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def randomized(module, std=0.3):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)
    return module.eval(), {name: held(x.detach().numpy()) for name, x in module.state_dict().items()}


def tree(tensors):
    return unflatten_dict({path: jnp.asarray(x.load()) for path, x in tensors.items()}, sep="/")


def close(ours, theirs, tolerance):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("masked", [False, True])
def test_t5(masked):
    """Catches a scale of the scores, a bucket of a far position, the exact GELU, and padding that is attended to or not."""
    config = transformers.T5Config(
        d_model=48, d_kv=64, num_layers=3, num_heads=2, d_ff=40, vocab_size=50, feed_forward_proj="gated-gelu", dropout_rate=0.0
    )
    module, tensors = randomized(transformers.T5EncoderModel(config))
    net, ours = t5.to_ours(tensors, "the module")
    assert net == T5Encoder(3, 48, 2, 40, 50)
    ids = np.random.default_rng(0).integers(0, 50, (2, 150))
    mask = np.arange(150) < np.array([[150], [90]])
    theirs = module(torch.tensor(ids), attention_mask=torch.tensor(mask) if masked else torch.ones(2, 150)).last_hidden_state
    output = net.apply({"params": tree(ours)}, jnp.asarray(ids), jnp.asarray(mask) if masked else None)
    close(output, theirs, 1e-5)
    half = net.clone(dtype=jnp.bfloat16).apply({"params": tree(ours)}, jnp.asarray(ids), jnp.asarray(mask) if masked else None)
    assert half.dtype == jnp.bfloat16
    close(half, theirs, 0.1)
    back = t5.to_theirs(ours)
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor.load(), tensors[name].load())


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip(activation):
    """Catches a norm that is left out or added, attention to later tokens, and another end of the text than the first."""
    config = transformers.CLIPTextConfig(
        vocab_size=60, hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, projection_dim=24,
        max_position_embeddings=20, hidden_act=activation, eos_token_id=59, bos_token_id=58, attn_implementation="eager",
    )  # fmt: skip
    module, tensors = randomized(transformers.CLIPTextModelWithProjection(config))
    net, ours = clip_text.to_ours(tensors, "the module", CLIPText(3, 32, 4, 24, activation, 60, 20, 59))
    ids = np.random.default_rng(1).integers(0, 58, (3, 17))
    ids[:, 0], ids[0, 9:], ids[1, 16], ids[2, 4:] = 58, 59, 59, 59
    theirs = module(torch.tensor(ids), output_hidden_states=True)
    output = net.apply({"params": tree(ours)}, jnp.asarray(ids))
    close(output.last, theirs.last_hidden_state, 1e-5)
    close(output.penultimate, theirs.hidden_states[-2], 1e-5)
    close(output.projected, theirs.text_embeds, 1e-5)
    for name, tensor in clip_text.to_theirs(ours).items():
        theirs = tensors.get(name, tensors.get(name.removeprefix("text_model.")))
        np.testing.assert_array_equal(tensor.load(), theirs.load())


SIZES = {
    "t5": {"small": 35_332_800, "base": 109_628_544, "large": 341_231_104, "xl": 1_223_527_424, "xxl": 4_762_310_656},
    "clip": {"B/32": 63_428_096, "L/14": 123_650_304, "H/14": 354_032_640, "bigG/14": 694_659_840},
}


@pytest.mark.parametrize("kind, size", [(kind, size) for kind, sizes in SIZES.items() for size in sizes])
def test_published_sizes(kind, size):
    """Catches a width, a bias or a table of a published encoder."""
    net = {"t5": T5Encoder, "clip": CLIPText}[kind].of(size)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == SIZES[kind][size]
