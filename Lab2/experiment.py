"""Lab 2's experiment: trains what is missing of `experiment.yaml`, and reports it.

`python Lab2/experiment.py`, the same command again to go on; `--report` trains nothing.
"""

import contextlib
import functools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import (
    WorkbookError,
    choose,
    cli,
    data,
    measure,
    models,
    report,
    runs,
    write_file,
)
from common.cli import folder_of
from common.config import Study, read_study
from common.evaluate import paired

FILE = Path(__file__).with_suffix(".yaml")
load = functools.lru_cache(data.load)
COLUMNS = "run", "state", "PMACs", "in all", "minutes", "params", "macs", "validation"


def run_all(study: Study, only_report: bool = False) -> None:
    """Train what is missing of a study, one run after the other, and record each run.

    All runs of the first seeds come first; one that fails does not stop the others.
    The report is written after each run.
    """
    for each in study.more.get("comparisons", ()):
        for side in "ab":
            choose("configuration to compare", each.get(side), study.about)
    failed, keys = [], sorted(study.runs, key=lambda key: study.runs[key]["seed"])
    for key in [] if only_report else keys:
        settings, folder = study.runs[key], folder_of(study.name, key)
        try:
            split = load(settings["dataset"], settings.get("val"))
            cli.start(settings, split, folder)
            if not runs.is_recorded(folder.name):
                told = study.about[key.split("/")[0]]
                report.record(
                    folder.name, split, settings["seed"] in told.get("weights", ())
                )
                write_experiment(study)
        except WorkbookError as error:
            failed.append(key)
            print(f"{key} failed: {error}")
    write_experiment(study)
    if failed:
        raise WorkbookError(
            f"{', '.join(failed)} failed, see above; the same command tries again"
        )


def write_experiment(study: Study) -> None:
    """Write `reports/<study>_experiment.md`: what is done, open, and found."""
    found, done = {}, {}
    for key in study.runs:
        name = folder_of(study.name, key).name
        with contextlib.suppress(WorkbookError):  # it has not begun
            found[key] = runs.load_manifest(name)
        if runs.is_recorded(name):
            done[key] = found[key] = runs.read_manifest(runs.recorded(name, "run.json"))
    spent = {key: study.about[key.split("/")[0]].get("pmacs", 0) for key in study.runs}
    hours = sum(manifest["seconds"] for manifest in done.values()) / 3600
    left = hours * (
        sum(spent.values()) / max(sum(spent[key] for key in done), 1e-9) - 1
    )
    state = f"{len(done)} of {len(study.runs)} runs are done"
    state += (
        f"; at their pace the others take {left:.1f} hours of training."
        if left > 0
        else "."
    )
    rows = [experiment_row(study, key, found.get(key)) for key in study.runs]
    answers = [
        compare(study, done, **each) for each in study.more.get("comparisons", ())
    ]
    purposes = [
        f"- **{k}**: {told['why']}" for k, told in study.about.items() if "why" in told
    ]
    more, sources = study.more, "\n".join(map(report.provenance, done.values()))
    parts = [f"# {more.get('title', study.name)}", more.get("text"), "## Runs"]
    parts += ["\n".join(purposes), state, report.table(rows), "## What the runs say"]
    parts += [
        report.table(answers),
        more.get("notes"),
        "## Where the numbers come from",
    ]
    text = "\n\n".join(filter(None, [*parts, sources, report.FOOT]))
    write_file(report.recorded_folder() / f"{study.name}_experiment.md", text)
    report.write_index(report.recorded_folder())


def experiment_row(study: Study, key: str, manifest: dict | None) -> dict:
    """A row of the table of runs; with the computation of the run it starts from."""
    settings, spent = study.runs[key], study.about[key.split("/")[0]].get("pmacs", 0)
    origin = settings.get("init", "random").split(",")[0]
    names = {
        folder_of(study.name, other).name: other.split("/")[0] for other in study.runs
    }
    total = spent + study.about.get(names.get(origin), {}).get("pmacs", 0)
    state = (
        f"epoch {manifest['epochs']} of {settings['epochs']}" if manifest else "open"
    )
    row = {
        "run": key,
        "state": state,
        "PMACs": f"{spent:.3g}",
        "in all": f"{total:.3g}",
    }
    if not manifest or "recorded" not in manifest:
        return dict.fromkeys(COLUMNS, "–") | row
    model = models.build(**manifest["spec"])
    row |= dict(state="done", minutes=manifest["seconds"] / 60)
    row |= dict(params=measure.params(model), macs=measure.macs(model))
    row |= dict(validation=manifest["best"]["val_accuracy"])
    return row | {"test, single view": manifest["test"]["accuracy"]}


def compare(study: Study, done: dict, question: str, a: str, b: str) -> dict:
    """A row of differences of two configurations, by seed and in the mean, in points.

    One is better where the intervals of all seeds lie on one side of 0.
    """
    row, pairs, sides = {"question": question, "difference": f"{a} − {b}"}, [], set()
    for seed in sorted({settings["seed"] for settings in study.runs.values()}):
        keys, text = (f"{a}/{seed}", f"{b}/{seed}"), "open"
        if done.keys() >= {*keys}:
            told = study.runs[keys[0]]
            labels = load(told["dataset"], told.get("val")).test.y
            names = (folder_of(study.name, key).name for key in keys)
            pairs.append([runs.load_answers(name) for name in names])
            text, side = points(*pairs[-1], labels)
            sides.add(side)
        row[f"seed {seed}"] = text
    row["mean"] = (
        "open" if len(pairs) < 2 else points(*map(torch.stack, zip(*pairs)), labels)[0]
    )
    verdict = (
        f"{a if sides == {1} else b} is better"
        if sides in ({1}, {-1})
        else "not told apart"
    )
    row["verdict"] = verdict + ", in one seed" * (len(pairs) == 1) if pairs else "open"
    return row


def points(a, b, labels) -> tuple:
    """A paired difference in points, its interval, and on which side of 0 it lies."""
    difference, half = paired(a, b, labels)
    side = 0 if abs(difference) <= half else 1 if difference > 0 else -1
    return f"{100 * difference:+.2f} ± {100 * half:.2f}", side


if __name__ == "__main__":
    try:
        if sys.argv[1:] not in ([], ["--report"]):
            raise WorkbookError(
                f"unknown option {sys.argv[1:]}; give --report, or none"
            )
        run_all(read_study(FILE), only_report=sys.argv[1:] == ["--report"])
    except WorkbookError as error:
        sys.exit(f"error: {error}")
