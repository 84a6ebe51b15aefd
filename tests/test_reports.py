"""Committed reports: every link leads somewhere, every run in them has its manifest beside it."""

import re

import pytest

from common import ROOT

REPORTS = sorted((ROOT / "reports").glob("*.md")) + [ROOT / "README.md"]


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.name)
def test_links_and_manifests_are_committed(path):
    text = path.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    missing = [link for link in links if not (path.parent / link).exists()]
    missing += [f"runs/{name}.json" for name in re.findall(r"^- `([\w.-]+)`: \d+ epochs", text, re.M)
                if not (path.parent / "runs" / f"{name}.json").exists()]  # fmt: skip
    assert not missing
