"""From `runs/*/run.json` to Markdown: tables and reports whose every number has a manifest beside it."""

import io
import json
import statistics
from pathlib import Path

from common import ROOT, WorkbookError, params, write_file
from common.data import SPECS
from common.params import runs_folder
from common.train import evaluate

COLUMNS = {
    "params": ("parameters", "{:,}"),
    "macs": ("MACs", "{:,}"),
    "latency_1": ("latency, batch 1 (ms)", "{:.2f}"),
    "latency_64": ("latency, batch 64 (ms)", "{:.1f}"),
    "range_1": ("p10 to p90", "{}"),
    "range_64": ("p10 to p90", "{}"),
    "bytes": ("weights file (MB)", lambda v: f"{v / 1e6:.2f}"),
    "lam": ("λ", "{:g}"),
}


T95 = ((2, 4.30), (3, 3.18), (4, 2.78), (6, 2.45), (8, 2.31), (18, 2.10), (38, 2.02))  # 97.5 % quantiles of Student's t


def cell(name: str, value) -> str:
    """One table cell: missing values say "not run", accuracies and shares are percentages."""
    if value is None:
        return "not run"
    if isinstance(value, str):
        return value
    form = COLUMNS.get(name, (None, "{:.2%}" if isinstance(value, float) else "{}"))[1]
    return form(value) if callable(form) else form.format(value)


def table(rows: list) -> str:
    """Markdown table of dicts; columns in the order in which they first appear."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [[COLUMNS.get(name, (name.replace("_", " "),))[0] for name in names]]
    lines += [[cell(name, row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |" for line in lines)


def save_result(folder, **results) -> dict:
    """Add results to a run's manifest (`run.json`), for instance `test={"accuracy": 0.91}`; returns the manifest."""
    path = Path(folder) / "run.json"
    manifest = json.loads(path.read_text()) if path.exists() else dict(name=path.parent.name)
    manifest |= results
    write_file(path, json.dumps(manifest, indent=1))
    return manifest


def mean_std(values: list) -> str:
    """Mean ± standard deviation over seeds (n − 1 in the denominator), with n; shares are written as percentages."""
    if len(values) < 2:
        return f"{values[0]:.2%} (n = 1)" if values else "not run"
    return f"{statistics.mean(values):.2%} ± {statistics.stdev(values):.2%} (n = {len(values)})"


def verdict(a: list, b: list, others: list = ()) -> str:
    """Does the difference of two sets of seeds exceed their spread? One sentence, from accuracies (0..1) of each.

    The difference of the means is held against its 95 % interval (Student's t). The deviation of one seed is pooled
    over both sets and `others`, of which it is assumed to be the same: with two seeds each, the interval is 4.3
    standard errors from two sets alone, and 2.3 from eight.
    """
    sets = [v for v in (a, b, *others) if len(v) > 1]
    freedom = sum(len(v) - 1 for v in sets)
    if freedom < 2 or not (a and b):
        return "unknown: at least two seeds of each are needed"
    difference = statistics.mean(a) - statistics.mean(b)
    pooled = sum((len(v) - 1) * statistics.variance(v) for v in sets) / freedom
    interval = (pooled * (1 / len(a) + 1 / len(b))) ** 0.5 * next(t for n, t in reversed(T95) if n <= freedom)
    words = "exceeds" if abs(difference) > interval else "does not exceed"
    return f"{100 * difference:+.2f} points, which {words} what seeds alone may do (± {100 * interval:.2f} points, 95 %)"


def tested(run, split, tta: int = 0) -> dict:
    """Test loss, accuracy and top5 of a finished run: measured once, then kept in its manifest.

    Its keys are `test`, and for `tta` 1 and 2 (see `train.views`) `test_mirror` and `test_tta`.
    """
    key = ("test", "test_mirror", "test_tta")[tta]
    if key not in run.manifest:
        result = evaluate(run.model, split.test, split.spec, tta=tta)
        run.manifest = save_result(run.folder, **{key: result})
    return run.manifest[key]


def load_manifest(checkpoint) -> dict:
    """The manifest of a checkpoint: `run.json` in its folder, or the file of its own name ending in .json."""
    path = Path(checkpoint)
    places = [path / "run.json"] if path.is_dir() else [path.with_suffix(".json"), path.parent / "run.json"]
    for place in places:
        if place.exists():
            return json.loads(place.read_text())
    raise WorkbookError(f"no manifest beside {path} (looked for {', '.join(p.name for p in places)}); keep run.json with it")


def report_folder(scale: str) -> Path:
    """`reports/` for the settings of a real scale as they stand, given by papermill; all else goes to `runs/reports/`."""
    return ROOT / "reports" if scale != "quick" and params.standard else runs_folder() / "reports"


def provenance(manifest: dict) -> str:
    """One Markdown line: where the numbers of a run come from, and its `note`, which `save_result(folder, note=…)` adds."""
    machine, data = manifest["machine"], manifest["data"]
    cpu = " ".join(machine[key] for key in ("cpu", "instructions") if key in machine)
    device = machine["gpu"] or f"{cpu}, {machine['threads']} threads"
    config = manifest["config"]
    rates = f"lr {config['lr']:g}" + f" ({config['lr_other']:g} besides convolutions)" * (config["optimizer"] == "muon")
    settings = f"{config['optimizer']}, {rates}, batches of {config['batch_size']}, {config['schedule']} schedule"
    return (
        f"- `{manifest['name']}`: {manifest['epochs']} epochs of {data['train']:,} images of {data['name']} "
        f"(validation {data['val']:,}), seed {manifest['config']['seed']}, {manifest['seconds'] / 60:.1f} min on "
        f"{device}, torch {machine['torch']}, commit `{manifest['commit']}`; {settings}, "
        f"augmentation {' '.join(config['augment']) or 'none'}"
        + f", {manifest.get('precision')}" * (manifest.get("precision", "no") != "no")
        + f". {manifest.get('note')}" * ("note" in manifest)
    )


def write_report(name: str, scale: str, title: str, parts: list, figures: dict, runs: list) -> Path:
    """Write `<name>.md` with its figures, and the manifests and histories of its runs beside it; returns its path.

    `parts` are Markdown texts in order, where `![](key)` stands for the figure of that key; `runs` are manifests.
    """
    folder = report_folder(scale)
    body = "\n\n".join(parts)
    for key, figure in figures.items():
        if f"![]({key})" not in body:
            raise WorkbookError(f"figure {key!r} is not shown in the report; put ![]({key}) into one of its parts")
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110, bbox_inches="tight")
        path = write_file(folder / "figures" / f"{name}_{key}.png", buffer.getvalue())
        body = body.replace(f"![]({key})", f"![{key.replace('_', ' ')}](figures/{path.name})")
    for manifest in runs:
        write_file(folder / "runs" / f"{manifest['name']}.json", json.dumps(manifest, indent=1) + "\n")
        if (history := runs_folder() / manifest["name"] / "history.csv").exists():
            write_file(folder / "runs" / f"{manifest['name']}.csv", history.read_text())
    warning = "\n\n> A **quick** run on the embedded sample: it shows that everything works, not what it can reach." * (
        scale == "quick"
    )
    sources = "\n".join(provenance(manifest) for manifest in runs)
    text = f"# {title}\n\nScale: `{scale}`.{warning}\n\n{body}\n\n## Where the numbers come from\n\n{sources}\n\n"
    text += "Settings, machine and commit of each run stand in [`runs/`](runs/), and one line an epoch.\n"
    path = write_file(folder / f"{name}.md", text)
    write_index(folder)
    return path


def write_index(folder: Path) -> None:
    """Write `folder/README.md`: one row a run with its manifest in `folder/runs/`, after the published figures.

    Those stand in `folder/published.json`: a list of what was published, its figure, our runs to compare, and what
    differs in method.
    """
    runs = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))}
    accuracy = lambda run, key="test": run.get(key, {}).get("accuracy")
    rows = []
    for name, run in runs.items():
        row = {"run": f"[{name}](runs/{name}.json)", "network": run["spec"]["name"], "data": run["data"]["name"]}
        row |= {"images": f"{run['data']['train']:,}", "epochs": run["epochs"], "seed": run["config"]["seed"]}
        spec = SPECS.get(run["data"]["name"])
        trained_on = spec and run["data"]["train"] == spec.counts[0] * spec.classes
        row |= {"validation": "–" if trained_on else run["best"]["val_accuracy"]}
        row |= {"test": accuracy(run), "test, TTA": accuracy(run, "test_tta"), "minutes": f"{run['seconds'] / 60:.1f}"}
        machine = run["machine"]
        rows.append(row | {"machine": machine["gpu"] or " ".join(filter(None, (machine["cpu"], machine.get("instructions"))))})
    compared = []
    for entry in json.loads(published.read_text()) if (published := folder / "published.json").exists() else ():
        row = {"published": entry["what"], "accuracy": entry["accuracy"]}
        for column, key in (("ours, single view", "test"), ("ours, TTA", "test_tta")):
            found = [accuracy(runs[name], key) for name in entry["runs"] if name in runs]
            row[column] = mean_std([v for v in found if v is not None])
        compared.append(row | {"what differs": entry["differs"]})
    reports = "\n".join(f"- [{path.stem}]({path.name})" for path in sorted(folder.glob("*.md")) if path.name != "README.md")
    text = f"# Reports\n\n{reports}\n\n"
    text += f"## Beside published figures\n\nTest accuracies.\n\n{table(compared)}\n\n" if compared else ""
    text += "## All runs\n\nOne run a row (n = 1). Validation is that of the kept epoch (the best, or the last where the recipe "
    text += "says so), single view; it says nothing (–) where the validation images were trained on. A machine without its "
    text += "instruction set is one of before that was recorded.\n\n"
    write_file(folder / "README.md", text + table(rows) + "\n")
