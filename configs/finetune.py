"""Fine-tuning of a DiT of the paper on a folder of photographs: `configs/finetune.py:XL/2,256,13` is DiT-XL/2 for 13 classes.

    python -m dit_jax.main --config=finetune:XL/2,256,13 --config.init.weights=DiT-XL-2-256x256.pt --config.data.path=photos

`XL/2,256,13,lora` trains adapters of rank 16 and the label table. `XL/2,256,13,latents` trains from a latent cache: pass
--config.data.path=<folder of dit_jax.encode>. The folder has one sub-folder per class.
"""

from dit_jax import recipes
from dit_jax.errors import UserError


def get_config(arg="XL/2,256,1000"):
    parts = arg.split(",")
    size, resolution, classes = (*parts[:3], "", "", "")[:3]
    options = parts[3:]
    known = len(options) == len({*options} & {"latents", "lora"})
    if not (known and resolution.isdigit() and classes.isdigit()):
        raise UserError(
            f"configs/finetune.py:{arg}: give a size, a resolution and the number of classes, as in XL/2,256,13; lora and "
            "latents may follow"
        )
    return recipes.finetune(size, int(resolution), int(classes), lora="lora" in options, cached="latents" in options)
