"""Reads CLIP, both towers, from a folder of Hugging Face: model.safetensors, config.json, vocab.json and merges.txt."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dit_jax.encoders.clip_text import CLIPText
from dit_jax.encoders.tokens import CLIPTokens
from dit_jax.errors import UserError
from dit_jax.interop import clip_text
from dit_jax.interop.block_stacks import Link, mapped, their_shapes, to_ours
from dit_jax.interop.tensors import Tensor, Tensors, check, finite, open_safetensors
from dit_jax.metrics.clip import ACTIVATIONS, CLIP, VisionTransformer
from dit_jax.storage.bounded import read_json
from dit_jax.storage.paths import local_path

PREFIX, PROJECTION = "vision_model.", "visual_projection.weight"
PATCH = "vision_model.embeddings.patch_embedding.weight"
BUFFERS = ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids", "logit_scale")
TEXTS = 256  # in a call of the text encoder
_LAYER = "vision_model.encoder.layers.{}."
# Of transformers' CLIPVisionConfig and CLIPTextConfig, whose files leave out what is equal: B/32.
VISION_DEFAULTS: dict[str, Any] = {
    "num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "image_size": 224,
    "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3,
}  # fmt: skip
TEXT_DEFAULTS: dict[str, Any] = {
    "num_hidden_layers": 12, "hidden_size": 512, "num_attention_heads": 8, "vocab_size": 49408,
    "max_position_embeddings": 77, "hidden_act": "quick_gelu",
}  # fmt: skip


def _pair(path: str, names: tuple[str, ...], inputs: int = 0) -> dict[str, Link]:
    """Kernel and bias of a linear layer; scale and bias of a norm without inputs."""
    first = f"{path}/kernel" if inputs else f"{path}/scale"
    return {
        first: Link(tuple(f"{name}.weight" for name in names), inputs),
        f"{path}/bias": Link(tuple(f"{name}.bias" for name in names)),
    }


LINKS = {
    "patch_embedding/kernel": Link((PATCH,), 1),
    "class_embedding": Link(("vision_model.embeddings.class_embedding",)),
    "position_embedding": Link(("vision_model.embeddings.position_embedding.weight",)),
    **_pair("norm_in", ("vision_model.pre_layrnorm",)),
    **_pair("blocks/norm_attention", (_LAYER + "layer_norm1",)),
    **_pair("blocks/qkv", tuple(f"{_LAYER}self_attn.{x}_proj" for x in "qkv"), 1),
    **_pair("blocks/out", (_LAYER + "self_attn.out_proj",), 2),
    **_pair("blocks/norm_mlp", (_LAYER + "layer_norm2",)),
    **_pair("blocks/mlp_in", (_LAYER + "mlp.fc1",), 1),
    **_pair("blocks/mlp_out", (_LAYER + "mlp.fc2",), 1),
    **_pair("norm_out", ("vision_model.post_layernorm",)),
    "projection/kernel": Link((PROJECTION,), 1),
}


def shapes_of(net: VisionTransformer) -> dict[str, tuple[int, ...]]:
    """The shapes of our parameters by path."""
    x = jnp.zeros((1, net.image_size, net.image_size, 3))
    params = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}


def network_of(config: Mapping[str, Any], projection_width: int, what: str) -> VisionTransformer:
    """The network that a `vision_config` describes.

    Raises:
        UserError: an activation or norm that CLIP does not have.
    """
    fields = VISION_DEFAULTS | dict(config)
    _check_activation(fields, what)
    if fields["layer_norm_eps"] != 1e-5 or fields["num_channels"] != 3:
        found = f"layer_norm_eps {fields['layer_norm_eps']} and {fields['num_channels']} channels"
        raise UserError(f"{what} has {found}; CLIP with 1e-5 and 3 is read")
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    depth, width, heads, hidden = (fields[name] for name in sizes)
    return VisionTransformer(
        depth, width, heads, hidden, projection_width, fields["image_size"], fields["patch_size"], fields["hidden_act"]
    )


def _check_activation(fields: Mapping[str, Any], what: str) -> None:
    if fields["hidden_act"] not in ACTIVATIONS:
        raise UserError(f"{what} has hidden_act {fields['hidden_act']!r}; CLIP with one of {', '.join(ACTIVATIONS)} is read")


def from_tensors(tensors: Tensors, net: VisionTransformer, what: str) -> dict[str, Tensor]:
    """Our parameters by path, read lazily, of the vision tower's tensors with Hugging Face's names.

    Raises:
        UserError: tensors are missing, misshapen or further ones.
    """
    shapes = shapes_of(net)
    expected = their_shapes(LINKS, shapes)
    p = net.patch_size
    check(tensors, expected | {PATCH: (net.width, 3, p, p)}, what)
    flat = (net.width, p * p * 3)
    patch = mapped(tensors[PATCH], lambda x: x.transpose(0, 2, 3, 1).reshape(flat), flat)
    return to_ours(LINKS, shapes, {**tensors, PATCH: patch})


def load(path: str | os.PathLike) -> tuple[CLIP, dict[str, Any]]:
    """(the extractor, {"vision", "text"}: float32 parameters) of a folder of Hugging Face's `CLIPModel`.

    Args:
        path: model.safetensors, beside which the other files of the folder are.

    Raises:
        UserError: a file is missing; the weights are not CLIP's, do not fit config.json, or hold NaN.
    """
    file = local_path(path)
    config = read_json(_beside(file, "config.json"), "download the folder again")
    tensors = finite(open_safetensors(file)[0], str(file))
    tensors = {name: tensor for name, tensor in tensors.items() if name not in BUFFERS}
    if not (PATCH in tensors and PROJECTION in tensors and clip_text.PROJECTION in tensors):
        raise UserError(f"{file} is not CLIP with both towers: give model.safetensors of Hugging Face's CLIPModel")
    net = network_of(config.get("vision_config", {}), tensors[PROJECTION].shape[0], f"vision_config of {file.parent}")
    own = (PREFIX, PROJECTION)
    vision = from_tensors({name: x for name, x in tensors.items() if name.startswith(own)}, net, str(file))
    encoder = _text_network(config.get("text_config", {}), tensors, f"text_config of {file.parent}")
    rest = {name: x for name, x in tensors.items() if not name.startswith(own)}
    _, text = clip_text.to_ours(rest, str(file), encoder)
    tokens = CLIPTokens(str(file.parent), encoder.max_tokens, encoder.end)
    return CLIP(net, Texts(encoder, tokens)), {"vision": _arrays(vision), "text": _arrays(text)}


def _text_network(config: Mapping[str, Any], tensors: Tensors, what: str) -> CLIPText:
    fields = TEXT_DEFAULTS | dict(config)
    _check_activation(fields, what)
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    depth, width, heads = (fields[name] for name in sizes)
    projection = tensors[clip_text.PROJECTION].shape[0]
    vocabulary, tokens = fields["vocab_size"], fields["max_position_embeddings"]
    end = (
        vocabulary - 1
    )  # in all of CLIP's; older files have another number in eos_token_id, which transformers leaves unread too
    return CLIPText(depth, width, heads, projection, fields["hidden_act"], vocabulary, tokens, end)


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return unflatten_dict({path: np.asarray(x.load(), np.float32) for path, x in tensors.items()}, sep="/")


def _beside(file: Path, name: str) -> Path:
    path = file.parent / name
    if not path.is_file():
        raise UserError(f"{file.parent} has no {name}; give model.safetensors in the whole folder of Hugging Face's CLIPModel")
    return path


class Texts:
    """Embeds captions: (params, texts) -> (float32 [N, P], number of texts that were cut)."""

    def __init__(self, encoder: CLIPText, tokens: CLIPTokens):
        self.encoder, self.tokens, self.length = encoder, tokens, tokens.length

    def __call__(self, params: Any, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        tokens = self.tokens(texts)

        @jax.jit
        def embed(params: Any, ids: jax.Array) -> jax.Array:
            outputs: Any = self.encoder.apply({"params": params}, ids)
            projected: jax.Array = outputs.projected
            return projected

        found = []
        with jax.default_matmul_precision("highest"):
            for start in range(0, len(tokens.ids), TEXTS):
                ids = tokens.ids[start : start + TEXTS]
                padded = np.pad(ids, ((0, min(TEXTS, len(tokens.ids)) - len(ids)), (0, 0)), mode="edge")
                found.append(np.asarray(embed(params["text"], padded))[: len(ids)])
        return np.concatenate(found), len(tokens.lost)
