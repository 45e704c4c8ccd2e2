"""The page at /, in a real browser: it chats, it shows the steps, it fits on a phone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.serving.house import MODEL, engine, tokenizer

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
SCREENSHOTS = os.environ.get("FASTGEN_SCREENSHOTS")  # folder that gets them, for a look by eye
SIZES = {"desktop": (1200, 800), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"none of these browsers is installed: {', '.join(BROWSERS)}")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("size", SIZES)
def test_it_chats_and_shows_what_the_engine_does(browser, url, size):
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(url)
    page.get_by_text("ready").wait_for()
    assert page.locator("h1").inner_text() == MODEL
    page.get_by_label("Message").fill("Hi")
    page.get_by_label("Message").press("Enter")
    page.wait_for_function("document.querySelector('#send').textContent === 'Send' && "
                           "document.querySelector('.assistant').textContent.length > 0")
    ids = tokenizer().encode("u:Hi\na:", add_special_tokens=False)
    room = engine().config.max_context_len - len(ids)
    shown = page.locator(".assistant").inner_text()
    assert 0 < len(shown) <= room  # a token is a character
    page.wait_for_function("steps.length > 5 && document.querySelector('#step').textContent !== '–'")
    painted = page.evaluate("""() => { const c = document.querySelector('#steps');
        return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(x => x > 0); }""")
    assert painted
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
    assert errors == []
    page.get_by_text("8 prompts at once").click()  # most of them are too long for this model, and it says so
    page.wait_for_function("document.querySelector('#crowded').textContent.includes('of 8 answered')")
    assert "max_context_len" in page.locator("#crowded").inner_text()
    page.locator("#steps").hover(position={"x": 1, "y": 60})
    page.wait_for_function("document.querySelector('#detail').textContent.startsWith('step ')")
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"{size}.png", full_page=True)
    page.close()
    assert all("400 (Bad Request)" in error for error in errors)
