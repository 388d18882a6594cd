"""Scores the final samples of a run of configs/digits_text.py: the share of prompts whose digits are recognised, in order.

python examples/digits_text_score.py RUN
"""

import json
import sys
from pathlib import Path

import numpy as np

from dit_jax.evaluate.digit_recognition import asked, recognised_all


def score(workdir: Path) -> dict:
    """{"share": of all prompts, "prompts": number, "by_length": the share by the number of words, "samples": file}."""
    file = max((workdir / "samples").glob("*_final.npz"))
    samples = np.load(file)
    images, prompts = samples["arr_0"], samples["captions"].tolist()
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
