"""Converts the encoder of T5 v1.1 between Hugging Face's layout (`T5EncoderModel`) and ours.

The table of tokens is `shared.weight`, or `encoder.embed_tokens.weight` in some files, or both. The decoder of a whole T5 is left
out.
"""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from dit_jax.encoders.t5 import HEAD_WIDTH, T5Encoder
from dit_jax.errors import UserError
from dit_jax.interop.block_stacks import Link, their_shapes
from dit_jax.interop.block_stacks import to_ours as gathered
from dit_jax.interop.block_stacks import to_theirs as separated
from dit_jax.interop.tensors import Tensor, Tensors, check

TABLES = ("shared.weight", "encoder.embed_tokens.weight")
_ATTENTION, _MLP = "encoder.block.{}.layer.0.", "encoder.block.{}.layer.1."
LINKS = {
    "token_embedding/embedding": Link(TABLES[:1]),
    "position_bias": Link(("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",)),
    "blocks/norm_attention/scale": Link((_ATTENTION + "layer_norm.weight",)),
    "blocks/attention/qkv/kernel": Link(tuple(f"{_ATTENTION}SelfAttention.{x}.weight" for x in "qkv"), 1),
    "blocks/attention/out/kernel": Link((_ATTENTION + "SelfAttention.o.weight",), 2),
    "blocks/norm_mlp/scale": Link((_MLP + "layer_norm.weight",)),
    "blocks/mlp/in/kernel": Link(tuple(f"{_MLP}DenseReluDense.wi_{i}.weight" for i in range(2)), 1),
    "blocks/mlp/out/kernel": Link((_MLP + "DenseReluDense.wo.weight",), 1),
    "norm_final/scale": Link(("encoder.final_layer_norm.weight",)),
}


def network(tensors: Tensors, what: str) -> T5Encoder:
    """The encoder of tensors in Hugging Face's layout.

    Raises:
        UserError: they are not T5 v1.1's.
    """
    table = next((name for name in TABLES if name in tensors), TABLES[0])
    query, gate = LINKS["blocks/attention/qkv/kernel"].names[0].format(0), LINKS["blocks/mlp/in/kernel"].names[0].format(0)
    if missing := [name for name in (table, query, gate) if name not in tensors or len(tensors[name].shape) != 2]:
        old = "encoder.block.0.layer.1.DenseReluDense.wi.weight" in tensors
        hint = "; it is T5 1.0, whose MLP is another one: take a model named v1_1" if old else ""
        raise UserError(f"{what} is not an encoder of T5 v1.1: {', '.join(missing)} missing or of another rank{hint}")
    depth = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.block."))
    vocabulary, width = tensors[table].shape
    return T5Encoder(depth, width, tensors[query].shape[0] // HEAD_WIDTH, tensors[gate].shape[0], vocabulary)


def shapes_of(net: T5Encoder) -> dict[str, tuple[int, ...]]:
    """The shapes of our parameters by path."""
    params = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return {path: x.shape for path, x in flatten_dict(params, sep="/").items()}


def to_ours(tensors: Tensors, what: str) -> tuple[T5Encoder, dict[str, Tensor]]:
    """(the network, our parameters by path), each read lazily.

    Raises:
        UserError: as `network`; tensors are missing, misshapen or further ones.
    """
    net = network(tensors, what)
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(("decoder.", "lm_head."))}
    if TABLES[0] not in own:
        own[TABLES[0]] = own[TABLES[1]]
    own.pop(TABLES[1], None)
    shapes = shapes_of(net)
    check(own, their_shapes(LINKS, shapes), what)
    return net, gathered(LINKS, shapes, own)


def to_theirs(ours: Tensors) -> dict[str, Tensor]:
    """Hugging Face's tensors by name, of our parameters."""
    return separated(LINKS, ours)
