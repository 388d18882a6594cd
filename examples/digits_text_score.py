"""Scores the final samples of a run of configs/digits_text.py: the share of prompts whose digits are recognised, in order.

python examples/digits_text_score.py RUN
"""

import itertools
import json
import sys
from pathlib import Path

import ml_collections
import numpy as np

from dit_jax.build import Run
from dit_jax.evaluate.digit_recognition import asked, recognised_all
from dit_jax.storage.run_folder import read_config


def score(workdir: Path) -> dict:
    """{"share": of all prompts, "prompts": number, "by_length": the share by the number of words, "samples": file}."""
    file = max((workdir / "samples").glob("*_final.npz"))
    images = np.load(file)["arr_0"]
    prompts = list(itertools.islice(itertools.cycle(Run(ml_collections.ConfigDict(read_config(workdir))).prompts), len(images)))
    right = [tuple(found) == wanted for found, wanted in zip(recognised_all(images), asked(prompts), strict=True)]
    by_words: dict[int, list[bool]] = {}
    for prompt, good in zip(prompts, right, strict=True):
        by_words.setdefault(len(prompt.split()), []).append(good)
    lengths = {f"{words} words": float(np.mean(good)) for words, good in sorted(by_words.items())}
    return {"share": float(np.mean(right)), "prompts": len(right), "by_length": lengths, "samples": str(file)}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give the folder of a run of configs/digits_text.py")
    print(json.dumps(score(Path(sys.argv[1])), indent=2))
