"""How a lesson starts and what it leaves: parameters, settings, what was shown, the report."""

import io
import json
import re
import sys
import types

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

from common import ROOT, WorkbookError, config, exercise, lesson, plots, report, runs, widgets

CELL = """scale: str = "quick"  # "quick", "laptop" or "full"
ratio: float = 0.5
epochs: int = None
seed: int = 0
model: str = None
storage: str = None
retrain: bool = None
augment: list = None
lam: float = None
more: dict = None
run: str = None
"""
ROWS = """
other:
  title: Other
  report: other_report
  quick: &row {minutes: 1, epochs: 3, batch_size: 50, augment: [flip], lam: 0.25}
  laptop: *row
  full: *row
toy:
  title: Toy
  report: toy_report
  runs: {laptop: toys}
  quick: *row
  laptop: {<<: *row, minutes: 2 to 3 hours, epochs: 9, other: {vgg16: {batch_size: 70}}}
  full: *row
"""


@pytest.fixture
def start(places, monkeypatch):
    """Open a lesson of its own with parameters given by papermill."""
    cell = dict(cell_type="code", metadata=dict(tags=["parameters"]), source=[CELL])
    (places / "Lab").mkdir()
    (places / "Lab" / "toy.ipynb").write_text(json.dumps(dict(cells=[cell])))
    (places / "Lab" / "settings.yaml").write_text(ROWS)
    monkeypatch.setattr(lesson, "ROOT", places)

    def run(**given):
        namespace = {}
        exec(CELL, namespace)
        namespace |= given
        injected = "\n".join(f"{key} = {value!r}" for key, value in given.items())
        return lesson.start("toy", namespace | dict(In=[CELL, f"# Parameters\n{injected}"]))

    return run


@pytest.fixture
def seen(monkeypatch):
    """What a lesson displays, in order."""
    shown = []
    monkeypatch.setattr(lesson, "display", shown.append)
    return shown


def test_settings_are_the_row_of_the_scale_then_parameters_then_more(start):
    assert (start().epochs, start().batch_size, start().run) == (3, 50, "lab-quick")
    assert start(scale="laptop").epochs == 9
    s = start(scale="laptop", epochs=5)
    assert (s.epochs, s.run, s.folder("main").name) == (5, "toys", "toys-main")
    assert start(more={"epochs": 7, "momentum": 0.5}).config().momentum == 0.5
    assert start(more={"epochs": 7}).epochs == 7 and start(run="mine").run == "mine"
    assert (start(lam=0).lam, start(augment=[]).augment, start().lam) == (0, [], 0.25)


def test_another_network_may_have_settings_of_its_own(start):
    assert start(scale="laptop").batch_size == start(scale="laptop", model="resnet17").batch_size == 50
    s = start(scale="laptop", model="vgg16")
    assert s.batch_size == 70 and start(scale="laptop", model="vgg16", more={"batch_size": 5}).batch_size == 5


def test_grading_takes_quick_and_no_parameter_of_the_student(start, monkeypatch):
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    s = start(scale="laptop", epochs=90, lam=77)
    assert (s.scale, s.epochs, s.lam) == ("quick", 3, 0.25)


@pytest.mark.parametrize(
    "given,here",
    (({}, False), (dict(scale="laptop"), False), (dict(storage="sqlite:///x"), False), (dict(retrain=True), True))
    + ((dict(epochs=5), True), (dict(more={"epochs": 5}), True), (dict(scale="full"), True)),
)
def test_recorded_runs_are_asked_for_unless_something_is_changed(start, given, here):
    assert start(**given).here is here


def test_the_config_is_that_of_the_settings_with_changes(start):
    s = start(more={"label_smoothing": 0.1})
    wanted = config.TrainConfig(epochs=3, batch_size=50, augment=("flip",), label_smoothing=0.1, lam=0.5)
    assert s.config(lam=0.5) == wanted
    assert start().config(patience=None).patience is None


def test_the_first_cell_shows_the_settings_that_count(start, seen, places):
    start(scale="laptop", lam=0.125, more={"momentum": 0.7}, storage="postgresql://me:secret@db/x")
    text = seen[0].data
    for part in ("**laptop**", "2 to 3 hours", "`lam` | 0.125", "`momentum` | 0.7", "`epochs` | 9", "`augment` | flip"):
        assert part in text
    assert str(places / "runs") in text and "thread" in text and "secret" not in text and "None" not in text
    start()
    assert "expected time: 1 min" in seen[1].data and "`epochs` | 3" in seen[1].data


@pytest.mark.parametrize(
    "wrong",
    ({"ratio": 1}, {"ratio": 1.5}, {"ratio": -0.1}, {"ratio": float("nan")}, {"ratio": "50%"}, {"ratio": "0,5"}, {"ratio": True},
     {"scale": "quik"}, {"scale": 1}, {"epochs": 0}, {"epochs": 2.5}, {"epochs": "true"}, {"epochs": [1, 2]},
     {"seed": 2**40}, {"seed": None}, {"scale": None}, {"run": "../x"}, {"model": "vgg"},
     {"more": {"momentun": 1}}, {"more": "lr=1"}, {"ratoi": 0.7}),
)  # fmt: skip
def test_illegal_values_are_named(start, wrong):
    with pytest.raises(WorkbookError, match=next(iter(wrong))) as caught:
        start(**wrong)
    assert "\n" not in str(caught.value)


def test_unknown_names_get_the_nearest(start):
    with pytest.raises(WorkbookError, match=r"unknown parameter 'ratoi' \(did you mean 'ratio'\?\)"):
        start(ratoi=0.7)
    with pytest.raises(WorkbookError, match="unknown lesson 'tow'.*did you mean 'toy'"):
        lesson.start("tow", {})


@pytest.mark.parametrize("cell", ("epochs = 3", "print(1)", "x: int = 1 / 2", "x: int = (", None))
def test_a_parameters_cell_that_cannot_be_read_is_one_line(start, places, cell):
    content = dict(cells=[dict(cell_type="code", metadata=dict(tags=["parameters"]), source=[cell or ""])])
    (places / "Lab" / "toy.ipynb").write_text(json.dumps(content)[: None if cell else 20])
    with pytest.raises(WorkbookError, match="^[^\n]*toy.ipynb cannot be read[^\n]*git checkout[^\n]*$"):
        start()


def test_two_folders_with_one_lesson_are_refused(start, places):
    (places / "Lab copy").mkdir()
    (places / "Lab copy" / "settings.yaml").write_text(ROWS)
    with pytest.raises(WorkbookError, match="both have 'other'; remove one"):
        start()


def test_without_a_start_nothing_is_shown_or_reported(start, monkeypatch):
    monkeypatch.setattr(lesson, "now", None)
    for call in (lesson.finish, lambda: lesson.say("Result", "x")):
        with pytest.raises(WorkbookError, match="run the cell with lesson.start first"):
            call()


def test_settings_that_contradict_each_other_end_before_anything_runs(start):
    with pytest.raises(WorkbookError, match="warmup=5 fills epochs=3"):
        start(more={"warmup": 5})
    for key, value in (("momentum", 5), ("lr", None)):
        with pytest.raises(WorkbookError, match=f"{key}={value} is not legal"):
            start(more={key: value})


def test_nothing_is_changed_in_place(start):
    """Running the first cell again gives the same, whatever was given in between."""
    first = vars(start())
    start(epochs=8, more={"momentum": 0.1})
    assert vars(start()) == first


@pytest.fixture
def manifest(small, places):
    from common import models, runs, train

    settings = config.TrainConfig(epochs=1, batch_size=50)
    return train.fit(models.build("resnet17", width=4), small, settings, runs.folder("own"))


def axes(value):
    ax = plt.subplots()[1]
    ax.plot([0, value])
    return ax


def test_what_is_shown_is_what_is_reported_in_order_with_the_result_first(start, manifest, places, seen):
    start()
    lesson.figure("first", axes(1), "A line that rises")
    lesson.table("Sizes", [dict(network="a", params=1000), dict(network="b", params=2000)])
    lesson.say("Sizes", "Two networks.")
    lesson.say("Result", "It is 5.")
    lesson.say("Result", "It is 6.")  # the cell was run again
    lesson.figure("first", axes(2), "A line that rises")
    live = lesson.live("curve")
    live(dict(epoch=1, train_accuracy=0.1, val_accuracy=0.2))
    lesson.live("never")
    other = dict(manifest.manifest, name="second")
    lesson.finish(manifest, other)
    text = (places / "runs" / "reports" / "toy_report.md").read_text()
    assert "quick" in text.splitlines()[2] and "Changed" not in text
    order = [
        "# Toy",
        "## Result",
        "It is 6.",
        "toy_report_curve.png",
        "*A line that rises.*",
        "## Sizes",
        "1,000",
        "2,000",
        "Two networks.",
    ]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    assert "It is 5." not in text and text.count("toy_report_first.png") == 1 and "never" not in text
    assert [text.count(f"- `{name}`: 1 epochs") for name in ("own", "second")] == [1, 1]
    assert len(list((places / "runs" / "reports" / "figures").glob("*.png"))) == 2
    shown = [getattr(what, "data", what) for what in seen]
    assert sum("1,000" in str(what) for what in shown) == 1 and "It is 5." in shown and "Two networks." in shown
    assert sum(isinstance(what, bytes) for what in shown) == 2


def test_a_refused_report_writes_nothing(start, manifest, places, small, monkeypatch):
    """A run whose name was recorded by another training stops the whole report."""
    report.record("own", small)
    monkeypatch.setenv("WORKBOOK_REPORT", "1")
    start(scale="laptop")
    lesson.figure("first", axes(1), "A line")
    before = {path for path in places.rglob("*") if path.is_file()}
    with pytest.raises(WorkbookError, match="own was recorded from another training"):
        lesson.finish(dict(manifest.manifest, name="new"), dict(manifest.manifest, seconds=1.0))
    assert {path for path in places.rglob("*") if path.is_file()} == before


def test_a_figure_is_a_name(start):
    start()
    with pytest.raises(WorkbookError, match="figure='../x' is not legal"):
        lesson.figure("../x", axes(1), "A line")
    plt.close("all")


def test_a_picture_has_words(start):
    picture = plots.picture(axes(1), "A line that rises")
    assert picture.alt == picture.metadata["alttext"] == "A line that rises"
    assert picture.data[:4] == b"\x89PNG" and not plt.get_fignums()


MINE = (("1", dict(scale="laptop")), ("1", dict(scale="laptop", ratio=0.5)), ("1", dict(scale="laptop", retrain=True)),
        ("1", dict(scale="laptop", storage="postgresql://me:secret@db/x")))  # fmt: skip
OTHERS = (("1", dict()), ("0", dict(scale="laptop")), (None, dict(scale="laptop")))
CHANGED = (dict(ratio=0.7), dict(epochs=2), dict(seed=1), dict(more={"momentum": 0.5}), dict(model="vgg16"), dict(run="x"))


@pytest.mark.parametrize(
    "asked,given,where",
    [(*case, "reports") for case in MINE] + [(*case, "runs/reports") for case in OTHERS]
    + [("1", dict(scale="laptop", **case), "runs/reports") for case in CHANGED],
)  # fmt: skip
def test_only_make_report_writes_to_reports_and_only_with_the_settings_of_a_scale(
    start, manifest, places, monkeypatch, asked, given, where
):
    monkeypatch.setenv("WORKBOOK_REPORT", asked) if asked else monkeypatch.delenv("WORKBOOK_REPORT", raising=False)
    start(**given)
    lesson.say("Result", "x")
    lesson.finish(manifest)
    assert [path.parent for path in places.rglob("toy_report.md")] == [places / where]
    text = (places / where / "toy_report.md").read_text()
    changed = [key for key in given if f"{key}=" in text.split("##")[0]]
    assert changed == [key for case in CHANGED for key in case if given.get(key) == case[key]] and "secret" not in text


def test_every_parameter_of_the_notebooks_has_a_rule_and_a_legal_default():
    found = 0
    for folder in ("Lab1", "Lab2", "Assignment_MobileNet"):
        for path in sorted((ROOT / folder).glob("*.ipynb")):
            defaults = lesson.parameters(path)
            lesson.check(defaults, defaults)
            lab, about = lesson.find(path.stem)
            assert lab == path.parent and {"quick", "laptop", "full", "title", "report"} <= set(about)
            found += 1
    assert found == 9


@pytest.mark.parametrize("lab", ("Lab1", "Lab2", "Assignment_MobileNet"))
def test_no_setting_is_written_in_vain(lab):
    """Each is a field of TrainConfig, a parameter, or read by its lesson as `s.key`."""
    for name, about in lesson.read_yaml(ROOT / lab / "settings.yaml").items():
        path = ROOT / lab / f"{name}.ipynb"
        text, known = path.read_text(), {*config.FIELDS, *lesson.parameters(path), "minutes", "other"}
        keys = {key for scale in ("quick", "laptop", "full") for key in about[scale]}
        assert not [key for key in keys - known if f"s.{key}" not in text]


@pytest.mark.parametrize("path", [path for lab in ("Lab1", "Lab2", "Assign*") for path in ROOT.glob(f"{lab}/*.ipynb")])
def test_nothing_shown_in_two_cells_has_one_name(path):
    """The second would take the place of the first in the report."""
    code = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    calls = [set(re.findall(r"lesson\.(figure|table|say|live)\(\s*\"([^\"]+)", source)) for source in code]
    names = [("figure" if kind == "live" else kind, name) for found in calls for kind, name in found]
    assert len(names) == len(set(names)), [name for name in names if names.count(name) > 1]


def test_what_was_measured_of_a_run_is_kept_by_a_report_alone(start, manifest, places, monkeypatch, capsys):
    """A key that is kept is not measured again; with `retrain` it is, and nothing but a report keeps it."""
    path = runs.recorded("one", "run.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(manifest.manifest | dict(recorded={}, name="one")))
    calls = []

    def find(*arguments):
        calls.append(arguments)
        return [len(calls), *arguments]

    start(scale="laptop")
    assert lesson.measured("one", "sweep", find, 5) == [1, 5] and "measured" not in json.loads(path.read_text())
    monkeypatch.setenv("WORKBOOK_REPORT", "1")
    start(scale="quick")
    assert lesson.measured("one", "sweep", find) == [2] and "measured" not in json.loads(path.read_text())
    start(scale="laptop")
    assert lesson.measured("one", "sweep", find) == [3]
    kept = json.loads(path.read_text())["measured"]["sweep"]
    assert kept["found"] == [3] and kept["machine"]["threads"] == torch.get_num_threads()
    monkeypatch.delenv("WORKBOOK_REPORT")
    start(scale="quick")
    capsys.readouterr()
    assert lesson.measured("one", "sweep", find) == [3] and "sweep of one: recorded, on" in capsys.readouterr().out
    assert lesson.measured("one", "other", find) == [4]
    start(scale="laptop", retrain=True)
    assert lesson.measured("one", "sweep", find) == [3], "of a run without weights nothing can be measured"
    weights = runs.recorded("one", "best.pt")
    weights.parent.mkdir(parents=True, exist_ok=True)
    weights.touch()
    assert lesson.measured("one", "sweep", find) == [5] and json.loads(path.read_text())["measured"]["sweep"]["found"] == [3]


def written(code):
    """A function `mine` of a module of its own, as in a notebook."""
    module = types.ModuleType("written")
    sys.modules["written"] = module
    exec(code, module.__dict__)
    return module.mine


@pytest.mark.parametrize(
    "code",
    (
        "from common import slimming\ndef mine(x): return slimming.gap(x)",
        "from common.slimming import gap as own\ndef mine(x): return own(x)",
        "import common.slimming\ndef mine(x): return common.slimming.gap(x)",
        "def mine(x):\n from common import slimming\n return slimming.gap(x)",
        "from common import slimming\ndef mine(x): return [slimming.gap(y) for y in x]",
        "from common import slimming\ndef mine(x):\n def inner(): return slimming.gap(x)\n return inner()",
        "from common.models.resnet import Block\nclass mine:\n def __init__(self): self.inside = Block()",
        "from common.models.resnet import Block\nclass mine(Block): pass",
        "from common.slimming import gap as mine",
        "from common.slimming import gap\ndef f(x): return gap(x)\ndef mine(x): return f(x)",
        "from common.slimming import gap\ndef mine(x, f=gap): return f(x)",
        "from common.slimming import gap\nclass mine:\n @staticmethod\n def f(x): return gap(x)",
        "from common.slimming import gap\nclass mine:\n @property\n def f(self): return gap(self)",
    ),
)
def test_a_solution_that_calls_the_working_version_is_refused(code):
    with pytest.raises(AssertionError, match="^(mine|gap) uses .*, which has the working version; write it yourself$"):
        exercise.own(written(code))


@pytest.mark.parametrize(
    "code",
    (
        "import torch\ndef mine(x): return torch.sum(x)",
        "from common import data\ndef mine(x): return x.data",  # an attribute of the same name
        "from common import data\ndef mine(data): return data",
        "def mine(x): return len(undefined)",
        "class mine:\n width = 3\n def forward(self, x): return abs(x)",
        "import torch\nclass mine(torch.nn.Module):\n def forward(self, x): return torch.relu(x)",
        "def mine(n): return n * mine(n - 1) if n else 1",
        "x = 'common'\ndef mine(n): return x",
    ),
)
def test_a_solution_of_ones_own_passes(code):
    exercise.own(written(code))


def test_what_is_no_function_is_refused():
    with pytest.raises(AssertionError, match="this is no function or class"):
        exercise.own(None)


def test_a_slider_redraws_keeps_what_it_drew_and_closes_its_figures():
    calls = []

    def draw(a, b):
        calls.append((a, b))
        ax = plots.plt.subplots(figsize=(3, 2))[1]
        ax.plot([a, b])
        return ax, f"{a} < {b}"

    box = widgets.turn(draw, "a line", a=([1, 2, 3], 2), b=([0.5, 1.5], 1.5))
    *sliders, sentence, picture = box.children
    first = picture.value
    assert calls == [(2, 1.5)] and sentence.value == "2 &lt; 1.5" and first[:4] == b"\x89PNG"
    sliders[0].value = 3
    assert calls[-1] == (3, 1.5) and sentence.value == "3 &lt; 1.5" and picture.value != first
    sliders[0].value = 2
    assert len(calls) == 2 and picture.value == first, "drawn once"
    assert not plots.plt.get_fignums(), "no figure stays open"
    assert all(not slider.continuous_update for slider in sliders), "it draws when the hand lets go"
    assert {Image.open(io.BytesIO(data)).size for data in (first, picture.value)} == {(330, 220)}


def test_above_a_slider_stands_its_first_state(start, seen):
    start()
    shown = []
    draw = lambda a: (shown.append(a) or plots.plt.subplots()[1], f"value {a}")
    lesson.turn("turned", draw, "what is to be seen", a=([1, 2], 2))
    assert ("figure", "turned") in lesson.now.shown and shown == [2, 2]


def test_a_cut_shows_what_the_masks_remove_wherever_it_stands():
    """Not the lowest of all: a mask of every layer may keep a low score and remove a high one."""
    scores = {"a": torch.tensor([0.1, 0.2]), "b": torch.tensor([0.01, 0.5])}
    masks = {"a": torch.tensor([False, True]), "b": torch.tensor([True, False])}
    removed, kept = plots.cut(scores, masks).lines
    assert removed.get_ydata().tolist() == pytest.approx([0.1, 0.5])
    assert kept.get_ydata().tolist() == pytest.approx([0.01, 0.2])
    assert removed.get_xdata().tolist() == [1, 3] and kept.get_xdata().tolist() == [0, 2]
