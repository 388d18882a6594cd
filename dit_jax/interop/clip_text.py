"""Converts CLIP's text encoder between Hugging Face's layout (`CLIPTextModelWithProjection`) and ours.

Names in files begin with `text_model.`; transformers 5 leaves it out in memory, and both are read. Stable Diffusion's files of
CLIP-L may have no projection: ours is then the identity, as in diffusers' reader of Stable Diffusion 3.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from dit_jax.encoders.clip_text import SIZES, CLIPText
from dit_jax.errors import UserError
from dit_jax.interop.block_stacks import Link, their_shapes
from dit_jax.interop.block_stacks import to_ours as gathered
from dit_jax.interop.block_stacks import to_theirs as separated
from dit_jax.interop.tensors import Tensor, Tensors, check

PREFIX, PROJECTION = "text_model.", "text_projection.weight"
BUFFER = "text_model.embeddings.position_ids"  # 0, 1, 2, ... in older files
_LAYER = "text_model.encoder.layers.{}."


def _pair(path: str, names: tuple[str, ...], inputs: int = 1) -> dict[str, Link]:
    """Kernel and bias of a linear layer."""
    return {
        f"{path}/kernel": Link(tuple(f"{name}.weight" for name in names), inputs),
        f"{path}/bias": Link(tuple(f"{name}.bias" for name in names)),
    }


def _norm(path: str, name: str) -> dict[str, Link]:
    return {f"{path}/scale": Link((f"{name}.weight",)), f"{path}/bias": Link((f"{name}.bias",))}


LINKS = {
    "token_embedding/embedding": Link(("text_model.embeddings.token_embedding.weight",)),
    "position_embedding": Link(("text_model.embeddings.position_embedding.weight",)),
    **_norm("blocks/norm_attention", _LAYER + "layer_norm1"),
    **_pair("blocks/attention/qkv", tuple(f"{_LAYER}self_attn.{x}_proj" for x in "qkv")),
    **_pair("blocks/attention/out", (_LAYER + "self_attn.out_proj",), 2),
    **_norm("blocks/norm_mlp", _LAYER + "layer_norm2"),
    **_pair("blocks/mlp/in", (_LAYER + "mlp.fc1",)),
    **_pair("blocks/mlp/out", (_LAYER + "mlp.fc2",)),
    **_norm("norm_final", "text_model.final_layer_norm"),
    "projection/kernel": Link((PROJECTION,), 1),
}


def network(tensors: Tensors, what: str) -> CLIPText:
    """The encoder of tensors in Hugging Face's layout, with the prefix; heads and activation are those of the published width.

    Raises:
        UserError: they are not a text encoder of CLIP, or of a width that was not published.
    """
    token, position = (LINKS[f"{name}_embedding{end}"].names[0] for name, end in (("token", "/embedding"), ("position", "")))
    if missing := [name for name in (token, position) if name not in tensors or len(tensors[name].shape) != 2]:
        raise UserError(f"{what} is not a text encoder of CLIP: {', '.join(missing)} missing or of another rank")
    (vocabulary, width), (tokens, _) = tensors[token].shape, tensors[position].shape
    depth = 1 + max(int(name.split(".")[3]) for name in tensors if name.startswith("text_model.encoder.layers."))
    size = next((size for size in SIZES.values() if (size.depth, size.width) == (depth, width)), None)
    if size is None:
        known = ", ".join(f"{name} ({size.depth} x {size.width})" for name, size in SIZES.items())
        raise UserError(f"{what}: no CLIP with {depth} blocks of width {width} is known, only {known}")
    projected = tensors[PROJECTION].shape[0] if PROJECTION in tensors else width
    return CLIPText(depth, width, size.heads, projected, size.activation, vocabulary, tokens)


def shapes_of(net: CLIPText) -> dict[str, tuple[int, ...]]:
    """The shapes of our parameters by path."""
    params = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return {path: x.shape for path, x in flatten_dict(params, sep="/").items()}


def to_ours(tensors: Tensors, what: str, net: CLIPText | None = None) -> tuple[CLIPText, dict[str, Tensor]]:
    """(the network, our parameters by path), each read lazily.

    net: the network, where its sizes are not published ones.

    Raises:
        UserError: as `network`; tensors are missing, misshapen or further ones.
    """
    own = {name if name.startswith((PREFIX, PROJECTION)) else PREFIX + name: tensor for name, tensor in tensors.items()}
    own.pop(BUFFER, None)
    net = net or network(own, what)
    if PROJECTION not in own:
        dtype = own[LINKS["position_embedding"].names[0]].dtype
        own[PROJECTION] = Tensor((net.width, net.width), dtype, lambda: np.eye(net.width, dtype=dtype))
    shapes = shapes_of(net)
    check(own, their_shapes(LINKS, shapes), what)
    return net, gathered(LINKS, shapes, own)


def to_theirs(ours: Tensors) -> dict[str, Tensor]:
    """Hugging Face's tensors by name, of our parameters."""
    return separated(LINKS, ours)
