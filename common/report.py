"""What was found? Tables, verdicts, reports and their index, each number with its manifest."""

import json
from pathlib import Path

from common import WorkbookError, folder_from, runs, write_file
from common.config import FIELDS
from common.data import pixels, sha256, text_digest
from common.evaluate import evaluate, mean_std, means, predict, totals
from common.models import digest, files
from common.params import name as legal_name
from common.sources import SPECS

COLUMNS = {  # heading, format
    "params": ("parameters", "{:,}"),
    "macs": ("MACs", "{:,}"),
    "latency_1": ("latency, batch 1 (ms)", "{:.2f}"),
    "latency_64": ("latency, batch 64 (ms)", "{:.1f}"),
    "range_1": ("p10 to p90", "{}"),
    "range_64": ("p10 to p90", "{}"),
    "bytes": ("weights file (MB)", lambda v: f"{v / 1e6:.2f}"),
    "lam": ("λ", "{:g}"),
    "minutes": ("minutes", "{:.1f}"),
    "seconds": ("seconds", "{:.1f}"),
}
TESTS = ("test", "test_mirror", "test_tta")  # keys of a manifest, by level of `evaluate.views`
ABOUT_RUNS = (
    "One run a row (n = 1). Validation is that of the kept epoch (the best, or the last where the "
    "recipe says so), single view; it says nothing (–) where the validation images were trained "
    "on. A machine without its instruction set is one of before that was recorded."
)
FOOT = "Settings, machine and commit of each run stand in [`runs/`](runs/), one line an epoch.\n"


def cell(name: str, value) -> str:
    """One table cell: missing values say "not run"; a float is a share, and shown in percent.

    Except for settings, such as lr, and what COLUMNS knows, such as minutes.
    """
    if value is None or isinstance(value, str):
        return "not run" if value is None else value
    share = isinstance(value, float) and name not in FIELDS
    default = "{:.3f}" if name.endswith("loss") else "{:.2%}" if share else "{}"
    form = COLUMNS.get(name, (None, default))[1]
    return form(value) if callable(form) else form.format(value)


def table(rows: list) -> str:
    """Markdown table of dicts; columns in the order in which they first appear."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [[COLUMNS.get(name, (name.replace("_", " "),))[0] for name in names]]
    lines += [[cell(name, row.get(name)) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[text.ljust(width) for text, width in zip(line, widths)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def tested(run, split, tta: int = 0) -> dict:
    """Test loss, accuracy and top5 of a finished run: measured once, kept in its manifest."""
    key, images = TESTS[tta], pixels(split.test)
    elsewhere = run.manifest.get("recorded") and not (run.folder / "best.pt").exists()
    if key not in run.manifest or not (tta or elsewhere or (run.folder / "answers.bin").exists()):
        logits = predict(run.model, split.test, split.spec, tta=tta)
        found = means(totals(logits, split.test.y)) | dict(pixels=images)
        if not tta:
            write_file(run.folder / "answers.bin", logits.argmax(1).byte().numpy().tobytes())
        run.manifest = runs.save_result(run.folder, **{key: found})
    if run.manifest[key].get("pixels", images) != images:  # made before digests: none
        raise WorkbookError(f"{run.folder} was tested on other images; use another run name")
    return run.manifest[key]


def record(name: str, split, weights: bool = False) -> dict:
    """Copy a finished run of `runs/` to `reports/`: manifest, history, answers on the test images.

    `weights`: its best weights, too, of convolutions and linear layers in half precision, unless
    that moves an accuracy by over 0.05 points. Returns the manifest. Raises WorkbookError for a run
    that is not finished, and for another training that was recorded under this name.
    """
    run, old = runs.load_run(name), runs.recorded(name, "run.json")
    if runs.is_recorded(name) and not same_run(run.manifest, runs.read_manifest(old)):
        raise WorkbookError(f"{old} records another training; delete it, or rename this one")
    tested(run, split)
    history, answers = runs.csv_text(run.history), runs.load_answers(name)
    noted = run.manifest.get("recorded", {})
    noted |= dict(answers=sha256(answers), history=text_digest(history))
    if weights:
        kept = files.deployable(run.model, run=name, **run.manifest["best"])
        if not moved(run.model, files.rounded(run.model), split):
            kept["state_dict"] = files.halved(run.model)
        write_file(runs.recorded(name, "best.pt"), files.torch_bytes(kept))
        noted["weights"] = digest(files.load_model(runs.recorded(name, "best.pt")))
    write_file(runs.recorded(name, "answers.bin"), answers.numpy().tobytes())
    write_file(runs.recorded(name, "history.csv"), history)
    manifest = run.manifest | dict(recorded=noted)
    write_file(old, json.dumps(manifest, indent=1) + "\n")
    return runs.save_result(run.folder, recorded=noted)


def moved(model, rounded, split) -> bool:
    """Whether rounding moves an accuracy by over 0.05 points, and by more than one image."""
    for part in (split.val, split.test):
        before, after = (evaluate(net, part, split.spec)["accuracy"] for net in (model, rounded))
        if abs(after - before) > max(0.0005, 1.5 / len(part)):
            return True
    return False


def recorded_folder() -> Path:
    return folder_from("REPORTS_DIR", "reports")


def provenance(manifest: dict) -> str:
    """One Markdown line: where the numbers of a run come from, and its `note`, if it has one."""
    told, machine, data = manifest["config"], manifest["machine"], manifest["data"]
    parts = [machine for part in manifest.get("parts", ()) for machine in part["machines"]]
    device = ", then on ".join(dict.fromkeys(map(device_of, parts or [machine])))
    rates = f"lr {told['lr']:g}"
    if told["optimizer"] == "muon":
        rates += f" ({told['lr_other']:g} besides convolutions)"
    text = (
        f"- `{manifest['name']}`: {manifest['epochs']} epochs of {data['train']:,} images of "
        f"{data['name']} (validation {data['val']:,}), seed {told['seed']}, "
        f"{manifest['seconds'] / 60:.1f} min on {device}, torch {machine['torch']}, commit "
        f"`{manifest['commit']}`; {told['optimizer']}, {rates}, batches of {told['batch_size']}, "
        f"{told['schedule']} schedule, augmentation {' '.join(told['augment']) or 'none'}"
    )
    if manifest.get("precision", "no") != "no":
        text += f", {manifest['precision']}"
    return f"{text}. {manifest['note']}" if "note" in manifest else text


def device_of(machine: dict) -> str:
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return machine["gpu"] or f"{processor(machine)}, {threads}"


def processor(machine: dict) -> str:
    """A processor's name and vector instructions; the latter were not always recorded."""
    return f"{machine['cpu']} {machine.get('instructions', '')}".strip()


def write_report(folder, name: str, title: str, parts: list, used: list, pictures=()) -> Path:
    """Write `<name>.md` of Markdown parts, its pictures, and what `runs/` keeps of the runs `used`.

    `pictures`: file names → PNG. Returns the report's path. Raises WorkbookError, and writes
    nothing, for a run whose name was recorded by another.
    """
    legal_name("report", name)
    for manifest in used:
        refuse_other(folder, manifest)
    for manifest in used:
        copy_run(folder, manifest)
    for file, data in dict(pictures).items():
        write_file(folder / "figures" / file, data)
    history = f"history/{name}.md"
    tried = [f"[What was tried before]({history})."] * (folder / history).exists()
    foot = ["## Where the numbers come from", "\n".join(map(provenance, used)), FOOT]
    path = write_file(folder / f"{name}.md", "\n\n".join([f"# {title}", *parts, *tried, *foot]))
    write_index(folder)
    return path


def refuse_other(folder: Path, manifest: dict) -> None:
    legal_name("run", manifest["name"])  # a manifest of another's could lead elsewhere
    same = same_file(manifest, folder / "runs" / f"{manifest['name']}.json")
    if not same and runs.is_recorded(manifest["name"]) and folder == recorded_folder():
        advice = "rename this one, or delete the recorded one"
        raise WorkbookError(f"{manifest['name']} was recorded from another training; {advice}")


def copy_run(folder: Path, manifest: dict) -> None:
    """Write a run's manifest into `folder/runs`, with its history if it was trained here."""
    copy = folder / "runs" / manifest["name"]
    if same_file(manifest, Path(f"{copy}.json")):  # what the recorded one has besides stays
        kept = runs.read_manifest(Path(f"{copy}.json"))
        measured = manifest.get("measured", {}) | kept.get("measured", {})
        manifest = kept | manifest | (dict(measured=measured) if measured else {})
    else:
        Path(f"{copy}.csv").unlink(missing_ok=True)
    write_file(f"{copy}.json", json.dumps(manifest, indent=1) + "\n")
    kept = runs.folder(manifest["name"])
    if (kept / "history.csv").exists() and same_file(manifest, kept / "run.json"):
        write_file(f"{copy}.csv", (kept / "history.csv").read_bytes())


def same_run(manifest: dict, other: dict) -> bool:
    return all(manifest[key] == other[key] for key in ("config", "data", "epochs", "seconds"))


def same_file(manifest: dict, path: Path) -> bool:
    """The same, for the manifest of a file; not if it is missing or damaged."""
    try:
        return same_run(manifest, runs.read_manifest(path))
    except WorkbookError:
        return False


def write_index(folder: Path) -> None:
    """Write `folder/README.md`: the reports, published figures beside ours, one row a run.

    `folder/published.json` lists what was published, its figure, our runs to compare, and what
    differs in method.
    """
    found = {}
    for path in sorted((folder / "runs").glob("[!.]*.json")):
        try:
            run_row(path.stem, manifest := runs.read_manifest(path))
            found[path.stem] = manifest
        except (WorkbookError, KeyError, TypeError, AttributeError) as error:
            print(f"left out: {path.name}: {error}")
    reports = [path for path in sorted(folder.glob("*.md")) if path.name != "README.md"]
    text = "# Reports\n\n" + "\n".join(f"- [{path.stem}]({path.name})" for path in reports)
    published = folder / "published.json"
    if published.exists():
        rows = [
            published_row(entry, found)
            for entry in json.loads(published.read_text(encoding="utf-8"))
        ]
        text += f"\n\n## Beside published figures\n\nTest accuracies.\n\n{table(rows)}"
    rows = table([run_row(name, manifest) for name, manifest in found.items()])
    write_file(folder / "README.md", f"{text}\n\n## All runs\n\n{ABOUT_RUNS}\n\n{rows}\n")


def published_row(entry: dict, found: dict) -> dict:
    """A row of the index: a published figure, and ours over all seeds."""
    ours = [found[name] for name in entry["runs"] if name in found]
    columns = {"published": entry["what"], "accuracy": entry["accuracy"]}
    for heading, key in (("ours, single view", "test"), ("ours, TTA", "test_tta")):
        columns[heading] = mean_std([run[key]["accuracy"] for run in ours if key in run])
    return columns | {"what differs": entry["differs"]}


def run_row(name: str, manifest: dict) -> dict:
    """A row of the index: one run."""
    data, machine = manifest["data"], manifest["machine"]
    spec = SPECS.get(data["name"])
    trained_on = spec and data["train"] == spec.counts[0] * spec.classes
    return {
        "run": f"[{name}](runs/{name}.json)",
        "network": manifest["spec"]["name"],
        "data": data["name"],
        "images": f"{data['train']:,}",
        "epochs": manifest["epochs"],
        "seed": manifest["config"]["seed"],
        "validation": "–" if trained_on else manifest["best"]["val_accuracy"],
        "test": manifest.get("test", {}).get("accuracy"),
        "test, TTA": manifest.get("test_tta", {}).get("accuracy"),
        "minutes": f"{manifest['seconds'] / 60:.1f}",
        "machine": machine["gpu"] or processor(machine),
    }


if __name__ == "__main__":
    from common.cli import record_main

    record_main()
