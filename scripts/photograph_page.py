"""Photograph the page of a running server for the docs: chat, phone (dark), and the machine at work.

    powerinfer serve -m MODEL &
    python scripts/photograph_page.py http://127.0.0.1:8080 docs/pictures

Needs selenium, chromium and chromium-driver.
"""

import json
import shutil
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

QUESTION = "Write a Python function that reverses a string, and say in one sentence how it works."


def browser() -> Any:
    """A window of chromium without a screen."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,800"):
        options.add_argument(argument)
    return webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))


def keep_busy(url: str) -> None:
    """Three users who ask in the background."""
    body = b'{"prompt": "The old road to the harbour", "max_tokens": 400, "ignore_eos": true}'
    for _ in range(3):
        request = urllib.request.Request(f"{url}/v1/completions", body)  # noqa: S310  the page's own server
        threading.Thread(target=urllib.request.urlopen, args=(request,), daemon=True).start()


def main() -> None:
    """Take all pictures."""
    url, folder = sys.argv[1], Path(sys.argv[2])
    page = browser()
    page.get(url)
    kept = json.dumps({"settings": {"temperature": "0", "max_tokens": "160"}})
    page.execute_script("localStorage.setItem('powerinfer.v1', arguments[0])", kept)
    page.get(url)
    field = page.find_element("css selector", "#input")
    field.send_keys(QUESTION, "\n")
    while len(page.find_elements("css selector", ".message .tools button")) < 4:
        time.sleep(0.2)
    page.save_screenshot(str(folder / "serve-chat.png"))
    page.set_window_size(1200, 1150)
    page.find_element("css selector", "#tab-machine").click()
    keep_busy(url)
    time.sleep(6)
    page.save_screenshot(str(folder / "serve-machine.png"))
    page.find_element("css selector", "#tab-chat").click()
    page.execute_script(
        "document.documentElement.dataset.theme === 'dark' || document.querySelector('#theme').click()"
    )
    page.set_window_size(420, 800)
    page.save_screenshot(str(folder / "serve-phone.png"))
    page.quit()


if __name__ == "__main__":
    main()
