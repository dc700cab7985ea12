"""The dashboard as a person meets it: a real Streamlit server and a real Chromium."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from example_arena import arena_rows, write_arena
from example_runs import example_runs

from lshv2.runs import append_jsonl, repo_root

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]
CHART, TABLE, ERROR = ".js-plotly-plot svg.main-svg", "[data-testid=stDataFrame] canvas", "[data-testid=stException]"
PAGES = {"Overview": TABLE, "Training": CHART, "Components": CHART, "Scaling": CHART, "Arena": CHART,
         "Operator": CHART, "Settings": TABLE, "Logs": "[data-testid=stCode]"}

if CHROMIUM is None and os.environ.get("CI") != "true":
    pytest.skip("no chromium", allow_module_level=True)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address and the runs folder of a dashboard that was started as `make dashboard` does."""
    runs = example_runs(tmp_path / "runs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "dashboard/app.py", "--server.port", str(port)]
    with open(tmp_path / "server.log", "w") as log:
        process = subprocess.Popen(command, cwd=repo_root(), env={**os.environ, "LSHV2_RUNS": str(runs)}, stdout=log,
                                   stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 30
        while not _healthy(address):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "server.log").read_text()
            time.sleep(0.1)
        yield address, runs
        assert "Traceback" not in (tmp_path / "server.log").read_text()
    finally:
        process.terminate()
        process.wait(10)


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/_stcore/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_pages_draw_and_grow_by_themselves(server: tuple[str, Path]) -> None:
    from playwright.sync_api import expect, sync_playwright

    assert CHROMIUM, "CI=true and no chromium is installed: apt-get install chromium"
    address, runs = server
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(20_000)
        elsewhere: list[str] = []
        page.on("request", lambda request: elsewhere.append(request.url) if address not in request.url else None)
        page.goto(f"{address}/?runs=quick-seed-1&runs=quick")
        for title, drawn in PAGES.items():
            page.get_by_test_id("stSidebarNavLink").filter(has_text=title).click()
            expect(page.get_by_role("heading", name=title, exact=True)).to_be_visible()
            page.locator(drawn).first.wait_for()
            assert page.locator(ERROR).count() == 0, page.locator(ERROR).first.inner_text()
            assert page.url.count("runs=") == 2, "the choice of runs goes along from page to page"

        page.get_by_test_id("stSidebarNavLink").filter(has_text="Training").click()
        curve = page.locator(".st-key-chart-loss .scatterlayer path.js-line")
        page.wait_for_function("document.querySelectorAll('.st-key-chart-loss .scatterlayer path.js-line').length >= 4")
        ticks = page.locator(".st-key-chart-loss .xtick text")
        assert "1000" not in ticks.all_inner_texts()
        page.evaluate("window.loadedOnce = true")
        append_jsonl(runs / "quick-seed-1" / "metrics.jsonl", {
            "task": "language_model", "event": "train", "step": 1000, "loss_train": 2.5, "time": time.time()})
        expect(ticks.filter(has_text="1000")).to_have_count(1, timeout=8_000)
        assert curve.count() >= 4 and page.locator(ERROR).count() == 0
        assert page.evaluate("window.loadedOnce"), "the page was reloaded"

        page.get_by_test_id("stSidebarNavLink").filter(has_text="Arena").click()
        page.locator(".st-key-chart-arena-length .xtick text").filter(has_text="128k").wait_for()
        write_arena(runs / "quick", [{**arena_rows()[0], "task": "a_new_task"}])
        page.wait_for_timeout(3_000)  # a redraw and a half
        page.locator(".st-key-task input").click()
        page.get_by_role("option", name="a_new_task").click()
        expect(page.get_by_role("heading", name="a_new_task", exact=True)).to_be_visible()
        assert page.locator(ERROR).count() == 0
        assert [url for url in elsewhere if not url.startswith(("data:", "blob:", "ws://127.0.0.1"))] == []
        browser.close()
