"""What does a lesson start with, and what does it leave? Its settings, what it shows, its report.

`start` opens a lesson; what `figure`, `table` and `say` show is kept, and `finish` reports it. To
show something again under the same name replaces it: any cell may be run twice.
"""

import ast
import itertools
import json
import os
import types
from pathlib import Path
from typing import get_type_hints

from IPython.display import Markdown, display

from common import ROOT, choose, measure, plots, report, runs, write_file
from common.config import FIELDS, TrainConfig
from common.models import KINDS, MODELS
from common.params import (
    SCALES,
    mapping,
    name,
    number,
    one_of,
    optional,
    read_yaml,
    switch,
    text,
    whole,
)
from common.slimming import CRITERIA, SCOPES

COUNT = optional(whole(1))
SEVERAL = optional(whole(2))
TEXT = optional(text)
SWITCH = optional(switch)
RULES = {  # for parameters of notebooks; those that are fields of TrainConfig keep its rules
    "scale": one_of(SCALES),
    "model": optional(one_of(MODELS)),
    "ratio": number(0, below=1),
    "criterion": one_of(CRITERIA),
    "scope": one_of(SCOPES),
    "groups": one_of(KINDS),
    "run": optional(name),
    "tta": whole(0, 2),
    "muon_lr": optional(number(0)),
    "dropout": optional(number(0, below=1)),
    **dict.fromkeys(("width", "seeds", "every", "min_channels", "round_to"), COUNT),
    **dict.fromkeys(("workers", "vgg_epochs"), COUNT),
    **dict.fromkeys(("recalibrate", "sweep"), SEVERAL),
    **dict.fromkeys(("strength", "final", "test_file", "submission", "picture"), TEXT),
    **dict.fromkeys(("checkpoint", "storage"), TEXT),
    **dict.fromkeys(("kaiming", "ladder", "faster", "everything", "ablation"), SWITCH),
    **dict.fromkeys(("usual", "compare", "control", "retrain", "train"), SWITCH),
}
HOW = {"storage", "workers", "retrain", "train"}  # parameters that change no number


class Settings(types.SimpleNamespace):
    """Settings of a lesson as attributes: a row of settings.yaml, with parameters in place."""

    def config(self, **changes) -> TrainConfig:
        """The `TrainConfig` of these settings, with changes."""
        told = {key: value for key, value in vars(self).items() if key in FIELDS} | changes
        lists = {key: tuple(value) for key, value in told.items() if isinstance(value, list)}
        return TrainConfig(**{key: v for key, v in (told | lists).items() if v is not None})

    def folder(self, what: str) -> Path:
        """The folder of one of the lesson's runs."""
        return runs.folder(f"{self.run}-{what}")


class Lesson(types.SimpleNamespace):
    """The lesson that is open: its name, title, settings, and `sections` of what was shown."""


def start(lesson: str, namespace: dict) -> Settings:
    """Check a notebook's parameters, show and return its settings: `start("x", globals())`.

    Those are the row of the scale in the lab's settings.yaml, then parameters that are not None,
    then `more`; `report` names the report. Raises WorkbookError for an illegal value, and for a
    name that papermill injected and the notebook does not have.
    """
    lab, about = find(lesson)
    defaults = parameters(lab / f"{lesson}.ipynb")
    for given in injected(namespace):
        choose("parameter", given, defaults)
    given = {key: namespace[key] for key in defaults}
    check(given)
    row, scale = about[given["scale"]], given["scale"]
    row = row | row.get("other", {}).get(given.get("model"), {})  # of a network that is not its own
    prefix = about.get("runs", {}).get(scale, f"{lab.name.lower()}-{scale}")
    told = dict.fromkeys([*row, *defaults]) | row  # all parameters are settings, too
    told |= {key: value for key, value in given.items() if value is not None}
    told |= given.get("more") or {}
    told |= dict(run=given.get("run") or prefix, report=about["report"])
    settings = Settings(**told)
    if told.get("epochs"):
        settings.config()  # checked before anything is trained
    changed = [key for key in defaults if given[key] != defaults[key] and key != "scale"]
    heads = dict(title=about["title"], sections={}, section="")
    Lesson.now = Lesson(name=lesson, settings=settings, changed=changed, **heads)
    display(Markdown(overview(settings, row["minutes"])))
    return settings


def find(lesson: str) -> tuple:
    """The folder of a lesson, and what the settings.yaml there says about it."""
    tables = {path.parent: read_yaml(path) for path in sorted(ROOT.glob("*/settings.yaml"))}
    labs = {key: (lab, table) for lab, table in tables.items() for key in table}
    lab, table = labs[choose("lesson", lesson, labs)]
    return lab, table[lesson]


def parameters(path: Path) -> dict:
    """Name → default of the parameters of a notebook, from its cell with that tag."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", ())]
    statements = ast.parse("".join(tagged[0]["source"])).body
    return {node.target.id: ast.literal_eval(node.value) for node in statements}


def injected(namespace: dict) -> list:
    """Names assigned by papermill, in a cell of its own that starts with "# Parameters"."""
    cells = [cell for cell in namespace.get("In", ()) if cell.startswith("# Parameters")]
    statements = [node for cell in cells for node in ast.parse(cell).body]
    assignments = [node for node in statements if isinstance(node, ast.Assign)]
    targets = [target for node in assignments for target in node.targets]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def check(given: dict) -> None:
    """Check parameters: None, where it may be, says "as settings.yaml has it"."""
    fields = get_type_hints(TrainConfig, include_extras=True)
    seeds = {"seed"} if "seeds" in given else set()  # they are counted there
    more = optional(mapping([field for field in FIELDS if field not in seeds]))
    for key, value in given.items():
        rules = [more] if key == "more" else [RULES[key]] if key in RULES else []
        rules = rules or [optional(rule) for rule in fields[key].__metadata__]
        for rule in rules:
            rule(key, value)


def overview(settings: Settings, minutes) -> str:
    """Scale, expected minutes, machine, and a table of settings: Markdown."""
    machine = report.device_of(measure.machine())
    head = f"Scale **{settings.scale}**, about {minutes} min. This machine: {machine}."
    plain = {k: v for k, v in vars(settings).items() if v is not None and not isinstance(v, dict)}
    hidden = ("scale", "minutes", "report")
    cells = [f"`{key}` | {setting(v)}" for key, v in plain.items() if key not in hidden]
    half = -(-len(cells) // 2)
    pairs = itertools.zip_longest(cells[:half], cells[half:], fillvalue=" | ")
    lines = [f"| {left} | {right} |" for left, right in pairs]
    table = ["| setting | value | setting | value |", "|---|---|---|---|", *lines]
    return f"{head} Runs are kept in `{runs.folder()}`.\n\n" + "\n".join(table)


def setting(value) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def figure(key: str, ax, alt: str) -> None:
    """Show an axes' figure, or a figure, and keep it; `alt` says what is to be seen in it."""
    picture = plots.picture(ax, alt)
    display(picture)
    _keep(None, key, picture)


def live(key: str) -> plots.Live:
    """An `on_epoch` hook that draws both accuracies; its last picture is kept."""
    hook = plots.Live()
    _keep(None, key, hook)
    return hook


def table(heading: str, rows: list) -> None:
    """Show rows (see `report.table`) as a table, and keep it under a heading."""
    shown = report.table(rows)
    display(Markdown(shown))
    _keep(heading, "table", shown)


def say(heading: str, sentence: str) -> None:
    """Show a sentence (Markdown), and keep it under a heading; "Result" comes first."""
    display(Markdown(sentence))
    _keep(heading, "text", sentence)


def _keep(heading, key, what):
    """Keep something shown, in the place where it was before, or in the section that is open."""
    now = Lesson.now
    if heading is not None:
        now.section = heading
    sections = now.sections.values() if heading is None else ()
    place = next((section for section in sections if key in section), None)
    if place is None:
        place = now.sections.setdefault(now.section, {})
    place[key] = what


def finish(*used) -> Path:
    """Write the report of what was shown; `used`: the runs that the numbers come from.

    Returns its path: in `reports/` if WORKBOOK_REPORT is 1 (`make report`), the scale is not quick
    and no parameter was changed; else in `runs/reports/`.
    """
    now, settings = Lesson.now, Lesson.now.settings
    real = settings.scale != "quick" and not set(now.changed) - HOW
    asked = os.environ.get("WORKBOOK_REPORT") == "1"
    folder = report.recorded_folder() if asked and real else runs.folder("reports")
    head = f"Scale: `{settings.scale}`."
    if settings.scale == "quick":
        head = "A **quick** run on the embedded sample: it shows that everything works, no more."
    if now.changed:
        head += f" Changed: {', '.join(f'{key}={vars(settings)[key]}' for key in now.changed)}."
    order = sorted(now.sections, key=lambda heading: heading != "Result")
    parts = [head, *(_section(heading, folder) for heading in order)]
    manifests = [getattr(run, "manifest", run) for run in used]
    path = report.write_report(folder, settings.report, now.title, parts, manifests)
    print(f"report: {path}")
    return path


def _section(heading: str, folder: Path) -> str:
    """Markdown of a section; its figures are written beside the report."""
    lines = [f"## {heading}"] * bool(heading)
    for key, what in Lesson.now.sections[heading].items():
        if isinstance(what, str):
            lines.append(what)
            continue
        picture = getattr(what, "picture", what)
        path = write_file(
            folder / "figures" / f"{Lesson.now.settings.report}_{key}.png", picture.data
        )
        lines.append(f"![{picture.alt}](figures/{path.name})")
    return "\n\n".join(lines)
