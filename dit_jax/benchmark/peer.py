"""The same work in PyTorch, for comparison: diffusers' `DiTTransformer2DModel`, eager and compiled.

Equal: sizes, number of parameters, batch, resolution, dtype (bfloat16 by autocast), number of threads, device, AdamW, a moving
average in float32, label dropout. Different, in the peer's favour or neutral: its loss is only the squared error of the noise
(ours adds the variational bound, elementwise on latents), and its norms and gradients are not checked. Each library uses its own
layout: NCHW in PyTorch, NHWC here.
"""

import contextlib
import os
from typing import Any

import jax.numpy as jnp

from dit_jax.benchmark import machine
from dit_jax.benchmark.network import diffusion_task
from dit_jax.benchmark.subject import Subject
from dit_jax.benchmark.timing import Work
from dit_jax.diffusion.gaussian import Gaussian
from dit_jax.diffusion.guidance import Guidance
from dit_jax.diffusion.samplers import DDIM
from dit_jax.errors import UserError
from dit_jax.runtime.console import say

KINDS = ("eager", "compiled")


class Peer:
    """PyTorch's DiT of a subject's sizes, on the same device.

    Args:
        kind: "eager", or "compiled" by torch.compile.

    Raises:
        UserError: PyTorch or diffusers is not installed; there are several devices; JAX has a GPU but PyTorch has no CUDA;
            diffusers does not have the network.
    """

    def __init__(self, subject: Subject, kind: str):
        # Prevents diffusers from importing other libraries.
        os.environ.setdefault("USE_FLAX", "0")
        os.environ.setdefault("USE_TF", "0")
        try:
            import torch
            from diffusers import DiTTransformer2DModel
        except ImportError as error:
            raise UserError(f"--compare needs PyTorch and diffusers ({error}): pip install 'dit_jax[parity]'") from None
        self.torch, self.subject, self.task = torch, subject, diffusion_task(subject)
        self.device = self._device()
        net: Any = self.task.network  # a DiT, whose fields are checked next
        same = (net.conditioning, net.mlp_ratio, net.param_dtype) == ("adaln_zero", 4.0, jnp.float32)
        if not same or not net.num_classes or not isinstance(self.task.process, Gaussian):
            raise UserError(
                "--compare: diffusers only has DiT with adaLN-Zero, classes, an MLP of 4 x width and float32 weights, "
                "and the peer's process is Gaussian; choose such a config"
            )
        self.alpha_bar = self.task.process.alpha_bar
        self.autocast = jnp.dtype(net.dtype) == jnp.bfloat16
        torch.set_num_threads(machine.cores())
        if self.device == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True  # as XLA does for float32
        torch.manual_seed(0)
        h, w, self.channels = self.task.latent_shape
        if h != w:
            raise UserError(f"--compare: diffusers has DiT for squares only, and the latents are {h} x {w}; choose a square")
        self.model = DiTTransformer2DModel(
            num_attention_heads=net.heads,
            attention_head_dim=net.width // net.heads,
            in_channels=self.channels,
            out_channels=net.out_channels,
            num_layers=net.depth,
            sample_size=h,
            patch_size=net.patch_size,
            num_embeds_ada_norm=net.num_classes,
            norm_eps=1e-6,
        ).to(self.device)
        first, *others = self.model.transformer_blocks
        for block in others:  # each has a copy of the time and label embedding; the paper's network has one
            block.norm1.emb = first.norm1.emb
        self.network = torch.compile(self.model) if kind == "compiled" else self.model
        self.facts = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "torch_device": self.device,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }

    def _device(self) -> str:
        if self.subject.mesh.devices.size != 1:
            raise UserError(
                f"--compare needs a single device, but the mesh has {self.subject.mesh.devices.size}: hide "
                "the others (CUDA_VISIBLE_DEVICES, JAX_NUM_CPU_DEVICES=1)"
            )
        platform = self.subject.mesh.devices.flat[0].platform
        if platform == "cpu":
            return "cpu"
        if platform == "gpu" and self.torch.cuda.is_available():
            return "cuda"
        raise UserError(f"--compare: JAX runs on {platform}, but this PyTorch does not; install one that does")

    def precision(self):
        return self.torch.autocast(self.device, self.torch.bfloat16) if self.autocast else contextlib.nullcontext()

    def finish(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def inputs(self):
        """(latents [B, C, h, w], timesteps [B], labels [B])."""
        torch, size, (h, w, c) = self.torch, self.subject.batch_size, self.task.latent_shape
        place = {"device": self.device}
        return (
            torch.randn(size, c, h, w, **place),
            torch.randint(0, 1000, (size,), **place),
            torch.randint(0, self.task.conditioner.num_classes, (size,), **place),
        )

    def train_step(self) -> Work:
        torch = self.torch
        self.model.train()
        x0, _, labels = self.inputs()
        parameters = list(self.model.parameters())
        average = [p.detach().clone() for p in parameters]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
        alpha_bar = torch.tensor(self.alpha_bar[1:], dtype=torch.float32, device=self.device)

        def call():
            t = torch.randint(0, len(alpha_bar), (len(x0),), device=self.device)
            noise = torch.randn_like(x0)
            a = alpha_bar[t].view(-1, 1, 1, 1)
            with self.precision():
                output = self.network(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, labels).sample
            loss = (output[:, : self.channels].float() - noise).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - self.task.ema_decay)
            self.finish()

        return Work(call, self.subject.batch_size, self.facts)

    def forward(self) -> Work:
        self.model.eval()
        x, t, labels = self.inputs()

        def call():
            with self.torch.no_grad(), self.precision():
                self.network(x, t, labels)
            self.finish()

        return Work(call, self.subject.batch_size, self.facts)

    def sampler(self) -> Work:
        """DDIM as in diffusers' pipeline: both forward passes of guidance in one batch, steps in Python.

        Raises:
            UserError: another sampler, or guidance in an interval, which the pipeline does not support.
        """
        torch, guidance, draw = self.torch, self.subject.guidance, self.subject.sampler
        if not isinstance(draw, DDIM) or draw.eta or guidance != Guidance(guidance.scale):
            raise UserError(
                "--compare with --what=sampler: the peer is diffusers' DDIM, so use --sampler=ddim, eta 0 and "
                "guidance of all channels for all t"
            )
        from diffusers import DDIMScheduler

        self.model.eval()
        noise, _, labels = self.inputs()
        scheduler = DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(draw.num_steps)
        if guidance.active:
            labels = torch.cat([labels, torch.full_like(labels, self.task.conditioner.num_classes)])

        def call():
            x = noise
            with torch.no_grad():
                for t in scheduler.timesteps:
                    both = torch.cat([x, x]) if guidance.active else x
                    with self.precision():
                        out = self.network(both, t.to(self.device).expand(len(both)), labels).sample
                    noise_prediction = out[:, : self.channels].float()
                    if guidance.active:
                        with_label, without = noise_prediction.chunk(2)
                        noise_prediction = without + guidance.scale * (with_label - without)
                    x = scheduler.step(noise_prediction, t, x).prev_sample
            self.finish()
            return x.clamp(-1, 1).mul(127.5).add(127.5).to(torch.uint8).cpu().numpy()

        return Work(call, self.subject.batch_size, self.facts)


def works(what: str, subject: Subject, kinds: list[str]) -> dict[str, Work]:
    """The peers' train_step, forward or sampler: {"torch eager": ..., "torch compiled": ...}."""
    built = {}
    for kind in kinds:
        say(f"building PyTorch's {what}, {kind}")
        built[f"torch {kind}"] = getattr(Peer(subject, kind), what)()
    return built
