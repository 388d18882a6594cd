"""The Diffusion Transformer of Peebles & Xie 2023 (arXiv 2212.09748), with its four conditioning blocks.

B batch, H x W x C input, p patch, N = HW / p^2 tokens, M conditioning tokens, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.errors import UserError
from dit_jax.models import layers, position
from dit_jax.parallel.mesh import constrain_batch

CONDITIONINGS = ("adaln_zero", "adaln", "cross_attention", "in_context")
REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # The statistics of cuDNN's softmax have no name: without its kernel's own outputs the forward kernel would run twice.
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


def form_of_loop(unroll: bool | None, remat: str, platform: str) -> tuple[bool, str]:
    """(unroll, remat) where they are left to the platform ("cpu", "gpu", "tpu"): None and "auto".

    A GPU's matrix products cannot write into the stacks in which a scan keeps what the gradient needs, so blocks are written out
    there, and store everything. Elsewhere they are scanned, and store what is costly to compute.
    """
    unroll = platform == "gpu" if unroll is None else unroll
    return unroll, ("none" if unroll else "elementwise") if remat == "auto" else remat


def patchify(x, p: int):
    """[B, H, W, C] -> [B, (H/p) (W/p), p p C], patches in row-major order, channels last inside a patch."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // p, p, w // p, p, c)
    return jnp.einsum("bhpwqc->bhwpqc", x).reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(x, p: int, height: int, width: int):
    """[B, (height/p) (width/p), p p C] -> [B, height, width, C], the inverse of patchify."""
    b, _, k = x.shape
    x = x.reshape(b, height // p, width // p, p, p, k // (p * p))
    return jnp.einsum("bhwpqc->bhpwqc", x).reshape(b, height, width, -1)


class Modulation(nn.Module):
    """silu(c) -> `count` vectors of width D, zero at the start.  [B, D] -> [B, count, D] float32."""

    count: int
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, c):
        linear = nn.DenseGeneral(
            (self.count, c.shape[-1]), kernel_init=layers.zeros, dtype=self.dtype, param_dtype=self.param_dtype, name="linear"
        )
        # Replicated over fsdp and tensor on purpose: see `parallel.rules`.
        return constrain_batch(linear(nn.silu(c)))


class Block(nn.Module):
    """One transformer block.

    Called with x [B, N, D], the pooled condition c [B, D] and the conditioning tokens [B, M, D]; returns (x, None), the form
    that `nn.scan` asks for.
      adaln_zero       shift, scale and gate of both sub-layers regressed from c; gates start at zero (identity block)
      adaln            shift and scale only
      cross_attention  self-attention, cross-attention to the conditioning tokens, MLP; norms with parameters
      in_context       a plain block; the conditioning tokens stand in x already
    Source: Peebles & Xie 2023, section 3.2, figure 3.
    """

    heads: int
    mlp_ratio: float
    conditioning: str
    attention: str
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x, c, tokens):
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attention = layers.Attention(self.heads, self.attention, **dtypes, name="attention")
        mlp = layers.MLP(int(x.shape[-1] * self.mlp_ratio), **dtypes, name="mlp")
        if self.conditioning in ("adaln_zero", "adaln"):
            gated = self.conditioning == "adaln_zero"
            vectors = Modulation(6 if gated else 4, **dtypes, name="modulation")(c)
            parts = [vectors[:, i] for i in range(vectors.shape[1])]
            # The order of the paper's code: (shift, scale, gate) of attention, then of the MLP.
            (shift_1, scale_1, *gate_1), (shift_2, scale_2, *gate_2) = parts[: len(parts) // 2], parts[len(parts) // 2 :]
            gate_1, gate_2 = (gate_1[0][:, None], gate_2[0][:, None]) if gated else (1, 1)
            x = x + gate_1 * attention(layers.modulate(layers.normalize(x), shift_1, scale_1).astype(self.dtype))
            x = x + gate_2 * mlp(layers.modulate(layers.normalize(x), shift_2, scale_2).astype(self.dtype))
        else:

            def norm(name):
                return nn.LayerNorm(layers.NORM_EPSILON, **dtypes, name=name)

            x = x + attention(norm("norm_attention")(x))
            if self.conditioning == "cross_attention":
                cross = layers.Attention(self.heads, self.attention, **dtypes, name="cross_attention")
                x = x + cross(norm("norm_cross")(x), tokens)
            x = x + mlp(norm("norm_mlp")(x))
        return constrain_batch(x.astype(self.dtype), tokens=True), None


class FinalLayer(nn.Module):
    """Norm (modulated by c for the adaLN kinds), then a linear layer that starts at zero.  [B, N, D] -> [B, N, features]."""

    features: int
    modulated: bool
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x, c):
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.modulated:
            vectors = Modulation(2, **dtypes, name="modulation")(c)
            x = layers.modulate(layers.normalize(x), vectors[:, 0], vectors[:, 1]).astype(self.dtype)
        else:
            x = nn.LayerNorm(layers.NORM_EPSILON, **dtypes, name="norm")(x)
        return nn.Dense(self.features, kernel_init=layers.zeros, **dtypes, name="linear")(x)


class DiT(nn.Module):
    """Diffusion Transformer: (x_t [B, H, W, C], t f32[B] network time, cond {"label": int[B]}) -> f32[B, H, W, out_channels].

    A pure function: no dropout, no random numbers, no guidance. Label `num_classes` is the null label; with
    `num_classes = 0` the network is unconditional and reads no label. The blocks' parameters are one stack of length
    `depth` under `blocks`, whether or not the loop over them is unrolled. With `mutable=["blocks"]` it also returns what
    the blocks add to the tokens, {"blocks": {"residual": [B, N, D]}}; given a `residual`, it adds that in their place.

    Fields:
        out_channels: 2 C when the process learns its variance, else C.
        conditioning: one of CONDITIONINGS.
        attention: see `layers.dot_product_attention`.
        remat: what a block stores for its gradient, beside its input; the rest is computed again.
            "auto": see `form_of_loop`.
            "none": everything.
            "elementwise": what linear layers and attention return; norms, modulation, GELU and the softmax are repeated.
            "dots": what linear layers return, the modulation's among them; attention is repeated too.
            "full": nothing.
            "offload": as "elementwise", kept in the host's memory until the gradient asks for it.
        unroll: False scans over the blocks (compile time flat in depth); True writes them out; None: see `form_of_loop`.
        dtype: of activations and matrix products; norms, softmax and the output are float32.
    """

    patch_size: int
    depth: int
    width: int
    heads: int
    num_classes: int
    out_channels: int
    mlp_ratio: float = 4.0
    conditioning: str = "adaln_zero"
    attention: str = "auto"
    remat: str = "auto"
    unroll: bool | None = None
    dtype: layers.Dtype = jnp.float32
    param_dtype: layers.Dtype = jnp.float32

    @property
    def null_label(self) -> int:
        return self.num_classes

    def check(self, height: int, width: int):
        """Raises a UserError if the fields do not fit each other or an input of height x width."""
        if self.conditioning not in CONDITIONINGS:
            raise UserError(f"model.conditioning is {self.conditioning!r}; it must be one of {', '.join(CONDITIONINGS)}")
        if self.remat not in ("auto", "none", *REMAT_POLICIES):
            raise UserError(f"model.remat is {self.remat!r}; it must be one of auto, none, {', '.join(REMAT_POLICIES)}")
        if self.attention not in ("auto", "xla", "cudnn"):
            raise UserError(f"model.attention is {self.attention!r}; it must be one of auto, xla, cudnn")
        for name in ("patch_size", "depth", "width", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.mlp_ratio <= 0:
            raise UserError(f"model.mlp_ratio is {self.mlp_ratio}; it must be positive")
        if self.width % self.heads:
            raise UserError(
                f"model.heads = {self.heads} does not divide model.width = {self.width}; "
                f"choose a width that is a multiple of {self.heads}"
            )
        if self.width % 4:
            raise UserError(f"model.width = {self.width} is not a multiple of 4, which the position table needs")
        if height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"the network's input is {height} x {width}, not a multiple of model.patch_size = "
                f"{self.patch_size}; change the resolution or the patch size"
            )

    @nn.compact
    def __call__(self, x_t, t, cond, residual=None):
        _, h, w, _ = x_t.shape
        self.check(h, w)
        p, dtypes = self.patch_size, {"dtype": self.dtype, "param_dtype": self.param_dtype}

        x = nn.Dense(self.width, kernel_init=layers.xavier_uniform, **dtypes, name="patch_embedding")(
            patchify(x_t, p).astype(self.dtype)
        )  # [B, N, D]
        x = x + position.sincos_2d(self.width, h // p, w // p).astype(self.dtype)
        tokens = [layers.TimeEmbedding(self.width, **dtypes, name="time_embedding")(t)]
        if self.num_classes:
            tokens.append(
                nn.Embed(self.num_classes + 1, self.width, embedding_init=layers.normal_002, **dtypes, name="label_embedding")(
                    cond["label"]
                )
            )
        c = sum(tokens)  # [B, D]
        tokens = jnp.stack(tokens, axis=1)  # [B, M, D]
        if self.conditioning == "in_context":
            x = jnp.concatenate([x, tokens], axis=1)  # [B, N + M, D]

        block, (unroll, remat) = Block, form_of_loop(self.unroll, self.remat, jax.default_backend())
        if remat != "none":
            # Written out, XLA would merge what is computed again with what was computed before; a loop keeps them apart.
            block = nn.remat(Block, prevent_cse=unroll, policy=REMAT_POLICIES[remat])
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.depth,
            unroll=self.depth if unroll else 1,
        )
        x = start = constrain_batch(x, tokens=True)
        if residual is None:
            x, _ = blocks(self.heads, self.mlp_ratio, self.conditioning, self.attention, **dtypes, name="blocks")(x, c, tokens)
            if self.is_mutable_collection("blocks") and not self.is_initializing():
                self.sow("blocks", "residual", x - start, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        else:
            x = (start + residual).astype(self.dtype)

        if self.conditioning == "in_context":
            x = x[:, : -tokens.shape[1]]
        modulated = self.conditioning in ("adaln_zero", "adaln")
        x = FinalLayer(p * p * self.out_channels, modulated, **dtypes, name="final")(x, c)
        return unpatchify(x, p, h, w).astype(jnp.float32)
