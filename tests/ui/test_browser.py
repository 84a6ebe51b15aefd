"""In a real browser: a lesson in JupyterLab from the first cell to the last, and the pages at two widths.

Needs Chromium (Debian: `apt-get install chromium`); skipped where there is none. Screenshots stay in runs/screens.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest

from common import ROOT, pages

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
SCREENS = ROOT / "runs" / "screens"
LESSON = "Lab2/modelprune.ipynb"
SETTINGS = {  # all cells in the page, not only those in view; no questions about news
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
ERROR = '[data-mime-type="application/vnd.jupyter.error"]'
MINUTES = 60_000  # milliseconds


@pytest.fixture(scope="module")
def browser():
    SCREENS.mkdir(parents=True, exist_ok=True)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab of its own, on a copy of what the lesson needs: the folder, and the address."""
    folder = tmp_path_factory.mktemp("lab")
    home = folder / "workbook"
    for name in ("common", "Lab2", "reports"):
        shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, home)
    for name, told in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(told))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = dict(RUNS_DIR=str(folder / "runs"), JUPYTERLAB_SETTINGS_DIR=str(folder / "settings"))
    own |= dict(JUPYTERLAB_WORKSPACES_DIR=str(folder / "spaces"), JUPYTER_CONFIG_DIR=str(folder / "config"))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={home}"]
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail((folder / "server.log").read_text()[-2000:])
        yield home, address
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def ran(lab, browser):
    """The lesson, opened in JupyterLab, all cells run and saved: the page that shows it."""
    home, address = lab
    page = browser.new_page(viewport=dict(width=1280, height=1000))
    page.goto(f"{address}/lab/tree/{LESSON}", timeout=2 * MINUTES)
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=2 * MINUTES)
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').first.wait_for(timeout=2 * MINUTES)
    page.wait_for_timeout(2000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    prompts = page.locator(".jp-CodeCell .jp-InputPrompt")
    for _ in range(300):
        page.wait_for_timeout(1000)
        texts = [text.strip() for text in prompts.all_text_contents()]
        if "[ ]:" not in texts and "[*]:" not in texts or page.locator(ERROR).count():
            break
    else:
        page.screenshot(path=SCREENS / "not-finished.png")
        pytest.fail(f"not finished after five minutes: {texts}")
    page.wait_for_timeout(1000)
    yield page
    page.close()


def test_the_lesson_runs_to_its_end_in_jupyterlab(ran):
    assert ran.locator(ERROR).all_inner_texts() == []
    stderr = ran.locator('[data-mime-type="application/vnd.jupyter.stderr"]').all_inner_texts()
    assert not [text for text in stderr if "Traceback" in text or "Error" in text]
    assert "report:" in ran.locator(".jp-CodeCell").last.inner_text()


def test_a_slider_redraws_its_picture_in_place(ran):
    """The hand moves it one step: other numbers, another picture, of the same height; nothing beside it."""
    box = ran.locator(".widget-vbox").last
    box.scroll_into_view_if_needed()
    sentence, picture = box.locator(".widget-html-content").first, box.locator("img")
    before = sentence.inner_text(), picture.get_attribute("src"), picture.bounding_box()["height"]
    box.locator(".noUi-handle").first.focus()
    ran.keyboard.press("ArrowRight")
    sync_api.expect(sentence).not_to_have_text(before[0], timeout=10_000)
    assert "MACs" in sentence.inner_text() and picture.get_attribute("src") != before[1]
    assert picture.bounding_box()["height"] == before[2]
    ran.screenshot(path=SCREENS / "slider.png")
    ran.keyboard.press("ArrowLeft")
    sync_api.expect(sentence).to_have_text(before[0], timeout=10_000)


def test_nothing_is_clipped_in_jupyterlab(ran):
    """A table or picture that is wider than its cell would be cut off, or need a second scroll bar."""
    wide = """() => [...document.querySelectorAll(".jp-OutputArea table, .jp-MarkdownOutput table, .jp-OutputArea img")]
        .filter(e => e.getBoundingClientRect().right > e.closest(".jp-Cell").getBoundingClientRect().right + 1)
        .map(e => e.outerHTML.slice(0, 200))"""
    assert ran.evaluate(wide) == []
    assert ran.locator(".jp-OutputArea table").count() >= 3 and ran.locator(".jp-OutputArea img").count() >= 3
    words = ran.locator(".jp-OutputArea img").evaluate_all("all => all.map(e => e.alt)")
    assert len(words) >= 3
    for number, cell in enumerate(ran.locator(".jp-Cell").all()):
        if number % 8 == 0:
            cell.scroll_into_view_if_needed()
            ran.screenshot(path=SCREENS / f"jupyterlab-{number:02d}.png")


@pytest.fixture(scope="module")
def site(ran, lab, tmp_path_factory):
    """The pages, of the lesson as JupyterLab saved it."""
    path, folder = ROOT / LESSON, tmp_path_factory.mktemp("site")
    ran.get_by_role("menuitem", name="File", exact=True).click()
    ran.get_by_text("Save Notebook", exact=True).click()
    for _ in range(60):
        saved = nbformat.read(lab[0] / LESSON, as_version=4)
        if any(cell.get("outputs") for cell in saved.cells):
            break
        time.sleep(0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS_DIR", str(folder))
        told = {path: pages.lessons()[path]}
        patch.setattr(pages, "lessons", lambda: told)
        patch.setattr(pages, "execute", lambda path, scale, kept: lab[0] / LESSON)
        pages.build()
    return folder / "pages"


@pytest.mark.parametrize("width", (1100, 390))
@pytest.mark.parametrize("name", ("index.html", LESSON.replace("ipynb", "html"), "reports/lab2_experiment.html"))
def test_a_page_fits_a_screen_and_a_telephone(name, width, site, browser):
    page, asked, said = browser.new_page(viewport=dict(width=width, height=900)), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("requestfailed", lambda request: said.append(request.url))
    page.on("console", lambda message: message.type == "error" and said.append(message.text))
    page.goto(f"file://{site / name}")
    if (site / "mathjax").exists() and name.endswith("prune.html"):
        page.locator("mjx-container").first.wait_for(state="attached", timeout=MINUTES)
        assert "$$" not in page.locator("main").inner_text()
    assert not said and not [url for url in asked if not url.startswith(("file:", "data:"))], (said, asked)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
    pictures = page.locator("img").evaluate_all("all => all.map(e => [e.alt, e.naturalWidth])")
    assert pictures or name.startswith("reports")
    assert all(alt and size > 0 and "No description" not in alt for alt, size in pictures), pictures
    page.screenshot(path=SCREENS / f"{name.replace('/', '-')}-{width}.png", full_page=True)
    page.close()


def test_a_page_prints_its_code_whole(site, browser):
    page = browser.new_page()
    page.goto(f"file://{site / LESSON.replace('ipynb', 'html')}")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.querySelector('.input pre')).whiteSpace") == "pre-wrap"
    assert not page.locator("nav").is_visible()
    page.pdf(path=SCREENS / "modelprune.pdf", format="A4")
    page.close()
