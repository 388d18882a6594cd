"""Scores samples against a reference: the Frechet distance between Gaussians fitted to features of both.

    python -m dit_jax.evaluate --samples=x.npz --reference=digits --features=pixels

The reference is `digits` (all 1,797), a folder of images in class folders, or an npz of images like the samples. Of several
processes the first computes, the others wait.
"""

import jax
from absl import flags

from dit_jax import console, processes
from dit_jax.errors import UserError

SAMPLES = flags.DEFINE_string("samples", None, "npz with arr_0: uint8 [N, H, W, C].")
REFERENCE = flags.DEFINE_string("reference", None, "digits, a folder of images in class folders, or an npz.")
FEATURES = flags.DEFINE_string("features", "pixels", "Feature space: pixels (for tiny images).")


def main() -> dict:
    if SAMPLES.value is None or REFERENCE.value is None:
        raise UserError("give --samples=<npz> and --reference=digits, a folder or an npz")
    processes.join()
    if jax.process_index() != 0:
        return {}
    from dit_jax.training.score import evaluate

    result = evaluate(SAMPLES.value, REFERENCE.value, FEATURES.value)
    console.say(f"Frechet distance {result['fid']:.4f} in {result['features']}: {result['num_samples']} samples against "
                f"{result['num_reference']} of {REFERENCE.value}")
    return result


if __name__ == "__main__":
    console.run(main)
