"""Committed reports: every link leads somewhere, every run in them has its manifest beside it."""

import collections
import csv
import json
import re
import shutil

import pytest

from common import ROOT, config, report

READMES = [ROOT / folder / "README.md" for folder in (".", "Lab1", "Lab2", "Assignment_MobileNet", "common")]
REPORTS = sorted((ROOT / "reports").glob("*.md")) + READMES


def test_the_readme_is_one_page():
    assert (ROOT / "README.md").stat().st_size <= 6000


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_manifests_are_committed(path):
    text = path.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    missing = [link for link in links if not (path.parent / link).exists()]
    missing += [f"runs/{name}.json" for name in re.findall(r"^- `([\w.-]+)`: \d+ epochs", text, re.M)
                if not (path.parent / "runs" / f"{name}.json").exists()]  # fmt: skip
    assert not missing


TRACED = {
    "validation", "validation (n = 1)", "validation accuracy (n = 1)", "best validation accuracy", "fine-tuned",
    "test", "test, single view", "test, TTA", "top-1", "top-5", "top-1, TTA", "ours, single view", "ours, TTA",
}  # fmt: skip


def shares(value):
    """Every number of a manifest that a report may show as a percentage."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from shares(inner)
    elif isinstance(value, float) and 0 <= value <= 1:
        yield f"{value:.2%}"


def histories_lost(path):
    return path.name == "lab1_cifar100.md"  # and it says so


@pytest.mark.parametrize("path", [path for path in REPORTS if path.parent.name == "reports"], ids=lambda path: path.name)
def test_accuracies_in_tables_are_those_of_the_runs(path):
    """Each percentage of a traced column stands in a manifest, or is a mean of seeds, or an epoch of a history."""
    known, seeds = set(), collections.defaultdict(list)
    for file in (ROOT / "reports" / "runs").glob("*.json"):
        manifest = json.loads(file.read_text())
        known |= set(shares({key: manifest.get(key) for key in ("best", *report.TESTS)}))
        seeds[file.stem.rstrip("0123456789")].append(manifest)
        history = file.with_suffix(".csv")
        for row in csv.DictReader(history.open()) if history.exists() else ():
            known.add(f"{float(row['val_accuracy']):.2%}")
    for runs in seeds.values():
        for key in report.TESTS:
            values = [run[key]["accuracy"] for run in runs if key in run]
            known |= set(re.findall(r"[\d.]+%", report.mean_std(values)))
    unknown = []
    for table in re.findall(r"(?:^\|.*\n)+", path.read_text(), re.M):
        names, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
        for column, name in enumerate(names):
            if column > 0 and name in TRACED and not histories_lost(path):
                found = [number for row in rows for number in re.findall(r"\d+\.\d\d%", row[column])]
                unknown += [(name, number) for number in found if number not in known]
    assert not unknown


def test_the_index_is_made_of_the_manifests(tmp_path):
    """`reports/README.md` is what `write_index` makes of the committed files: nothing in it is edited by hand."""
    shutil.copytree(ROOT / "reports", tmp_path / "reports", ignore=shutil.ignore_patterns("figures"))
    report.write_index(tmp_path / "reports")
    assert (tmp_path / "reports" / "README.md").read_text() == (ROOT / "reports" / "README.md").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "reports").glob("*.md")), ids=lambda path: path.name)
def test_provenance_is_that_of_the_manifest(path):
    """Each line of "Where the numbers come from" agrees with its manifest."""
    for line in re.findall(r"^- `[\w.-]+`: \d+ epochs.*$", path.read_text(), re.M):
        manifest = json.loads((ROOT / "reports" / "runs" / f"{line.split('`')[1]}.json").read_text())
        config, data = manifest["config"], manifest["data"]
        for part in (
            f": {manifest['epochs']} epochs of {data['train']:,} images of {data['name']} (validation {data['val']:,})",
            f"seed {config['seed']}, {manifest['seconds'] / 60:.1f} min on ",
            f"commit `{manifest['commit']}`",
        ):
            assert part in line


def test_every_run_beside_the_reports_is_named_somewhere():
    """By a report, a lesson, a comparison or a study; others belong into `reports/runs/earlier/`."""
    places = [*(ROOT / "reports").glob("l*.md"), *(ROOT / "reports").glob("a*.md"), ROOT / "reports" / "published.json"]
    places += [*(ROOT / "reports" / "history").glob("*.md"), *ROOT.glob("Lab?/*.ipynb"), *ROOT.glob("Assignment*/*.ipynb")]
    text = "\n".join(path.read_text() for path in places)
    studies = [config.read_study(path) for path in ROOT.glob("*/*.yaml") if path.name.startswith(("study", "experiment"))]
    planned = {f"{study.name}-{key.replace('/', '-')}" for study in studies for key in study.runs}
    names = {path.stem for path in (ROOT / "reports" / "runs").glob("*.json")} - planned
    assert names and not [name for name in names if not re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", text)]
