"""How does a course leave this house? First cells and badges; pages to read without running.

`python -m common.course badges`, `python -m common.course pages`.
"""

import json
import re
import subprocess
import sys

import tyro

from common import ROOT, WorkbookError, classroom, pages, write_file

FIRST_CELL = """\
import os  # This cell finds the workbook, or clones it; it is the same in all lessons.
import sys

source = os.environ.get("WORKBOOK_REPOSITORY", "{source}")
new, mark = "cifar-workbook", os.path.join("common", "lesson.py")
places = [".", "..", "../..", "../../..", *sorted(os.listdir()), *sys.path]
homes = [os.path.abspath(p) for p in places if os.path.isfile(os.path.join(p, mark))]
if not homes:
    said = os.popen(f"git clone -q --depth 1 {{source}} {{new}} 2>&1").read().split()
    assert os.path.isfile(f"{{new}}/{{mark}}"), f"put the repository here: {{' '.join(said)}}"
sys.path.insert(0, os.path.abspath([*homes, new][0]))
import common

assert hasattr(common, "enter"), f"restart the kernel: {{common}} is another package"
common.enter(homes, source)"""
BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)\n\n")
COLAB = "https://colab.research.google.com"
GITHUB = re.compile(r"https://github\.com/[\w-]+/[\w.-]+?(?=(\.git)?/?$)")


def badges(tag: str | None = None) -> None:
    """Write the address of the repository into every lesson: its badge, and its first cell.

    The address stands in pyproject.toml under [project.urls]; where there is none, a public one
    at github.com is taken from git. `tag` is the release they lead to; "" is none any more.
    """
    file = ROOT / "pyproject.toml"
    text = file.read_text(encoding="utf-8")
    address, old = pages.repository(text)
    if not address:
        call = ["git", "remote", "get-url", "origin"]
        origin = subprocess.run(call, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        address = found[0] if (found := GITHUB.match(origin)) else ""
    elif not GITHUB.fullmatch(address):
        problem = "Repository in pyproject.toml is no public address at github.com"
        raise WorkbookError(f"{problem}; write one, as in https://github.com/owner/name")
    tag = old if tag is None else tag
    if tag and (not re.fullmatch(r"\w[\w.-]*", tag, re.ASCII) or ".." in tag):
        raise WorkbookError(f"tag={tag!r} is not legal; give the name of a release, as v1.0")
    if address:
        write_file(file, with_urls(text, address, tag))
    for path in pages.lessons():
        before = path.read_text(encoding="utf-8")
        after = addressed(before, path.relative_to(ROOT).as_posix(), address, tag)
        if after != before:
            write_file(path, after)
    to = f"{address} {tag}".strip()
    print(f"badges and first cells lead to {to}" if to else "no address at github.com: no badges")


def with_urls(project: str, address: str, tag: str) -> str:
    """The text of pyproject.toml with the repository's address and release; other urls stay."""
    own = f'Repository = "{address}"\n'
    own += f'Release = "{address}/tree/{tag}"\n' if tag else ""
    project = re.sub(r"^(Repository|Release) *=.*\n", "", project, flags=re.M)
    if "\n[project.urls]\n" not in project:
        project = project.replace("\n[tool.", "\n[project.urls]\n\n[tool.", 1)
    return project.replace("\n[project.urls]\n", f"\n[project.urls]\n{own}", 1)


def addressed(notebook: str, name: str, address: str, tag: str) -> str:
    """The text of a notebook with its badge and its first cell; without address, no badge."""
    told = json.loads(notebook)
    source = f"--branch {tag} {address}" if tag else address or "address-not-known"
    link = f"{COLAB}/github/{address.partition('github.com/')[2]}/blob/{tag or 'main'}/{name}"
    badge = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({link})\n\n" if address else ""
    title, _, rest = "".join(told["cells"][0]["source"]).partition("\n\n")
    told["cells"][0]["source"] = f"{title}\n\n{badge}{BADGE.sub('', rest)}".splitlines(True)
    for cell in told["cells"]:
        if "common.enter(homes, source)" in "".join(cell["source"]):
            cell["source"] = FIRST_CELL.format(source=source).splitlines(True)
    return json.dumps(told, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    try:
        tyro.extras.subcommand_cli_from_dict(
            {
                "badges": badges,
                "pages": pages.build,
                "student": tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(classroom.student),
                "grade": tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(classroom.grade),
            },
            prog="python -m common.course",
        )
    except WorkbookError as error:
        sys.exit(f"error: {error}")
