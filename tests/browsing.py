"""The studio as a process of its own, and a Chromium to look at it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PATIENCE_MS = 240_000  # machines that test are slow and busy
SHOTS = ROOT / "out" / "studio-shots"


@contextmanager
def studio(runs: Path, *options: str) -> Iterator[str]:
    """Yield the address of a studio whose history lies in `runs`."""
    command = [sys.executable, "app.py", "--port", "0", "--runs", str(runs), *options]
    # one thread, as in every other test: two that wait for each other starve on a busy machine
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("dittools studio: http"), line
            yield line.split()[2].rstrip(",")
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a browser; fails with a remedy where no Chromium is installed."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    assert path is not None, "no chromium on the PATH: apt-get install chromium"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def open_page(browser: Any, address: str, width: int = 1280, **options: Any) -> Any:
    """Return a page of its own session that shows the studio; script errors fail the test."""
    page = browser.new_page(viewport={"width": width, "height": 900}, **options)
    page.set_default_timeout(PATIENCE_MS)
    page.on("pageerror", _fail)
    page.goto(address)
    page.locator("#gen-start").wait_for()
    return page


def _fail(error: Any) -> None:
    raise AssertionError(f"the page's script failed: {error}")


def shot(page: Any, name: str) -> Path:
    """Keep a screenshot of the whole page under out/."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    path = SHOTS / f"{name}.png"
    page.screenshot(path=path, full_page=True)
    return path


def tab(page: Any, name: str) -> None:
    """Open a tab; narrow pages keep some of them in a menu."""
    entry = page.get_by_role("tab", name=name, exact=True)
    if not entry.is_visible():
        page.locator("#dt-tabs .overflow-menu > button").first.click()
        page.locator("#dt-tabs .overflow-dropdown button", has_text=name).click()
        return
    entry.click()
