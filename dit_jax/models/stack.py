"""A stack of equal blocks: one set of stacked parameters, a loop or unrolled code, and what is stored for the gradient."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.errors import UserError
from dit_jax.models import layers
from dit_jax.models.network import Shape, check_entries

REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # cuDNN's softmax statistics have no name. All outputs of its forward kernel are saved, else the kernel would run twice.
    "elementwise": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(*layers.PRODUCTS),
        lambda primitive, *_, **__: primitive.name == "dot_product_attention_fwd_wrapper",
    ),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(layers.PRODUCTS),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
CHOICES = ("none", *REMAT_POLICIES)  # of the field `remat`, beside "auto"
STORES_NOTHING_INSIDE = ("full", "offload")  # policies that keep only a block's input on the device
# Activations that the gradient of one block of a transformer reads, in units of [B, N, D]: its input; then qkv, attention, and
# both products of the MLP. This is a lower bound: the compiler also keeps norms, scores and float32 copies.
STORED_AT_ENTRY, STORED_INSIDE = 1, 9


def form_of_loop(unroll: bool | None, remat: str, platform: str) -> tuple[bool, str]:
    """Resolves unroll=None and remat="auto" for a platform ("cpu", "gpu", "tpu"); returns (unroll, remat).

    On a GPU, matrix products cannot write into the stacked arrays in which a scan keeps activations for the gradient, so blocks
    are unrolled and store all activations. Elsewhere blocks are scanned and store the expensive ones ("elementwise").
    """
    unroll = platform == "gpu" if unroll is None else unroll
    return unroll, ("none" if unroll else "elementwise") if remat == "auto" else remat


def stack(
    block: type[nn.Module], depth: int, in_axes: Sequence[Any], unroll: bool | None, remat: str
) -> Callable[..., nn.Module]:
    """The constructor of `depth` blocks in sequence, whose parameters have a leading axis of that length.

    Args:
        block: called with x and further arguments; returns (x, None).
        in_axes: of the further arguments: `nn.broadcast`, or 0 for one with an entry for each block.
        unroll, remat: fields of the network, see `form_of_loop`.
    """
    unroll, remat = form_of_loop(unroll, remat, jax.default_backend())
    if remat != "none":
        # In unrolled blocks XLA would merge the recomputation with the first computation (CSE); a loop keeps them apart.
        block = nn.remat(block, prevent_cse=unroll, policy=REMAT_POLICIES[remat])
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=tuple(in_axes),
        length=depth,
        unroll=depth if unroll else 1,
    )


def blocks_to_keep(control: Mapping[str, Any] | None, depth: int, network: str) -> jax.Array | None:
    """Entry "keep", bool[depth], of a network's control: the blocks that are not skipped; None if it has none.

    Raises:
        UserError: another entry, or another number of blocks.
    """
    check_entries("control", control, ("keep",), network)
    keep = (control or {}).get("keep")
    if keep is not None and jnp.shape(keep) != (depth,):
        raise UserError(f"control keep has shape {jnp.shape(keep)}; it must be ({depth},), one flag for each block")
    return keep


def stored_units(depth: int, remat: str, tensor: int) -> int:
    """Lower bound on the activations that `depth` blocks of a transformer store on a device, in units of [B, N, D].

    tensor: devices over which heads and the MLP's features are split.
    """
    return depth * (STORED_AT_ENTRY if remat in STORES_NOTHING_INSIDE else STORED_AT_ENTRY + STORED_INSIDE // tensor)


class TokenBlocks:
    """`models.network.Planned` of a transformer of equal blocks, with fields depth, width, remat and dtype, and `num_tokens`.

    Its control takes "keep" (`blocks_to_keep`).
    """

    skips_blocks = True

    def activation_bytes(self: Any, latent_shape: Shape, rows: int, mesh_shape: Mapping[str, int]) -> int:
        units = stored_units(self.depth, self.remat, mesh_shape["tensor"])
        tokens = self.num_tokens(latent_shape) // mesh_shape["sequence"]
        return units * rows * tokens * self.width * jnp.dtype(self.dtype).itemsize

    def savings(self: Any, latent_shape: Shape, rows: int, mesh_shape: Mapping[str, int], activations: int) -> dict[str, int]:
        def kept(policy: str) -> int:
            return self.clone(remat=policy).activation_bytes(latent_shape, rows, mesh_shape)

        return savings(self.remat, self.depth, kept, activations)


def savings(remat: str, depth: int, kept: Callable[[str], int], activations: int) -> dict[str, int]:
    """`models.network.Planned.savings` of a stack: {config override: bytes saved per device}.

    Args:
        depth: blocks of the network.
        kept: lower bound of the bytes that a policy stores.
        activations: bytes per device that activations take in the compiled step.
    """
    saved = {}
    for policy, cost in (("elementwise", "recomputes elementwise operations"), ("full", "a third more arithmetic")):
        if remat == "none" or (policy == "full" and remat in ("dots", "elementwise")):
            # In the backward pass, one block at a time has all of its activations.
            saved[f"--config.model.remat={policy} ({cost})"] = max(0, int((activations - kept(policy)) * (1 - 1 / depth)))
    return saved
