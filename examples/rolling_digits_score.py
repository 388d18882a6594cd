"""Draws all jobs on clips with a run of configs/rolling_digits.py and prints a table of exact measures.

python examples/rolling_digits_score.py RUN [--count=100] [--seed=0] [--steps=25] [--long=64] [--picture=jobs.webp]

Digits, directions and given frames are drawn with a seed. "digit" is the share of clips whose digit is recognised, "steps" of
steps and "motion" of clips that move as the caption asks, "seam" of clips whose last frame leads back to the first. "PSNR" is of
the frames that were not given, where the clip determines them.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

import dit_jax
from dit_jax.data.sources import Digits, RollingDigits
from dit_jax.data.sources.digits import WORDS
from dit_jax.data.sources.rolling_digits import DIRECTIONS, clip_captions, image_captions
from dit_jax.evaluate.rolling_digits import asked, digits_of, moves_of, psnr, score
from dit_jax.sample.clip_files import write_clips
from dit_jax.sample.jobs import Animate, Connect, Edit, Extend, Loop

GUIDED, GIVEN = 2.0, 1.5  # guidance scales of text, and of text where frames are given
STRENGTHS = (0.6, 0.8, 0.9)
BLOCK = 4  # frames of a block of a long clip


def chosen(count: int, seed: int) -> tuple[np.ndarray, list[str], list[tuple[str, str]]]:
    """(clips uint8[N, 8, 8, 8, 1], of two periods; their captions; their (word, direction)), drawn with a seed."""
    rng, digits = np.random.default_rng(seed), Digits()
    source, clips, texts, facts = RollingDigits(frames=2 * BLOCK), [], [], []
    for _ in range(count):
        number, way, phase = int(rng.integers(len(digits))), list(DIRECTIONS)[rng.integers(5)], int(rng.integers(4))
        example = source.example(number, way, phase)
        clips.append(example["video"])
        texts.append(example["caption"])
        facts.append((WORDS[digits[number]["label"]], way))
    return np.stack(clips), texts, facts


def main() -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=100, help="clips of each job")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=25, help="of the sampler")
    parser.add_argument("--long", type=int, default=64, help="frames of the long clips")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    start = time.monotonic()
    pipe = dit_jax.load(args.run)
    clips, texts, facts = chosen(args.count, args.seed + 1)
    wanted = asked(texts)
    options = {"seed": args.seed, "num_steps": args.steps, "batch_size": args.count}
    text, given = options | {"guidance_scale": GUIDED}, options | {"guidance_scale": GIVEN}
    rows: list[dict] = []
    drawn: dict[str, np.ndarray] = {}

    def row(name: str, images: np.ndarray, truth: np.ndarray | None = None, unknown: list[int] | None = None, of=wanted) -> None:
        mask = None if unknown is None else np.isin(np.arange(images.shape[1]), unknown).reshape(1, -1, 1, 1, 1)
        found = score(images, of)._asdict()
        rows.append({"job": name, **found, "psnr": None if truth is None else psnr(images, truth, mask)})
        drawn[name] = images
        cells = [f"{100 * value:5.0f}" if value == value else "    -" for value in found.values()]
        print(f"{name:28}" + " ".join(cells) + ("" if truth is None else f" {rows[-1]['psnr']:5.1f}"), flush=True)

    print(f"{'job':28}digit steps motion seam  PSNR")
    row("real clips", clips[:, :4])
    stills = dit_jax.load(args.run, num_frames=1)
    words = [image_captions(word)[0] for word, _ in facts]
    images = stills(prompt=words, **text).images
    row("text to image", images[:, None], of=asked(words))
    row("text to clip", pipe(prompt=texts, **text).images)
    row("text to clip, guidance 4", pipe(prompt=texts, **options, guidance_scale=4.0).images)
    first = clips[:, :4]
    row("animate", pipe(prompt=texts, job=Animate(first[:, :1]), **given).images, first, [1, 2, 3])
    row("text to image, animated", pipe(prompt=texts, job=Animate(images), **given).images)
    row("extend forward", pipe(prompt=texts, job=Extend(first[:, :2]), **given).images, first, [2, 3])
    row("extend backward", pipe(prompt=texts, job=Extend(first[:, 2:], (2, 3)), **given).images, first, [0, 1])
    ends = np.concatenate([first[:, :1], first[:, 3:]], axis=1)
    row("connect", pipe(prompt=texts, job=Connect(ends), **given).images, first, [1, 2])
    row("loop of two given frames", pipe(prompt=texts, job=Loop(first[:, :2]), **given).images, first, [2, 3])
    row("loop from text", pipe(prompt=texts, job=Loop(), **text).images)
    twice = pipe(prompt=texts, job=Extend(first[:, :2], num_frames=8), **given).images
    row("extend twice, to 8 frames", twice, clips, [*range(2, 8)])
    long = dit_jax.load(args.run, num_frames=2 * BLOCK)
    row("8 frames at once (untrained)", long(prompt=texts, **text).images)

    changed = [(WORDS[(WORDS.index(word) + 3) % 10], way) for word, way in facts]
    others = [clip_captions(*fact)[0] for fact in changed]
    for strength in STRENGTHS:
        edited = pipe(prompt=others, job=Edit(first, strength), **text).images
        row(f"edit the digit, strength {strength}", edited, of=asked(others))

    blocks = []
    if args.long:
        begun = drawn["text to clip"]
        far = pipe(prompt=texts, job=Extend(begun, num_frames=args.long), **given).images
        own = moves_of(begun)[:, 0]  # the motion that the clip has itself, right or wrong
        for begin in range(0, args.long, BLOCK):
            part = far[:, begin : begin + BLOCK]
            moved = moves_of(part)
            keeps = ((moved - own[:, None]) % part.shape[2] == 0).all(-1).mean()
            digit = (digits_of(part) == wanted.digits[:, None]).mean()
            blocks.append({"frames": [begin, begin + BLOCK - 1], "digit": float(digit), "keeps_motion": float(keeps)})
        shown = ", ".join(f"{100 * each['digit']:.0f}/{100 * each['keeps_motion']:.0f}" for each in blocks)
        print(f"{args.long} frames by extension, blocks of {BLOCK}, digit / keeps its motion: {shown}", flush=True)
    if args.picture:
        write_picture(args.picture, drawn)
    return {"rows": rows, "blocks": blocks, "count": args.count, "seconds": round(time.monotonic() - start, 1), "step": pipe.step}


def write_picture(path: Path, drawn: dict[str, np.ndarray], columns: int = 8) -> None:
    """One animation: a row each of text to clip, animate, extend, loop and edit."""
    names = (
        "text to clip",
        "animate",
        "extend twice, to 8 frames",
        "loop of two given frames",
        f"edit the digit, strength {STRENGTHS[1]}",
    )
    rows = [drawn[name][:columns] for name in names]
    frames = 2 * BLOCK
    played = [clips[:, np.arange(frames) % clips.shape[1]] for clips in rows]
    write_clips(path, np.concatenate(played), fps=4.0, columns=columns)


if __name__ == "__main__":
    print(json.dumps(main()))
