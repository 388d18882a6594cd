"""The prompts of samples: texts, files of texts, and the hook that expands them."""

import importlib
import os
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dit_jax.encoders.conditioner import Requests
from dit_jax.errors import UserError
from dit_jax.storage.bounded import json_object
from dit_jax.storage.paths import local_path

MAX_FILE_BYTES = 64 << 20
EXPANDER_SECONDS = 600.0
Expander = Callable[[list[str]], Sequence[str]]


@dataclass(frozen=True)
class Prompts:
    """Prompts of images, one of each field for each prompt.

    Fields:
        texts: what the network is given.
        negatives: texts that guidance leads away from; () for the null condition, which is the encoding of "".
        seeds: the image of prompt k is image 0 of its seed, or image k of the call's seed where it is None; () for None
            everywhere.
        asked: the texts before they were expanded; () if they were not.
    """

    texts: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    seeds: tuple[int | None, ...] = ()
    asked: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.texts:
            raise UserError('there is no prompt; give one, as in --prompt="a three" (an empty one, "", is allowed)')
        for text in (*self.texts, *self.negatives):
            if not isinstance(text, str):
                raise UserError(f"the prompt {text!r} is no text; give a string")
            if any(character == "\0" or 0xD800 <= ord(character) <= 0xDFFF for character in text):
                raise UserError(f"the prompt {text!r} holds a zero byte or is not UTF-8; give it in UTF-8")

    def repeated(self, count: int) -> "Prompts":
        """`count` prompts: these in turn. Prompts with seeds of their own are not repeated."""
        if count > len(self.texts) and any(seed is not None for seed in self.seeds):
            raise UserError(
                f"num_samples={count} is more than the {len(self.texts)} prompts, and some have a seed: the same image would be "
                "drawn twice. Leave num_samples out"
            )

        def cycled(values):
            return tuple(values[k % len(values)] for k in range(count)) if values else ()

        return Prompts(cycled(self.texts), cycled(self.negatives), cycled(self.seeds), cycled(self.asked))

    def expanded(self, expander: Expander) -> "Prompts":
        """The prompts with the texts that the expander returns for them.

        Raises:
            UserError: it returns another number of texts, or something else.
        """
        texts = list(expander(list(self.texts)))
        if len(texts) != len(self.texts) or not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"the prompt expander returned {len(texts)} values for {len(self.texts)} prompts; a text for each is needed"
            )
        return replace(self, texts=tuple(texts), asked=self.asked or self.texts)

    def requests(self) -> Requests:
        """{"caption": str [N], "negative": str [N] if there is one}, for `Conditioner.from_requests`."""
        found: Requests = {"caption": np.array(self.texts, object)}
        if any(self.negatives):
            found["negative"] = np.array(self.negatives, object)
        return found

    def stored(self) -> dict[str, tuple[str, ...]]:
        """The texts that are stored with samples, see `samples_file.Samples`."""
        found = {"captions": self.texts, "prompts": self.asked, "negative_prompts": self.negatives if any(self.negatives) else ()}
        return {name: texts for name, texts in found.items() if texts}

    def keys(self, seed: int) -> dict[str, np.ndarray]:
        """{"seed": uint32[N], "number": int32[N]} of the images' keys; {} where all are of the call's seed, in order."""
        if all(own is None for own in self.seeds):
            return {}
        return {
            "seed": np.array([seed if own is None else own for own in self.seeds], np.uint32),
            "number": np.array([k if own is None else 0 for k, own in enumerate(self.seeds)], np.int32),
        }


def prompts_of(prompt: str | Sequence[str] | Prompts, negative_prompt: str | Sequence[str] | None = None) -> Prompts:
    """The prompts of a call.

    Args:
        negative_prompt: one for all, or one for each prompt; None for none.

    Raises:
        UserError: another number of negative prompts; a value that is no text; both a negative prompt and `Prompts` with some.
    """
    found = prompt if isinstance(prompt, Prompts) else Prompts((prompt,) if isinstance(prompt, str) else tuple(prompt))
    if negative_prompt is None:
        return found
    if any(found.negatives):
        raise UserError("the prompts have negative prompts of their own; leave negative_prompt out")
    given = (negative_prompt,) if isinstance(negative_prompt, str) else tuple(negative_prompt)
    if len(given) == 1:
        given *= len(found.texts)
    if len(given) != len(found.texts):
        raise UserError(f"there are {len(given)} negative prompts for {len(found.texts)} prompts; give one, or one for each")
    return replace(found, negatives=given)


def read_prompts(path: str | os.PathLike) -> Prompts:
    """Reads a file of prompts: .jsonl with {"prompt", "negative", "seed"} in each line, the last two optional; else a text file
    with a prompt in each line. Empty lines are left out.

    Raises:
        UserError: the file cannot be read, is larger than MAX_FILE_BYTES, is not UTF-8, or has no prompt; a line of a .jsonl has
            another form.
    """
    path = local_path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes; at most {MAX_FILE_BYTES:,} are read as prompts")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a file with a prompt in each line") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None
    lines = {number: line.strip() for number, line in enumerate(text.splitlines(), 1) if line.strip()}
    if not lines:
        raise UserError(f"{path} has no prompts; give a file with a prompt in each line")
    if path.suffix != ".jsonl":
        return Prompts(tuple(lines.values()))
    entries = [_entry(line, f"line {number} of {path}") for number, line in lines.items()]
    return Prompts(
        tuple(entry["prompt"] for entry in entries),
        tuple(entry.get("negative", "") for entry in entries),
        tuple(entry.get("seed") for entry in entries),
    )


def _entry(line: str, what: str) -> dict[str, Any]:
    form = {"prompt": str, "negative": str, "seed": int}
    entry = json_object(line, what, 'write {"prompt": "a three", "seed": 7, "negative": "blurry"}', {"prompt": str})
    for name, value in entry.items():
        if name not in form:
            raise UserError(f"{what} has the entry {name!r}; a prompt has {', '.join(form)}")
        if not isinstance(value, form[name]) or isinstance(value, bool):
            raise UserError(f"{what} has {name}={value!r}, which is not {'a whole number' if name == 'seed' else 'a text'}")
    if not 0 <= entry.get("seed", 0) < 2**32:
        raise UserError(f"{what} has seed={entry['seed']}; it must lie in 0 to 2**32 - 1")
    return entry


def expander_of(text: str) -> Expander:
    """The expander of --prompt_expander: `module:function`, called with a list of prompts, or `command:...`, a program that reads
    a prompt from each line and writes a text for each, in order.

    Raises:
        UserError: another form; the module or the function cannot be imported.
    """
    kind, colon, rest = text.partition(":")
    if not colon or not kind or not rest:
        raise UserError(f"prompt_expander={text}: give module:function, or command:program with its arguments")
    if kind == "command":
        return lambda prompts: _run(shlex.split(rest), prompts)
    try:
        function = getattr(importlib.import_module(kind), rest)
    except (ImportError, AttributeError) as error:
        raise UserError(f"prompt_expander={text} cannot be imported ({error})") from None
    if not callable(function):
        raise UserError(f"prompt_expander={text} is no function")
    return function


def _run(command: list[str], prompts: list[str]) -> list[str]:
    for prompt in prompts:
        if "\n" in prompt:
            raise UserError(f"the prompt {prompt!r} has several lines, and a program gets a prompt in each; write it in one")
    try:
        done = subprocess.run(
            command, input="\n".join(prompts) + "\n", capture_output=True, timeout=EXPANDER_SECONDS, check=False, encoding="utf-8"
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError) as error:
        raise UserError(f"the prompt expander {command[0]} failed: {error}") from None
    if done.returncode:
        raise UserError(f"the prompt expander {command[0]} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout.splitlines()
