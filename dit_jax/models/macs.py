"""How much a network computes, counted from its architecture.

MACs are multiply-adds of matrix products of one forward of one image; norms, softmax and other elementwise work are left out,
as the paper does. XLA's own count would miss all but one pass of a scanned block.
"""

from dit_jax.models.dit import DiT


def dit_macs_by_part(net: DiT, latent_shape: tuple[int, int, int]) -> dict[str, int]:
    """Part of the network -> MACs.

    Args:
        latent_shape: (h, w, c).
    """
    h, w, channels = latent_shape
    d, p, depth = net.width, net.patch_size, net.depth
    patches = (h // p) * (w // p)
    conditions = 2 if net.num_classes else 1
    tokens = patches + conditions * (net.conditioning == "in_context")
    hidden = int(d * net.mlp_ratio)
    vectors = {"adaln_zero": 6, "adaln": 4}.get(net.conditioning, 0)
    parts = {
        "patch_embedding": patches * p * p * channels * d,
        "time_embedding": 256 * d + d * d,
        "attention_linear": depth * tokens * 4 * d * d,
        "attention_product": depth * 2 * tokens * tokens * d,
        "mlp": depth * tokens * 2 * d * hidden,
        "modulation": depth * vectors * d * d + (2 * d * d if vectors else 0),
        "final": patches * d * p * p * net.out_channels,
    }
    if net.conditioning == "cross_attention":
        parts["cross_attention"] = depth * (2 * tokens * d * d + 2 * conditions * d * d + 2 * tokens * conditions * d)
    return parts


def dit_macs(net: DiT, latent_shape: tuple[int, int, int]) -> int:
    """MACs of one forward of one image; FLOPs are twice that, and a training step costs three forwards."""
    return sum(dit_macs_by_part(net, latent_shape).values())
