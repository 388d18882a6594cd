"""Writes tests/golden/peft/: an adapter that PEFT saved, and what PEFT merges it to.

    pip install --no-deps peft transformers accelerate tokenizers regex psutil
    python tests/golden/make_peft.py

Needs torch and diffusers too. Made with PEFT 0.21.2, diffusers 0.42.1 and torch 2.13.0.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import peft
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "support"))

from dit_files import tiny_weights  # noqa: E402

from dit_jax.convert import formats  # noqa: E402

SIZES = {"depth": 2, "width": 8, "heads": 2}


def main():
    folder = HERE / "peft"
    shutil.rmtree(folder, ignore_errors=True)
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        formats.write(tiny_weights(**SIZES), "diffusers", Path(scratch) / "base")
        network = diffusers.DiTTransformer2DModel.from_pretrained(Path(scratch) / "base")
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, modules_to_save=["embedding_table"])
    model, table = peft.get_peft_model(network, config), None
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        if "modules_to_save" in name:  # every block has a copy
            table = 0.2 * torch.randn(parameter.shape, generator=generator) if table is None else table
            parameter.data = table.clone()
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    merged = {name: x.numpy() for name, x in model.merge_and_unload().state_dict().items()}
    kept = ("attn1.to_q.weight", "attn1.to_k.weight", "attn1.to_v.weight", "to_out.0.weight", "proj.weight", "net.2.weight")
    chosen = {name: x for name, x in merged.items() if name.startswith("transformer_blocks.") and name.endswith(kept)}
    table_name = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    np.savez_compressed(folder / "merged.npz", **chosen, **{table_name: merged[table_name]})


if __name__ == "__main__":
    main()
