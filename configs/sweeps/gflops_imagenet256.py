"""The paper's central figure, FID-50K against GFLOPs: twelve sizes on ImageNet 256, 400,000 steps each (Peebles & Xie 2023).

    python -m dit_jax.sweep --sweep=configs/sweeps/gflops_imagenet256.py --list --chip=v5p

Set the data and the reference for all runs: --config.data.path= --config.evaluation.reference=. The VAE is downloaded unless
--config.codec.path= has it.
Expect FID 153.6 (S/8) to 19.5 (XL/2), and a correlation of -0.93 between log GFLOPs and FID.
"""

from dit_jax import recipes
from dit_jax.sweep.grid import Sweep


def get_sweep():
    return Sweep(
        title="DiT on ImageNet 256: FID against GFLOPs",
        base="imagenet",
        variants={model: f"{model},256" for model in recipes.MODELS},
        grid={
            "evaluation.num_images": [50_000],
            "evaluation.features": ["inception"],
            "scoring.every_steps": [50_000],
            "scoring.num_images": [10_000],
        },
        paper=True,
    )
