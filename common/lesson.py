"""What does a lesson start with, and what does it leave? Its settings, what it shows, its report.

`start` opens a lesson; what `figure`, `table` and `say` show is kept, and `finish` reports it. To
show something again under the same name replaces it: any cell may be run twice.
"""

import ast
import itertools
import json
import os
import textwrap
import types
from pathlib import Path
from typing import get_type_hints

from IPython.display import Markdown, display

from common import ROOT, WorkbookError, choose, measure, plots, report, runs, widgets
from common.config import FIELDS, TrainConfig
from common.models import KINDS, MODELS
from common.params import SCALES, mapping, name, number, one_of, read_yaml, switch, text, whole
from common.slimming import CRITERIA, SCOPES

RULES = {  # for parameters of notebooks; those that are fields of TrainConfig keep its rules
    "scale": one_of(SCALES),
    "model": one_of(MODELS),
    "ratio": number(0, below=1),
    "criterion": one_of(CRITERIA),
    "scope": one_of(SCOPES),
    "groups": one_of(KINDS),
    "run": name,
    "tta": whole(0, 2),
    "muon_lr": number(0),
    "dropout": number(0, below=1),
    **dict.fromkeys(("width", "seeds", "every", "min_channels", "round_to"), whole(1)),
    "workers": whole(1),
    "recalibrate": whole(2),
    **dict.fromkeys(("strength", "final", "test_file", "submission", "picture"), text),
    **dict.fromkeys(("checkpoint", "storage"), text),
    **dict.fromkeys(("kaiming", "ladder", "faster", "everything", "ablation"), switch),
    **dict.fromkeys(("usual", "compare", "retrain", "train"), switch),
}
HOW = {"scale", "storage", "workers", "retrain", "train"}  # these change no number of a scale
HIDDEN = {"scale", "minutes", "report", "storage", "here", "given"}  # a storage may hold a password
now = None  # the lesson that is open


class Settings(types.SimpleNamespace):
    """Settings of a lesson as attributes: a row of settings.yaml, with parameters in place."""

    def config(self, **changes) -> TrainConfig:
        """The `TrainConfig` of these settings, with changes; None takes its default."""
        told = {key: value for key, value in vars(self).items() if key in FIELDS} | changes
        told = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
        return TrainConfig(**{key: value for key, value in told.items() if value is not None})

    def folder(self, what: str) -> Path:
        """The folder of one of the lesson's runs."""
        return runs.folder(f"{self.run}-{what}")


def start(lesson: str, namespace: dict) -> Settings:
    """Check a notebook's parameters, show and return its settings: `start("x", globals())`.

    Those are the row of the scale in the lab's settings.yaml, then parameters that are not None,
    then `more`; `given`: the parameters; `here`: whether recorded runs will not do.
    Raises WorkbookError for an illegal value, and for a name that the notebook does not have.
    """
    lab, about = find(lesson)
    defaults = parameters(lab / f"{lesson}.ipynb")
    for key in injected(namespace):
        choose("parameter", key, defaults)
    given = {key: namespace.get(key, defaults[key]) for key in defaults}
    if "NBGRADER_EXECUTION" in os.environ:  # students may have edited them
        given = defaults | dict(scale="quick")
    check(given, defaults)
    row, scale = about[given["scale"]], given["scale"]
    row = row | row.get("other", {}).get(given.get("model"), {})  # of a network that is not its own
    prefix = about.get("runs", {}).get(scale, f"{lab.name.lower()}-{scale}")
    told = dict.fromkeys([*row, *defaults]) | row  # all parameters are settings, too
    told |= {key: value for key, value in given.items() if value is not None}
    told |= given.get("more") or {}
    told |= dict(run=given.get("run") or prefix, report=about["report"])
    settings = Settings(**told)
    length = {} if told.get("epochs") else dict(epochs=1, warmup=0)  # some say it by training
    settings.config(**length)  # checked before anything runs
    changed = [key for key in defaults if given[key] != defaults[key] and key not in HOW]
    settings.given = given
    settings.here = bool(changed or given.get("retrain") or scale == "full")
    global now
    now = types.SimpleNamespace(title=about["title"], settings=settings, changed=changed)
    now.shown, now.section = {}, ""
    display(Markdown(overview(settings)))
    return settings


def find(lesson: str) -> tuple:
    """The folder of a lesson, and what the settings.yaml there says about it."""
    labs = {}
    for path in sorted(ROOT.glob("*/settings.yaml")):
        for key, about in read_yaml(path).items():
            if key in labs:
                raise WorkbookError(f"{path} and {labs[key][0]} both have {key!r}; remove one")
            labs[key] = path.parent, about
    return labs[choose("lesson", lesson, labs)]


def parameters(path: Path) -> dict:
    """Name → default of the parameters of a notebook, from its cell with that tag.

    It is read from the file: a default that was edited and saved is the lesson's own.
    """
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", ())]
        statements = ast.parse("".join(tagged[0]["source"])).body
        return {node.target.id: ast.literal_eval(node.value) for node in statements}
    except (OSError, ValueError, LookupError, AttributeError, SyntaxError):
        problem = f"the parameters cell of {path} cannot be read"
        advice = "keep one `name: type = value` a line, or restore the file (git checkout)"
        raise WorkbookError(f"{problem}; {advice}") from None


def injected(namespace: dict) -> list:
    """Names assigned by papermill, in a cell of its own that starts with "# Parameters"."""
    cells = [cell for cell in namespace.get("In", ()) if cell.startswith("# Parameters\n")]
    statements = [node for cell in cells for node in ast.parse(cell).body]
    return [node.targets[0].id for node in statements if isinstance(node, ast.Assign)]


def check(given: dict, defaults: dict) -> None:
    """Check parameters; None is legal where it is the default: "as settings.yaml has it"."""
    fields = get_type_hints(TrainConfig, include_extras=True)
    seeds = {"seed"} if "seeds" in given else set()  # they are counted there
    own = RULES | dict(more=mapping([field for field in FIELDS if field not in seeds]))
    for key, value in given.items():
        rules = [own[key]] if key in own else fields[key].__metadata__
        for rule in rules if value is not None or defaults[key] is not None else ():
            rule(key, value)
    for key, value in (given.get("more") or {}).items():
        for rule in fields[key].__metadata__:
            rule(key, value)


def overview(settings: Settings) -> str:
    """Scale, expected time, machine, and a table of settings: Markdown."""
    machine, time = report.device_of(measure.machine()), settings.minutes
    time = time if isinstance(time, str) else f"{time} min"
    told = {key: v for key, v in vars(settings).items() if key not in HIDDEN and v is not None}
    cells = [f"`{key}` | {setting(value)}" for key, value in told.items()]
    half = -(-len(cells) // 2)
    pairs = itertools.zip_longest(cells[:half], cells[half:], fillvalue=" | ")
    lines = [f"| {left} | {right} |" for left, right in pairs]
    table = ["| setting | value | setting | value |", "|---|---|---|---|", *lines]
    head = f"Scale **{settings.scale}**, expected time: {time}. This machine: {machine}."
    return f"{head} Runs are kept in `{runs.folder()}`.\n\n" + "\n".join(table)


def setting(value) -> str:
    """A value as a cell of the table; long ones are cut."""
    if isinstance(value, dict):
        value = [f"{key}={setting(inner)}" for key, inner in value.items()]
    words = " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
    return textwrap.shorten(words, 60, placeholder=" …")


def figure(key: str, ax, alt: str) -> None:
    """Show an axes' figure, or a figure, and keep it; `alt` says what is to be seen in it."""
    name("figure", key)
    picture = plots.picture(ax, alt)
    display(picture)
    display(Markdown(f"*{alt}.*"))
    _keep(("figure", key), picture)


def turn(key: str, draw, alt: str, **sliders) -> None:
    """Sliders over a picture (see `widgets.turn`), below its first state as a figure."""
    ax, said = draw(**{name: first for name, (_, first) in sliders.items()})
    figure(key, ax, alt)
    display(Markdown(said))
    widgets.turn(draw, alt, **sliders)


def measured(run: str, key: str, find, *arguments):
    """What `find(*arguments)` measures of a run, as `measure.once`; kept by `make report` alone."""
    _refuse_closed()
    again = getattr(now.settings, "retrain", False)
    keep = folder() == report.recorded_folder()
    return measure.once(run, key, find, *arguments, again=again, keep=keep)


def live(key: str) -> plots.Live:
    """An `on_epoch` hook that draws both accuracies; its last picture is kept."""
    hook = plots.Live()
    _keep(("figure", key), hook)
    return hook


def table(heading: str, rows: list) -> None:
    """Show rows (see `report.table`) as a table, and keep it under a heading."""
    shown = report.table(rows)
    display(Markdown(shown))
    _keep(("table", heading), shown, heading)


def say(heading: str, sentence: str) -> None:
    """Show a sentence (Markdown), and keep it under a heading; "Result" comes first."""
    display(Markdown(sentence))
    _keep(("text", heading), sentence, heading)


def _keep(key: tuple, what, heading: str | None = None) -> None:
    """Keep what is shown, in the section where it was before, or in the one that is open."""
    _refuse_closed()
    now.section = now.section if heading is None else heading
    now.shown[key] = (now.shown.get(key, (now.section,))[0], what)


def _refuse_closed() -> None:
    if now is None:
        raise WorkbookError("no lesson is open; run the cell with lesson.start first")


def folder() -> Path:
    """Where the report goes: to `reports/` if WORKBOOK_REPORT is 1 (`make report`), the scale is
    not quick and no parameter was changed; else to `runs/reports/`."""
    real = now.settings.scale != "quick" and not now.changed
    asked = os.environ.get("WORKBOOK_REPORT") == "1"
    return report.recorded_folder() if asked and real else runs.folder("reports")


def finish(*used) -> None:
    """Write the report of what was shown; `used`: the runs that the numbers come from."""
    _refuse_closed()
    settings, pictures = now.settings, {}
    head = f"Scale: `{settings.scale}`."
    if settings.scale == "quick":
        head = "A **quick** run on the embedded sample: it shows that everything works, no more."
    if now.changed:
        head += f" Changed: {', '.join(f'{key}={vars(settings)[key]}' for key in now.changed)}."
    parts, sections = [head], dict.fromkeys(heading for heading, _ in now.shown.values())
    for heading in sorted(sections, key=lambda heading: heading != "Result"):
        parts += [f"## {heading}"] * bool(heading)
        for (_, key), (section, what) in now.shown.items():
            if section == heading:
                parts.append(_as_markdown(key, what, pictures))
    manifests = [getattr(run, "manifest", run) for run in used]
    path = report.write_report(folder(), settings.report, now.title, parts, manifests, pictures)
    print(f"report: {path}")


def _as_markdown(key: str, what, pictures: dict) -> str:
    """A part of the report; a picture's file goes to `pictures`, its text stands below it, too."""
    if isinstance(what, str):
        return what
    picture = getattr(what, "picture", what)
    if picture is None:  # of a training that did not come to an epoch
        return ""
    pictures[f"{now.settings.report}_{key}.png"] = picture.data
    return f"![{picture.alt}](figures/{now.settings.report}_{key}.png)\n\n*{picture.alt}.*"
