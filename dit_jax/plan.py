"""What the models cost, before anything runs.

    python -m dit_jax.plan --models

Prints the paper's twelve sizes at 256 and 512 pixels, and the other conditioning blocks of XL/2: tokens, parameters, GMACs
(multiply-adds of one forward of one image, which the paper prints as Gflops), and FLOPs of training on one image (3 forwards,
2 per MAC).
"""

import jax
from absl import flags

from dit_jax import console
from dit_jax.errors import UserError

MODELS = flags.DEFINE_bool("models", False, "The table of models.")


def cost(config) -> dict:
    """Counts of one config's network: from its shapes and architecture, no arrays are made."""
    from dit_jax import build
    from dit_jax.analysis.flops import dit_macs
    from dit_jax.training.state import count_parameters

    task = build.task(config)
    macs = dit_macs(task.network, task.latent_shape)
    return {
        "tokens": (task.latent_shape[0] // config.model.patch_size) * (task.latent_shape[1] // config.model.patch_size),
        "params": count_parameters(jax.eval_shape(task.init, jax.random.key(0)).params),
        "gmacs": macs / 1e9,
        "train_flops_per_image": 6 * macs,
    }


def model_table() -> dict[str, dict]:
    """{"XL/2@256": counts, ..., "XL/2@256 adaln": counts, ...}."""
    from dit_jax import recipes
    from dit_jax.models.dit import CONDITIONINGS

    table = {f"{size}@{resolution}": cost(recipes.dit(size, resolution))
             for resolution in (256, 512) for size in recipes.MODELS}
    for conditioning in CONDITIONINGS[1:]:
        config = recipes.dit("XL/2", 256)
        config.model.conditioning = conditioning
        table[f"XL/2@256 {conditioning}"] = cost(config)
    return table


def main() -> dict:
    if not MODELS.value:
        raise UserError("say what to plan: --models prints the table of models")
    table = model_table()
    console.say(f"{'model':26} {'tokens':>6} {'parameters':>12} {'GMACs':>8} {'training GFLOPs/image':>22}")
    for name, row in table.items():
        console.say(f"{name:26} {row['tokens']:6} {row['params']:12,} {row['gmacs']:8.2f} "
                    f"{row['train_flops_per_image'] / 1e9:22.1f}")
    return {"models": table}


if __name__ == "__main__":
    console.run(main)
