"""What can one read without running anything? Executed lessons and reports, as HTML.

Pages stand in $RUNS_DIR/pages as their sources do in the repository, and load nothing from
elsewhere: `python -m common.course pages`.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import jinja2
import nbformat
from bs4 import BeautifulSoup
from markupsafe import Markup
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

from common import ROOT, WorkbookError, choose, folder_from, write_file
from common.params import SCALES, read_yaml

LABS = ("Lab1", "Lab2", "Assignment_MobileNet")
LAB_PAGES = [
    (name, f"{lab}/README.html") for name, lab in zip(("Lab 1", "Lab 2", "Assignment"), LABS)
]
SITE = Path(__file__).parent / "site"
WIDGET = "application/vnd.jupyter.widget-view+json"
MATHJAX = "mathjax@3.2.2"  # draws formulas; under the Apache licence
MATHJAX_SHA256 = "d4295dc33744836935c1399feece5159577b34c5c8ffb9f1c6324cd82e03a882"


def lessons() -> dict:
    """Path of each lesson → what its lab's settings.yaml says; in the order of the course."""
    labs = [ROOT / lab for lab in LABS]
    told = [(lab, read_yaml(lab / "settings.yaml")) for lab in labs]
    return {lab / f"{name}.ipynb": about for lab, each in told for name, about in each.items()}


def texts() -> list:
    """Paths of the Markdown files that become pages: of the labs, and all reports."""
    found = [ROOT / lab / "README.md" for lab in LABS]
    return (
        found
        + sorted((ROOT / "reports").glob("*.md"))
        + sorted((ROOT / "reports").glob("history/*.md"))
    )


def repository(text: str | None = None) -> tuple:
    """Address and release tag of the repository, from pyproject.toml; empty where not known."""
    text = text or (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    address = re.search(r"^Repository *= *[\"'](.*)[\"']", text, re.M)
    tag = re.search(r"^Release *= *[\"'].*/tree/(.*)[\"']", text, re.M)
    return address[1] if address else "", tag[1] if tag else ""


def build(scale: str = "quick") -> None:
    """Run the lessons that changed since they were last run, and write all pages and the index.

    Raises WorkbookError, after the others are done, where a lesson fails.
    """
    choose("scale", scale, SCALES)
    site, failed, cards = folder_from("RUNS_DIR", "runs") / "pages", [], []
    formulas = mathjax(site)
    style = (SITE / "style.css").read_text(encoding="utf-8")
    write_file(site / "style.css", style + HtmlFormatter().get_style_defs(".highlight"))
    told, others, ran = lessons(), texts(), {}
    for path in told:
        try:
            ran[path] = execute(path, scale, site.with_name("executed"))
        except WorkbookError as error:
            failed.append(str(error))
    known = {*ran, *others}
    for path, executed in ran.items():
        notebook = nbformat.read(executed, as_version=4)
        write_file(site / path.relative_to(ROOT), path.read_bytes())
        write_page(site, path, notebook, known, formulas, neighbours(path, list(ran)))
        cards.append(card(site, path, notebook, told[path]))
    for path in others:
        cell = nbformat.v4.new_markdown_cell(path.read_text(encoding="utf-8"))
        write_page(site, path, nbformat.v4.new_notebook(cells=[cell]), known, formulas)
    index = dict(title="CIFAR Workbook", root="", links=LAB_PAGES)
    write_file(site / "index.html", render(**index, cards=cards, scale=scale))
    print(f"{site / 'index.html'}: {len(cards)} lessons, {len(others)} other pages")
    if failed:
        raise WorkbookError("\n".join(failed))


def execute(path: Path, scale: str, kept: Path) -> Path:
    """Run a lesson in an empty folder of runs; kept while it, its lab and common/ are the same."""
    used = [path, *path.parent.glob("*.yaml"), *path.parent.glob("*.py")]
    rooms = (ROOT / "common").rglob("*.py")
    used += [room for room in rooms if room.stem not in ("course", "doctor", "pages")]
    digest = hashlib.sha256(b"".join(each.read_bytes() for each in sorted(used))).hexdigest()[:12]
    target = kept / f"{path.stem}-{scale}-{digest}.ipynb"
    if target.exists():
        return target
    kept.mkdir(parents=True, exist_ok=True)
    began, name = time.monotonic(), path.relative_to(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder, "draft.ipynb")
        command = [sys.executable, "-m", "papermill", str(path), str(draft), "--no-progress-bar"]
        if scale != "quick":
            command += ["-p", "scale", scale]
        own = os.environ | dict(RUNS_DIR=folder)
        done = subprocess.run(command, env=own, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise WorkbookError(f"{name} failed: {last}")
        text = draft.read_text(encoding="utf-8")
        write_file(target, text.replace(json.dumps(folder)[1:-1], "runs"))
    for old in kept.glob(f"{path.stem}-{scale}-*.ipynb"):
        if old != target:
            old.unlink()
    print(f"{name}: ran in {time.monotonic() - began:.0f} s")
    return target


def mathjax(site: Path) -> bool:
    """Put a copy of MathJax beside the pages; False, and a line, where npm cannot fetch it."""
    file = site / "mathjax" / "tex-svg.js"
    if file.exists():
        return True
    try:
        with tempfile.TemporaryDirectory() as folder:
            call = [shutil.which("npm") or "npm", "pack", MATHJAX]
            subprocess.run(call, cwd=folder, check=True, capture_output=True, timeout=300)
            with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
                names = ("es5/tex-svg.js", "LICENSE")
                script, licence = [archive.extractfile(f"package/{name}").read() for name in names]
        if hashlib.sha256(script).hexdigest() != MATHJAX_SHA256:
            raise ValueError("it is not the one this workbook was tried with")
        write_file(file.with_name("LICENSE"), licence)
        write_file(file, script)
        return True
    except (OSError, ValueError, subprocess.SubprocessError, tarfile.TarError) as error:
        print(f"formulas stay as they are written: npm cannot fetch {MATHJAX} ({error})")
        return False


def render(**told) -> str:
    template = (SITE / "page.html").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True).from_string(template).render(**told) + "\n"


def neighbours(path: Path, order: list) -> list:
    """Links of a lesson's page: to the lessons before and after it, and to its file."""
    at, found = order.index(path), []
    for label, other in (("Previous", at - 1), ("Next", at + 1)):
        if 0 <= other < len(order):
            found.append((label, os.path.relpath(page_of(order[other]), path.parent)))
    return [*found, ("Download", path.name)]


def page_of(path: Path) -> Path:
    return path.with_suffix(".html")


def write_page(site: Path, path: Path, notebook, known: set, formulas: bool, links=()) -> None:
    """Write the page of a notebook; what it links to of the repository goes beside it.

    `known`: the sources of all pages. The first code cell, and widgets, which need a kernel, are
    left out.
    """
    cells = [cell for cell in notebook.cells if "common.enter(homes" not in cell.source]
    notebook = nbformat.from_dict(notebook | dict(cells=cells))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if WIDGET not in each.get("data", ())]
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(notebook)
    soup = BeautifulSoup(body, "html.parser")
    for badge in soup.select("a > img[src*='colab-badge']"):
        badge.replace_with(badge["alt"])
    for kind, key in (("a", "href"), ("img", "src")):
        for element in soup.select(f"{kind}[{key}]"):
            follow(element, key, path, site, known)
    name = path.relative_to(ROOT)
    heading = soup.find("h1")
    title = heading.get_text().rstrip("¶") if heading else path.stem
    root = "../" * (len(name.parts) - 1)
    told = dict(
        title=title,
        root=root,
        links=links,
        body=Markup(str(soup)),
        formulas=formulas and "$" in body,
    )
    write_file(site / page_of(name), render(**told))


def follow(element, key: str, path: Path, site: Path, known: set) -> None:
    """Lead a link to a page, or to a copy of the file it names; what is neither is text."""
    address = urlsplit(element[key])
    if key == "src" and address.netloc:  # a page loads nothing from elsewhere
        element.replace_with(element.get("alt", ""))
        return
    if address.scheme or not address.path:
        return
    target = Path(os.path.normpath(path.parent / unquote(address.path)))
    if target in known:
        element[key] = page_of(Path(address.path)).as_posix() + element[key][len(address.path) :]
    elif target.is_relative_to(ROOT) and target.is_file():
        write_file(site / target.relative_to(ROOT), target.read_bytes())
    else:
        element.unwrap()


def card(site: Path, path: Path, notebook, about: dict) -> dict:
    """What the index says about a lesson; its first picture is written beside its page."""
    name = path.relative_to(ROOT)
    question = re.search(r"\*\*Question\.\*\* (.*?)(?= \*\*|\n|$)", notebook.cells[0].source)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    picture = name.with_suffix(".png") if pictures else None
    if picture:
        write_file(site / picture, base64.b64decode(pictures[0].data["image/png"]))
    minutes = {scale: about[scale]["minutes"] for scale in ("quick", "laptop")}
    minutes = {k: v if isinstance(v, str) else f"{v:g} min" for k, v in minutes.items()}
    return dict(
        title=notebook.cells[0].source.splitlines()[0].lstrip("# "),
        question=question[1].replace("*", "") if question else "",
        target=page_of(name).as_posix(),
        picture=picture and picture.as_posix(),
        alt=pictures[0].metadata.get("image/png", {}).get("alt") if pictures else "",
        **minutes,
    )
