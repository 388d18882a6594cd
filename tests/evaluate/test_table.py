import csv
import json

import pytest

from dit_jax.errors import UserError
from dit_jax.evaluate.table import table


def result(folder, name, fid, **changes):
    made_by = {"sampler": {"name": "ddim", "num_steps": 50}, "guidance": {"scale": 1.5, "channels": None}, "seed": 0}
    content = {
        "fid": fid,
        "fid_interval": [fid - 1, fid + 1],
        "num_samples": 50_000,
        "samples_sha256": "1" * 64,
        "reference_sha256": "a" * 64,
        "extractor": {"name": "inception", "weights_sha256": "c" * 64},
        "made_by": made_by,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content | changes))
    return str(path)


def test_what_differs_is_marked(tmp_path):
    """Two numbers side by side that were made with other steps or against another reference, and no word of it."""
    other = {"sampler": {"name": "ddim", "num_steps": 250}, "guidance": {"scale": 1.5}, "seed": 0}
    a, b, c = (
        result(tmp_path, "a", 9.62),
        result(tmp_path, "b|1", 3.5, made_by=other),
        result(tmp_path, "c", 2.27, reference_sha256="b" * 64),
    )
    text = table([a, b], "markdown").splitlines()
    assert text[0] == "| result | fid | steps* |" and text[2] == "| a | 9.62 [8.62, 10.62] | 50 |"
    assert text[3] == r"| b\|1 | 3.5 [2.5, 4.5] | 250 |"
    assert "reference aaaaaaaaaaaa" in text[5] and "guidance 1.5" in text[5] and not any("must not" in line for line in text)
    assert "reference*" in table([a, c], "text").splitlines()[0]
    assert "differ in reference: rows with other entries there must not be compared" in table([a, c], "text")


def test_fields_of_a_sampler_and_forecasts_are_marked(tmp_path):
    """Samples with forecast blocks, or with noise, beside others that look alike but for the number."""
    plain = {"sampler": {"name": "ddim", "num_steps": 50, "eta": 0.0}, "forecast": {"interval": 1, "order": 2}}
    other = {"sampler": {"name": "ddim", "num_steps": 50, "eta": 1.0}, "forecast": {"interval": 3, "order": 2}}
    found = table([result(tmp_path, "a", 1.0, made_by=plain), result(tmp_path, "b", 2.0, made_by=other)], "markdown")
    assert found.splitlines()[0] == "| result | fid | forecast interval* | sampler eta* |"


def test_csv_has_everything(tmp_path):
    """A spreadsheet with numbers cut to four digits, or without the protocol."""
    a, b = result(tmp_path, "a", 9.123456789), result(tmp_path, "b", 3.5, sfid=4.25)
    rows = list(csv.DictReader(table([a, b], "csv").splitlines()))
    assert rows[0]["fid"] == "9.123456789" and rows[0]["fid_low"] == "8.123456789" and rows[0]["sfid"] == ""
    assert rows[1]["sfid"] == "4.25" and rows[1]["steps"] == "50"


def test_mistakes(tmp_path):
    """A file that is no result, shown as an empty row."""
    (tmp_path / "x.json").write_text("{}")
    for path, form, text in (
        (str(tmp_path / "x.json"), "text", "not a result file"),
        ("/none.json", "text", "cannot be read"),
        (result(tmp_path, "a", 1.0), "latex", "must be one of"),
    ):
        with pytest.raises(UserError, match=text):
            table([path], form)
