"""The page in a real browser: what a visitor does, sees, and is told. Screenshots go to build/demo/."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mmefficient.models import reference

if TYPE_CHECKING:
    from mmefficient.demo.app import Demo

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need the extra 'test'")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium, or set CHROMIUM")

SHOTS = Path(__file__).parents[2] / "build" / "demo"
SLOW = 240_000  # ms; a loaded machine answers late
WIDTHS = {"wide": (1280, 800), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, demo: Demo, request: pytest.FixtureRequest) -> Iterator[Any]:
    width, height = WIDTHS[getattr(request, "param", "wide")]
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(SLOW)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    outside: list[str] = []
    page.on(
        "request",
        lambda sent: None if sent.url.startswith((demo.address, "data:", "blob:")) else outside.append(sent.url),
    )
    page.goto(demo.address)
    page.wait_for_selector("#ask")
    yield page
    page.close()
    assert problems == []
    assert outside == [], "the page must work offline"


def upload(page: Any, path: Path) -> None:
    page.locator("input[type=file]").first.set_input_files(str(path))


def ask(page: Any, question: str) -> None:
    upload(page, reference.sample_picture())
    page.wait_for_selector("img[alt='the picture to ask about']")
    page.get_by_label("Question").fill(question)
    page.click("#ask")
    page.wait_for_function("document.querySelector('#cost-right').innerText.includes('realised')")


def choose(page: Any, label: str, plan: str) -> None:
    box = page.get_by_role("combobox", name=label)
    box.fill(plan)
    box.press("Enter")


def test_ask_under_two_plans_and_move_through_the_layers(page: Any) -> None:
    choose(page, "Right plan", "exit(layer=6)")
    ask(page, "Is there a frog in the image?")
    answers = [page.locator(f"#answer-{side} textarea").input_value() for side in ("left", "right")]
    assert all(answers)
    assert "576 in layers 0-5, 0 in layers 6-11" in page.locator("#cost-right").inner_text()
    page.wait_for_function("document.querySelector('#kept-words').innerText.includes('0 of 576')")
    slider = page.locator("#layer input[type=range]")
    slider.focus()
    for _ in range(8):  # by keyboard
        page.keyboard.press("ArrowLeft")
    page.wait_for_function("document.querySelector('#kept-words').innerText.includes('layer 3: 576 of 576')")
    assert "leaves at layer 6" in page.locator("#kept-words").inner_text()
    page.wait_for_selector("#kept img")
    page.get_by_label("attention received").check()
    page.wait_for_function("document.querySelector('#kept-words').innerText.includes('of the last row')")
    page.screenshot(path=SHOTS / "ask.png", full_page=True)


def test_a_sample_brings_its_question(page: Any) -> None:
    page.locator("button.gallery-item").nth(1).click()
    page.wait_for_selector("img[alt='the picture to ask about']")
    assert page.get_by_label("Question").first.input_value().startswith("How many")


def test_a_plan_is_built_from_fields_and_a_wrong_one_is_explained(page: Any) -> None:
    page.get_by_role("tab", name="Plan").click()
    page.get_by_label("keep").fill("0.25")
    page.click("#add")
    page.wait_for_function("document.querySelector('#verdict').innerText.includes('can be used')")
    page.screenshot(path=SHOTS / "plan.png", full_page=True)
    page.locator("#plan textarea").fill("fastv(layer=2,keep=7.5)")
    page.wait_for_function("document.querySelector('#verdict').innerText.includes('outside (0, 1]')")
    page.locator("#plan textarea").fill("exit(layer=99)")
    page.wait_for_function("document.querySelector('#verdict').innerText.includes('layers 0 to 11')")


def test_a_broken_file_is_refused_with_a_sentence(page: Any, tmp_path: Path) -> None:
    broken = tmp_path / "photo.png"
    broken.write_bytes(reference.sample_picture().read_bytes()[:500])
    upload(page, broken)
    page.get_by_label("Question").fill("What is this?")
    page.click("#ask")
    toast = page.locator("[data-testid=toast-body]").first
    toast.wait_for()
    assert "image" in toast.inner_text()
    assert str(tmp_path) not in toast.inner_text()
    assert "Traceback" not in toast.inner_text()


def test_presets_are_compared_and_a_plan_is_evaluated(page: Any) -> None:
    ask(page, "Is there a frog in the image?")
    page.get_by_role("tab", name="Compare").click()
    page.click("#compare")
    page.wait_for_selector("#comparison table")
    assert page.locator("#comparison tr").count() > 8
    page.screenshot(path=SHOTS / "compare.png", full_page=True)
    page.click("#heads")
    page.wait_for_selector("#head-maps .mm-heads")
    assert page.locator("#head-maps span").count() == 3 * 12 * 8
    page.screenshot(path=SHOTS / "heads.png", full_page=True)
    page.get_by_role("tab", name="Evaluate").click()
    page.get_by_label("Questions").first.fill("22")
    page.click("#evaluate")
    page.wait_for_selector("#evaluation table")
    page.screenshot(path=SHOTS / "evaluate.png", full_page=True)


@pytest.mark.parametrize("page", ["wide", "phone"], indirect=True)
def test_it_fits_the_window_and_every_input_has_a_label(page: Any) -> None:
    for tab in ("Ask", "Plan", "Compare", "Evaluate"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(300)
        over = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert over <= 0, f"{tab} is {over} px too wide"
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('input, textarea, select')]
            .filter(e => e.offsetParent !== null && e.type !== 'file')
            .filter(e => !(e.labels?.length || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby')))
            .map(e => e.outerHTML)"""
    )
    assert nameless == []
    page.get_by_role("tab", name="Ask").click()
    page.screenshot(path=SHOTS / f"first-{page.viewport_size['width']}.png")


def test_the_keyboard_reaches_every_control(page: Any) -> None:
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("(e => e.getAttribute('aria-label') || e.id || e.innerText)(document.activeElement)"))
    assert {"Left plan", "Right plan", "ask"} <= reached, reached
