"""Fréchet distance against GFLOPs on the 8 x 8 digits: six models over two decades, two seeds each; 40 minutes on two cores.

    python -m dit_jax.sweep --sweep=configs/sweeps/digits.py --workdir=runs/digits_sweep

Depth and width grow together at patch 4, that is 4 tokens. With 1,000 steps smaller patches are worse at the same size (3 x 64 at
patch 2: 4.1, at patch 4: 1.1), so that GFLOPs spent on tokens do not pay here as they do in the paper.
"""

from dit_jax.sweep.grid import Sweep

MODELS = {
    "2x32": (2, 32, 2),
    "2x48": (2, 48, 3),
    "3x64": (3, 64, 4),
    "4x96": (4, 96, 4),
    "5x128": (5, 128, 4),
    "7x192": (7, 192, 6),
}  # depth, width, heads
NUM_STEPS = 1_000


def get_sweep():
    return Sweep(
        title="DiT on the 8 x 8 digits: quality against GFLOPs",
        base="digits",
        variants={
            name: {"model.depth": depth, "model.width": width, "model.heads": heads}
            for name, (depth, width, heads) in MODELS.items()
        },
        grid={
            "model.patch_size": [4],
            "process.prediction": ["noise"],
            "optimizer.learning_rate": [2e-3],
            "num_steps": [NUM_STEPS],
            "optimizer.decay_steps": [NUM_STEPS],
            "preview.every_steps": [0],
            "scoring.every_steps": [250],
            "scoring.num_images": [500],
        },
        seeds=[0, 1],
        samplers=[("ddim", 5), ("ddim", 10), ("ddim", 25)],
        paper=True,
        reference_curves="digits_curves.csv",
        note="1,797 real digits of scikit-learn, 8 x 8 pixels, all at patch 4. Two halves of the real digits are 0.26 apart.",
    )
