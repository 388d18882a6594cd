"""The pages in headless Chromium, as wide as a desk and as a phone: the demo, the report of a run and of a sweep."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import tiny
from finished_run import write_run
from finished_sweep import SWEEP, write_finished
from runs import save_run
from verbs import ROOT, command, environment

import dit_jax
from dit_jax import recipes
from dit_jax.report import page as run_report
from dit_jax.sweep import report as sweep_report

pytestmark = [pytest.mark.slow, pytest.mark.browser]
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
LOCAL = ("data:", "file:", "http://127.0.0.1:")
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60_000  # in ms, of a wait: the first drawing compiles


def missing(text):
    """Skips, or fails where .ci/run asks for a browser."""
    (pytest.fail if os.environ.get("DIT_JAX_REQUIRE_BROWSER") else pytest.skip)(text)


@pytest.fixture(scope="module")
def chromium():
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        missing("no Chromium is installed; apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("pip install playwright")
    arguments = ["--no-sandbox"] if os.getuid() == 0 else []  # root has no sandbox
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@contextmanager
def opened(chromium, url, size=DESK, scheme="light", refusals=0):
    """A page in a profile of its own, which fetches nothing from elsewhere and says nothing in its console.

    refusals: requests that the server refuses, which the browser reports there.
    """
    said, context = [], chromium.new_context(viewport=size, color_scheme=scheme, has_touch=size is PHONE)
    context.set_default_timeout(SECONDS)
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(LOCAL) else said.append(request.url))
    page.goto(url)
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], "the page scrolls sideways"
    context.close()
    assert len(said) == refusals and all("status of 400" in text for text in said), said


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with a random network."""
    path = tmp_path_factory.mktemp("browser") / "digits"
    save_run(path, tiny.config(model__depth=1, process=recipes.flow(), sampler=recipes.default_sampler("euler")), 0)
    return path


@pytest.fixture(scope="module")
def demo(workdir):
    """The address of a demo. At its end it is stopped as by Ctrl-C, and says what it did."""
    args = command("demo", f"--workdir={workdir}", "--port=0", "--max_images=20")
    process = subprocess.Popen(args, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    found = next((re.search(r"open (http://127\.0\.0\.1:\d+/)", line) for line in process.stderr if "open http" in line), None)
    assert found, process.communicate()
    threading.Thread(target=process.stderr.read, daemon=True).start()
    yield found[1]
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    done = json.loads(stdout.splitlines()[-1])
    assert process.returncode == 0 and done["step"] == 1 and done["images"] > 0, (process.returncode, stdout)


@pytest.fixture(scope="module")
def wanted(workdir):
    """What the library draws with the settings of `test_the_demo`."""
    pipe = dit_jax.load(workdir)
    return pipe([3], num_samples=3, sampler="heun", num_steps=4, guidance_scale=1.5, seed=7).images


def draw(page, **fields):
    """Fills the form, draws, and returns the newest images of the gallery."""
    before = page.locator("#gallery article").count()
    page.locator("#draw:enabled").wait_for()
    for name, value in fields.items():
        field = page.locator(f"#field-{name}")
        field.select_option(value) if name in ("sampler", "labels") else field.fill(str(value))
    page.get_by_role("button", name="Draw").click()
    page.locator("#gallery article").nth(before).wait_for()
    return page.locator("#gallery article").first.locator("img")


def pixels(page, images):
    """What the page shows of each image: [[grey]]."""
    code = """images => Promise.all(images.map(async image => {
        image.loading = "eager"; await image.decode();
        const canvas = document.createElement("canvas"); canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
        const context = canvas.getContext("2d"); context.drawImage(image, 0, 0);
        return [...context.getImageData(0, 0, canvas.width, canvas.height).data].filter((_, i) => i % 4 == 0);
    }))"""
    return images.evaluate_all(code)


@pytest.mark.parametrize("size, scheme", [(DESK, "light"), (PHONE, "dark")], ids=["desk", "phone"])
def test_the_demo(chromium, demo, wanted, tmp_path, size, scheme):
    """Catches a page that cannot be used by its labels, its keys or on a phone; images that are not those of the library."""
    with opened(chromium, demo, size, scheme, refusals=1) as page:
        page.locator("#draw:enabled").wait_for()
        assert page.title().startswith("digits") and "DiT depth 1" in page.locator("#network").inner_text()
        page.locator("#field-labels").focus()
        page.keyboard.press("Tab")  # the first class
        for _ in range(3):
            page.keyboard.press("Tab")
        page.keyboard.press("Space")
        assert page.locator("#field-labels").input_value() == "chosen"
        images = draw(page, num_images=3, sampler="heun", num_steps=4, guidance_scale=1.5, seed=7)
        assert images.count() == 3 and images.first.get_attribute("alt") == "Image 0: 3"
        assert images.first.evaluate("x => getComputedStyle(x).imageRendering") == "pixelated"
        box = images.first.bounding_box()
        assert box["width"] >= 60 and abs(box["width"] - box["height"]) < 1
        shown = np.asarray(pixels(page, images), np.uint8).reshape(3, 8, 8, 1)
        assert np.abs(shown.astype(int) - wanted.astype(int)).max() <= 1 and wanted.std() > 5

        article = page.locator("#gallery article").first
        assert "3 images, heun, 4 steps, guidance 1.5, seed 7" in article.inner_text()
        with page.expect_download() as download:
            article.get_by_text("All as npz").click()
        download.value.save_as(tmp_path / "x.npz")
        with np.load(tmp_path / "x.npz") as file:
            assert (file["arr_0"] == shown).all() and file["labels"].tolist() == [3, 3, 3]
        with page.expect_download() as download:
            article.get_by_label("Download image 1, 3").click()
        assert download.value.suggested_filename == "seed7_1.png"

        page.locator("#field-num_steps").fill("5000")
        page.get_by_role("button", name="Draw").click()
        page.get_by_text("num_steps=5000 is out of range").wait_for()
        page.locator("#field-sampler").select_option("euler")
        page.get_by_role("button", name="Use these settings again").click()
        assert [page.locator(f"#field-{name}").input_value() for name in ("sampler", "num_steps", "seed")] == ["heun", "4", "7"]
        assert page.locator("#error").inner_text() == "" and page.locator(".classes input:checked").count() == 1
        page.reload()
        page.locator("#gallery article").wait_for()
        assert pixels(page, page.locator("#gallery img")) == shown.reshape(3, 64).tolist()
        page.get_by_label("Remove these images").click()
        assert page.locator("#empty").is_visible()


def test_live_images_and_two_clients(chromium, demo):
    """Catches images that appear only at the end, or on the other client's page; a client that does not learn that it waits."""
    with opened(chromium, demo) as one, opened(chromium, demo, PHONE) as other:
        for page, seed in ((one, 1), (other, 2)):
            page.locator("#draw:enabled").wait_for()
            page.locator("#field-sampler").select_option("sde")
            for name, value in {"num_steps": 1000, "num_images": 20, "seed": seed}.items():
                page.locator(f"#field-{name}").fill(str(value))
            page.get_by_role("button", name="Draw").click()
        other.get_by_text("1 drawing comes before yours").wait_for()
        one.locator("#live figure:not(.waiting) img").first.wait_for()
        assert one.locator("#live img").first.get_attribute("src").startswith("data:image/png")
        assert one.evaluate("document.documentElement.scrollWidth") <= DESK["width"]
        for page in (one, other):
            page.locator("#gallery article").wait_for()
        first, second = (pixels(page, page.locator("#gallery img")) for page in (one, other))
        assert len(first) == len(second) == 20 and first != second
        assert pixels(one, draw(one, num_steps=1000, num_images=20, seed=2)) == second

        one.locator("#field-seed").fill("3")
        one.get_by_role("button", name="Draw").click()
        one.get_by_role("button", name="Cancel").click()
        one.get_by_text("Cancelled.").wait_for()
        assert one.locator("#gallery article").count() == 2


@pytest.mark.parametrize("size, scheme", [(DESK, "dark"), (PHONE, "light")], ids=["desk", "phone"])
def test_reports(chromium, run_page, sweep_page, size, scheme):
    """Catches pictures that do not load, text that is wider than a phone, and colours that do not follow the browser."""
    for page_file in (run_page, sweep_page):
        with opened(chromium, page_file.as_uri(), size, scheme) as page:
            assert page.locator("h1").is_visible() and page.locator("figure").count() >= 3
            assert page.locator("img").evaluate_all("all => all.every(x => x.complete && x.naturalWidth > 0)")
            ink, paper = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
            light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
            assert (light[0] > light[1]) == (scheme == "dark")


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    return run_report.write(write_run(tmp_path_factory.mktemp("report") / "run", True))


@pytest.fixture(scope="module")
def sweep_page(tmp_path_factory):
    folder, runs, costs = write_finished(tmp_path_factory.mktemp("sweep"))
    sweep_report.write(SWEEP, "configs/sweeps/digits.py", runs, costs, folder, "python -m dit_jax.sweep --sweep='x'")
    return folder.path / "report.html"
