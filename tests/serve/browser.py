"""A headless Chromium for tests of the web page: the system's own, since nothing is downloaded here."""

import os
import shutil
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WHAT_TO_DO = "the page's tests need Chromium (Debian: apt-get install chromium) and playwright (pip install playwright)"


@contextmanager
def chromium(*flags):
    """Start it. Where there is none the tests are skipped, but not in CI: there somebody has to hear of it."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        path = None
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(WHAT_TO_DO)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(flags))
        yield browser
        browser.close()
