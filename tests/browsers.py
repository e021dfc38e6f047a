"""Headless Chromium, where one is installed."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def chromium(*options: str) -> Iterator[Any]:
    """A browser of playwright; skips the test where there is no playwright or no Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the tests of pages need playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    binary = next((found for name in names if (found := shutil.which(name))), None)
    if binary is None:
        pytest.skip("no Chromium on this machine")
    quiet = ["--no-sandbox", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=binary, args=[*quiet, *options])
        yield browser
        browser.close()
