"""Prompts of samples: texts, files and expanders."""

import sys

import numpy as np
import pytest

from dit_jax.errors import UserError
from dit_jax.sample.prompts import Prompts, expander_of, prompts_of, read_prompts


def test_a_text_file_has_a_prompt_in_each_line(tmp_path):
    """Catches a byte order mark or an empty line that becomes part of a prompt."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa thrée\r\n\n  two cats \n".encode())
    assert read_prompts(file) == Prompts(("a thrée", "two cats"))


def test_a_jsonl_file_has_seeds_and_negative_prompts(tmp_path):
    """Catches seeds that are moved to another prompt: image k of a seed must be image 0 of that seed alone."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "seed": 7}\n\n{"prompt": "b", "negative": "blurry"}\n')
    prompts = read_prompts(file)
    assert prompts == Prompts(("a", "b"), ("", "blurry"), (7, None))
    keys = prompts.keys(3)
    np.testing.assert_array_equal(keys["seed"], [7, 3])
    np.testing.assert_array_equal(keys["number"], [0, 1])
    assert prompts.requests()["negative"].tolist() == ["", "blurry"]
    assert Prompts(("a",)).keys(3) == {} and "negative" not in Prompts(("a",)).requests()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.txt", b"a\xff\n", "is not UTF-8"),
        ("x.txt", b"\n \n", "has no prompts"),
        ("x.jsonl", b'{"prompt": 3}\n', "line 1"),
        ("x.jsonl", b'{"prompt": "a", "sed": 3}\n', "entry 'sed'"),
        ("x.jsonl", b'{"prompt": "a", "seed": -1}\n', "seed=-1"),
        ("x.jsonl", b'{"prompt": "a", "seed": true}\n', "whole number"),
        ("x.jsonl", b"[]\n", "line 1"),
    ],
)
def test_other_files_of_prompts_are_refused(tmp_path, name, content, said):
    """Catches a damaged file that is read as prompts of another meaning, or ends in a stack trace."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_prompts(tmp_path / name)


def test_prompts_are_repeated_in_turn_and_not_with_seeds():
    """Catches the same image drawn twice, and negative prompts that get out of step."""
    prompts = prompts_of(["a", "b"], ["x", "y"]).repeated(5)
    assert prompts.texts == ("a", "b", "a", "b", "a") and prompts.negatives == ("x", "y", "x", "y", "x")
    with pytest.raises(UserError, match="num_samples=3"):
        Prompts(("a",), seeds=(4,)).repeated(3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([],), "no prompt"),
        (([3],), "is no text"),
        ((["a", "b", "c"], ["x", "y"]), "2 negative prompts for 3"),
        ((Prompts(("a",), ("x",)), "y"), "leave negative_prompt out"),
        (("\ud800",), "not UTF-8"),
    ],
)
def test_other_prompts_are_refused(arguments, said):
    """Catches values that fail later, in the tokenizer or in the file of samples."""
    with pytest.raises(UserError, match=said):
        prompts_of(*arguments)


def test_expanders(tmp_path, monkeypatch):
    """Catches an expander whose texts are put to other prompts, and a program whose failure is taken for texts."""
    (tmp_path / "my_expander.py").write_text("def longer(prompts):\n    return [f'a photo of {p}' for p in prompts]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    prompts = Prompts(("a", "b")).expanded(expander_of("my_expander:longer"))
    assert prompts.texts == ("a photo of a", "a photo of b") and prompts.asked == ("a", "b")
    assert prompts.stored() == {"captions": prompts.texts, "prompts": ("a", "b")}
    program = f"command:{sys.executable} -c 'import sys; [print(x.strip() + \"!\") for x in sys.stdin]'"
    assert Prompts(("ä", "b")).expanded(expander_of(program)).texts == ("ä!", "b!")
    for text, said in (
        ("my_expander", "give module:function"),
        ("my_expander:shorter", "cannot be imported"),
        ("command:/no/such/program", "failed"),
        (f"command:{sys.executable} -c 'import sys; sys.exit(3)'", "ended with 3"),
        (f"command:{sys.executable} -c 'print(1)'", "1 values for 2 prompts"),
    ):
        with pytest.raises(UserError, match=said):
            Prompts(("a", "b")).expanded(expander_of(text))
