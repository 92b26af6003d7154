"""The page in a real browser: Debian's chromium, driven by selenium.

Both are optional; without them these tests are skipped, and say so.
"""

import json
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

from served_models import Served
from tiny_models import TinySpec, make_tiny_model

selenium = pytest.importorskip("selenium", reason="the page's tests need selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="the page's tests need chromium and chromium-driver"
)

HOSTILE = (
    "<img src=x onerror='document.title=1'> **bold** `co<b>de` [no](javascript:alert(1)) "
    "[yes](https://example.org/)\n\n```html\n<script>document.title = 2</script>\n```\n\n- one\n- two\n\n"
    "| a | b |\n|---|---|\n| 1 | 2 |"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tiny = make_tiny_model(tmp_path_factory.mktemp("tiny"), TinySpec(context=8192))
    with Served(tiny.path, context=8192) as served:
        yield served.ready()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,800"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, server: Served) -> Any:
    """The page with nothing kept, and short answers."""
    browser.set_window_size(1200, 800)
    browser.get(f"{server.url}/health")
    settings = {"settings": {"temperature": "0", "max_tokens": "8"}}
    browser.execute_script("localStorage.clear(); localStorage.setItem('powerinfer.v1', arguments[0])",
                           json.dumps(settings))  # fmt: skip
    browser.get_log("browser")
    browser.get(server.url)
    yield browser
    faults = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not faults
    outside = browser.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
        ".filter(name => !name.startsWith(location.origin))"
    )
    assert outside == []


def find(page: Any, selector: str) -> Any:
    return page.find_element("css selector", selector)


def texts(page: Any, selector: str) -> list[str]:
    """All at once: the page may draw anew between two questions."""
    script = "return [...document.querySelectorAll(arguments[0])].map(element => element.innerText)"
    result: list[str] = page.execute_script(script, selector)
    return result


def wait(page: Any, condition: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(page, 20, poll_frequency=0.02).until(lambda _: condition())


def answered(page: Any, count: int) -> None:
    """Wait until there are ``count`` messages and nothing is running."""
    wait(page, lambda: len(texts(page, ".message .tools button")) == 2 * count)


def ask(page: Any, text: str) -> None:
    from selenium.webdriver.common.keys import Keys

    find(page, "#input").send_keys(text, Keys.ENTER)


def test_an_answer_streams_in_and_is_kept(page: Any, server: Served) -> None:
    ask(page, "was there a boat?")
    answered(page, 2)
    expected = server.chat("was there a boat?", max_tokens=8, temperature=0)
    kept = page.execute_script("return JSON.parse(localStorage.getItem('powerinfer.v1'))")
    messages = kept["conversations"][0]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[1]["content"] == expected["choices"][0]["message"]["content"]
    assert "tok/s" in texts(page, ".message.assistant .tools")[0]
    page.refresh()
    answered(page, 2)
    assert texts(page, ".message.user .body") == ["was there a boat?"]


def test_regenerate_edit_and_a_second_conversation(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    ask(page, "one")
    answered(page, 2)
    first = texts(page, ".message.assistant .body")
    page.find_elements("css selector", ".message.assistant .tools button")[0].click()
    answered(page, 2)
    assert texts(page, ".message.assistant .body") == first
    page.find_elements("css selector", ".message.user .tools button")[0].click()
    find(page, ".edit textarea").send_keys(" and two", Keys.ENTER)
    answered(page, 2)
    assert texts(page, ".message.user .body") == ["one and two"]
    find(page, "body").send_keys(Keys.ALT, "n")
    wait(page, lambda: len(texts(page, "#conversations li")) == 2)
    assert texts(page, ".message") == []
    page.find_elements("css selector", "#conversations .open")[1].click()
    assert texts(page, ".message.user .body") == ["one and two"]


def test_escape_stops_an_answer(page: Any, server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model is slowed down, since it would end its text before a key is pressed."""
    from selenium.webdriver.common.keys import Keys

    batcher = server.service.batcher
    assert batcher is not None
    write = batcher._slots.write

    def slow(slots: Any, tokens: Any) -> Any:
        time.sleep(0.02)
        return write(slots, tokens)

    monkeypatch.setattr(batcher._slots, "write", slow)
    wait(page, lambda: page.execute_script("return document.querySelector('#max_tokens').value") == "8")
    page.execute_script(
        "const field = document.querySelector('#max_tokens'); field.value = '8000';"
        "field.dispatchEvent(new Event('change'))"
    )
    ask(page, "a long one")
    wait(page, lambda: texts(page, ".message.assistant .body") and texts(page, ".message.assistant .body")[0])
    find(page, "body").send_keys(Keys.ESCAPE)
    answered(page, 2)
    wait(page, lambda: batcher.processing == 0)
    assert texts(page, ".message.assistant .tools")[0].endswith("stopped")


def test_text_is_never_html(page: Any) -> None:
    kept = {
        "conversations": [
            {"id": "x", "title": "<b>t</b>", "messages": [
                {"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}]},
        ],
        "current": "x",
    }  # fmt: skip
    page.execute_script("localStorage.setItem('powerinfer.v1', arguments[0])", json.dumps(kept))
    page.refresh()
    answered(page, 2)
    assert page.title == "PowerInfer"
    assert page.find_elements("css selector", "#messages img, #messages script, #conversations b") == []
    links = page.find_elements("css selector", "#messages a")
    assert [link.get_attribute("href") for link in links] == ["https://example.org/"]
    assert texts(page, ".assistant strong") == ["bold"]
    assert texts(page, ".assistant p code") == ["co<b>de"]
    assert texts(page, ".assistant pre") == ["<script>document.title = 2</script>"]
    assert texts(page, ".assistant li") == ["one", "two"]
    assert texts(page, ".assistant td") == ["1", "2"]


def test_a_policy_forbids_all_but_the_servers_own_files(server: Served) -> None:
    for path in ("/", "/static/main.js"):
        response = server.http.get(f"{server.url}{path}")
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
    for path in ("/static/../app.py", "/static/..%2fapp.py", "/static/nothing.js"):
        assert server.http.get(f"{server.url}{path}").status_code == 404


def bars(page: Any, part: str) -> list[float]:
    """How high the bars of all layers are, of 120."""
    rects = page.find_elements("css selector", f"#density .{part}")
    return [float(rect.get_attribute("height")) for rect in rects]


def test_the_machine_at_work(page: Any, server: Served) -> None:
    find(page, "#tab-machine").click()
    wait(page, lambda: len(texts(page, ".tile")) == 8)
    assert any("requests waiting" in tile for tile in texts(page, ".tile"))
    server.complete("one", max_tokens=3, temperature=0)
    wait(page, lambda: texts(page, "#layers b") == ["100 %"] * 3)
    assert len(texts(page, "#layers div")) == 3
    assert bars(page, "cold") == [120.0] * 3
    assert any("weights" in bar for bar in texts(page, "#memory .bar"))


def test_dark_and_phone(page: Any) -> None:
    dark = page.execute_script("return document.documentElement.dataset.theme")
    find(page, "#theme").click()
    assert page.execute_script("return document.documentElement.dataset.theme") != dark
    page.set_window_size(400, 800)
    assert not find(page, "#sidebar").is_displayed()
    find(page, "#menu").click()
    assert find(page, "#sidebar").is_displayed()
    wide = page.execute_script("return document.documentElement.scrollWidth > innerWidth")
    assert not wide
