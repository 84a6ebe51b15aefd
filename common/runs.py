"""What does a run leave on disk, and how is it read back?

Two runs are the same if their identities are. One process at a time may write a run: the last that
claimed it. A manifest has an entry of `parts` for each time the run was begun or gone on with.
A run that has no folder is read from the recorded ones: see `report.record`.
"""

import copy
import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from common import WorkbookError, folder_from, locked, owner_of, write_file
from common.config import DIGESTS, as_json, differences
from common.data import sha256, text_digest
from common.models import digest, files
from common.models.files import load_checkpoint, torch_bytes
from common.params import name as legal_name

RECORDED = {  # where the files of a recorded run are, below `reports/`
    "run.json": "runs/{}.json",
    "history.csv": "runs/{}.csv",
    "answers.bin": "runs/{}.bin",
    "best.pt": "weights/{}.pt",
}
RETRAIN = "train it with retrain=True"
RESTORE = f"restore it (git checkout), or {RETRAIN}"


@dataclass
class Run:
    """A finished run: best weights (None if not recorded), a row an epoch, manifest, folder."""

    kept: nn.Module | None
    history: list
    manifest: dict
    folder: Path

    @property
    def model(self) -> nn.Module:
        """The network with its best weights; WorkbookError where these were not recorded."""
        if self.kept is None:
            problem = f"the weights of {self.folder.name} were not recorded"
            raise WorkbookError(f"{problem}; {RETRAIN}")
        return self.kept


def folder(name: str = "") -> Path:
    """Where a run is kept: `$RUNS_DIR/<name>`, by default in `runs/` of the repository.

    Raises WorkbookError for a name that would be a path.
    """
    if name:
        legal_name("run", name)
    return folder_from("RUNS_DIR", "runs") / name


def recorded(name: str, file: str) -> Path:
    """Where a file of a recorded run is: in `reports/`, or below `$REPORTS_DIR`."""
    return folder_from("REPORTS_DIR", "reports") / RECORDED[file].format(name)


def place_of(run) -> Path:
    """The folder of a run, given by it or by the name of a run in `runs/`."""
    place = Path(run).expanduser()
    return folder(place.name) if len(place.parts) == 1 and not place.exists() else place


def file_of(run, file: str) -> Path:
    """A file of a run, given by name or folder: there if it has ended, or else as recorded."""
    place = place_of(run)
    here = (place / "best.pt").exists() or not is_recorded(place.name)
    return place / file if here else recorded(place.name, file)


def is_recorded(name: str) -> bool:
    """Whether a run was recorded; others in `reports/runs/` have no answers and no weights."""
    path = recorded(name, "run.json")
    return path.is_file() and "recorded" in read_manifest(path)


def find_or_refuse(folder: Path, identity: dict) -> dict:
    """The state of the run in `folder`, or of one that has not begun.

    Raises WorkbookError if its settings are other ones, or its checkpoint cannot be read.
    """
    state = dict(history=[], best=None, seconds=0.0, finished=False, parts=[])
    if not (folder / "checkpoint.pt").exists():
        return state | identity
    state = dict(start={}) | load_checkpoint(folder / "checkpoint.pt")
    if "history" not in state:
        raise WorkbookError(f"{folder}/checkpoint.pt holds weights alone; delete it to begin anew")
    before = dict(machines=[], epochs=len(state["history"]), seconds=state["seconds"])
    before |= {key: state.get(key, "?") for key in ("commit", "precision")}
    state.setdefault("parts", [before])  # older ones lack it, and digests
    if lacking := [key for key in DIGESTS if key not in state["data"] | state["start"]]:
        what = " and ".join(lacking)
        print(f"{folder.name}: made before digests, so its {what} are not compared")
    for key, old, new in differences(state, identity):
        problem = f"holds a run with {key}={old!r}, but {key}={new!r} was asked for"
        raise WorkbookError(f"{folder} {problem}; delete it or use another run name")
    return state


def result(folder: Path, model: nn.Module, state: dict) -> Run:
    """The finished run, its best weights in `model`."""
    model.load_state_dict(state["best"]["state_dict"])
    return Run(model.eval(), state["history"], load_manifest(folder), folder)


def finished(folder: Path, model: nn.Module, state: dict, retrain: bool = False) -> Run | None:
    """The run if it needs no training: it ended here, or was recorded with the same identity.

    The latter is said in a line, or which setting differs. First weights that come from another run
    are told by `init`: they differ in their last bits.
    """
    if state["finished"]:
        return result(folder, copy.deepcopy(model), state)
    if retrain or state["history"] or not is_recorded(folder.name):
        return None
    manifest = read_manifest(recorded(folder.name, "run.json"))
    asked = {key: state[key] for key in ("config", "spec", "data", "start")}
    if asked["config"]["init"] != "random":
        del asked["start"]
    for key, old, new in differences(manifest, asked):
        print(f"{folder.name}: the recorded run has {key}={old!r}, not {new!r}: it is trained here")
        return None
    minutes = f"{manifest['seconds'] / 60:.0f} minutes on {manifest['machine']['cpu']}"
    print(f"{folder.name}: recorded, {minutes}; retrain=True trains it here")
    return load_run(folder)


def load_run(run) -> Run:
    """A finished run, given by name or folder, without training; WorkbookError for any other."""
    manifest = load_manifest(run)
    if not manifest["finished"]:
        raise WorkbookError(f"{manifest['name']} is not finished; train it first")
    path = file_of(run, "history.csv")
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        whole = {"epoch": int, "images": int}
        history = [{k: whole.get(k, float)(v) for k, v in row.items() if v} for row in rows]
    except (OSError, ValueError, TypeError):
        history = []
    same = manifest.get("recorded", {}).get("history") in (None, text_digest(csv_text(history)))
    if len(history) != manifest["epochs"] or not same:
        raise WorkbookError(f"{path} is damaged or missing; {RESTORE}")
    place = place_of(run)
    weights = path.parent == place or "weights" in manifest["recorded"]
    return Run(load_model(run) if weights else None, history, manifest, place)


def load_answers(run) -> torch.Tensor:
    """A run's answers on the test images (N,), uint8, single view; run: name or folder."""
    path, noted = file_of(run, "answers.bin"), load_manifest(run).get("recorded", {})
    if not path.is_file():
        raise WorkbookError(f"{path} is missing; {RESTORE}")
    answers = torch.frombuffer(bytearray(path.read_bytes() or b"?"), dtype=torch.uint8)
    if sha256(answers) != noted.get("answers", sha256(answers)):
        raise WorkbookError(f"{path} is damaged, or of another network; {RESTORE}")
    return answers


def save_run(folder: Path, state: dict, owner: str) -> None:
    """Write history.csv, run.json, at the end best.pt; last checkpoint.pt: the epoch counts.

    Raises WorkbookError, and writes nothing, if another process has claimed the run.
    """
    best = {key: state["best"][key] for key in ("epoch", "val_accuracy")}
    manifest = dict(name=folder.name, epochs=len(state["history"]), best=best)
    manifest["machine"] = state["parts"][-1]["machines"][0]
    keys = "finished", "seconds", "config", "spec", "data", "start", "parts"
    manifest |= {key: state[key] for key in keys}
    for key in ("commit", "precision"):  # it may have gone on elsewhere
        names = ", ".join(part[key] for part in state["parts"]).split(", ")
        manifest[key] = ", ".join(dict.fromkeys(names))
    weights = dict(spec=state["spec"], state_dict=state["best"]["state_dict"])
    weights["meta"] = dict(run=folder.name, **best)
    with locked(folder):
        if owner_of(folder) != owner:
            raise WorkbookError(f"{folder} has another owner now, or is gone; this process stops")
        write_file(folder / "history.csv", csv_text(state["history"]))
        write_file(folder / "run.json", json.dumps(manifest, indent=1))
        if state["finished"]:
            write_file(folder / "best.pt", torch_bytes(weights))
        write_file(folder / "checkpoint.pt", torch_bytes(state))


def load_manifest(run) -> dict:
    """The manifest of a run, given by name, folder, checkpoint or weights file."""
    path = Path(run).expanduser()
    beside = [path.with_suffix(".json")] * (path.suffix == ".pt") + [path.parent / "run.json"]
    for place in beside if path.is_file() else [file_of(run, "run.json")]:
        if place.is_file():
            return read_manifest(place)
    raise WorkbookError(f"no manifest beside {path}; restore its run.json, or train again")


def read_manifest(path: Path) -> dict:
    """A manifest under the name that its folder or file has now."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        missing = {"config", "spec", "data", "best", "machine", "seconds"} - {*manifest}
        if path.name != "run.json" and "recorded" in manifest and manifest["name"] != path.stem:
            missing = [f"run {path.stem}, but {manifest['name']}"]
    except (ValueError, TypeError, KeyError, OSError):
        missing = ["all of it"]
    if missing:
        problem = f"is damaged, or no manifest (no {', '.join(sorted(missing))})"
        raise WorkbookError(f"{path} {problem}; {RESTORE}")
    return manifest | dict(
        name=path.absolute().parent.name if path.name == "run.json" else path.stem
    )


def save_result(folder, **results) -> dict:
    """Add results to a run's manifest, as in `test={"accuracy": 0.91}`; returns the manifest."""
    manifest = load_manifest(folder) | results
    if (place_of(folder) / "run.json").exists():  # not if the run is read from its record
        write_file(place_of(folder) / "run.json", json.dumps(as_json(manifest), indent=1))
    return manifest


def csv_text(history: list) -> str:
    """History rows as CSV with a header line; older rows may lack columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(key for row in history for key in row))
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()


def load_model(run, expect: str | None = None) -> nn.Module:
    """The best network of a run, given by name or folder, or that of a file; in eval mode.

    `expect`: the architecture the caller can use. Raises WorkbookError for another one, unusable
    files, and a recorded run without weights.
    """
    path = Path(run).expanduser()
    if path.is_file():
        return files.load_model(path, expect)
    path = file_of(run, "best.pt")
    if path != recorded(path.stem, "best.pt"):
        saved = path.with_name("checkpoint.pt")  # holds the best weights, too
        lost = not path.exists() and saved.exists() and load_manifest(run)["finished"]
        return files.load_model(saved if lost else path, expect)
    noted = load_manifest(run)["recorded"].get("weights")
    if noted is None:
        raise WorkbookError(f"the weights of {path.stem} were not recorded; {RETRAIN}")
    if not path.is_file():
        raise WorkbookError(f"{path} is missing; {RESTORE}")
    model = files.load_model(path, expect)
    if digest(model) != noted:
        raise WorkbookError(f"{path} holds another network than was recorded; {RESTORE}")
    return model
