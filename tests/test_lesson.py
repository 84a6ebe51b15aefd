"""How a lesson starts and what it leaves: parameters, settings, what was shown, the report."""

import json

import matplotlib.pyplot as plt
import pytest

from common import ROOT, WorkbookError, config, lesson, plots

CELL = """scale: str = "quick"  # "quick", "laptop" or "full"
ratio: float = 0.5
epochs: int = None
seed: int = 0
more: dict = None
run: str = None
"""
ROWS = """
toy:
  title: Toy
  report: toy_report
  runs: {laptop: toys}
  quick: &row {minutes: 1, epochs: 3, batch_size: 50, augment: [flip]}
  laptop: {<<: *row, minutes: 2, epochs: 9}
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


def test_settings_are_the_row_of_the_scale_then_parameters_then_more(start):
    assert (start().epochs, start().batch_size, start().run) == (3, 50, "lab-quick")
    s = start(scale="laptop", epochs=5)
    assert (s.epochs, s.run, s.folder("main").name) == (5, "toys", "toys-main")
    assert start(more={"epochs": 7, "momentum": 0.5}).config().momentum == 0.5
    assert start(run="mine").run == "mine"


def test_the_config_is_that_of_the_settings_with_changes(start):
    s = start(more={"label_smoothing": 0.1})
    wanted = config.TrainConfig(epochs=3, batch_size=50, augment=("flip",), label_smoothing=0.1, lam=0.5)
    assert s.config(lam=0.5) == wanted
    assert start().config(patience=None).patience is None


@pytest.mark.parametrize(
    "wrong",
    ({"ratio": 1}, {"ratio": 1.5}, {"ratio": -0.1}, {"ratio": float("nan")}, {"ratio": "50%"}, {"ratio": "0,5"}, {"ratio": True},
     {"scale": "quik"}, {"scale": 1}, {"epochs": 0}, {"epochs": 2.5}, {"epochs": "true"}, {"epochs": [1, 2]},
     {"seed": 2**40}, {"run": "../x"}, {"more": {"momentun": 1}}, {"more": "lr=1"}, {"ratoi": 0.7}),
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


def test_settings_that_contradict_each_other_end_before_anything_runs(start):
    with pytest.raises(WorkbookError, match="warmup=5 fills epochs=3"):
        start(more={"warmup": 5})


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


def test_what_is_shown_is_what_is_reported_in_order_with_the_result_first(start, manifest, places):
    start()
    lesson.figure("first", axes(1), "A line that rises")
    lesson.table("Sizes", [dict(network="a", params=1000)])
    lesson.say("Result", "It is 5.")
    lesson.say("Result", "It is 6.")  # the cell was run again
    lesson.figure("first", axes(2), "A line that rises")
    live = lesson.live("curve")
    live(dict(epoch=1, train_accuracy=0.1, val_accuracy=0.2))
    lesson.finish(manifest)
    text = (places / "runs" / "reports" / "toy_report.md").read_text()
    order = ["# Toy", "## Result", "It is 6.", "figures/toy_report_curve.png", "A line that rises", "## Sizes", "1,000", "`own`"]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    assert "It is 5." not in text and text.count("figures/toy_report_first.png") == 1
    assert len(list((places / "runs" / "reports" / "figures").glob("*.png"))) == 2
    assert (places / "runs" / "reports" / "runs" / "own.json").exists()


def test_a_picture_has_words(start):
    picture = plots.picture(axes(1), "A line that rises")
    assert picture.alt == picture.metadata["alttext"] == "A line that rises"
    assert picture.data[:4] == b"\x89PNG" and not plt.get_fignums()


@pytest.mark.parametrize(
    "asked,given,where",
    (("1", dict(scale="laptop"), "reports"), ("1", dict(), "runs/reports"), ("0", dict(scale="laptop"), "runs/reports"),
     (None, dict(scale="laptop"), "runs/reports"), ("1", dict(scale="laptop", ratio=0.7), "runs/reports"),
     ("1", dict(scale="laptop", ratio=0.5), "reports")),
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
    assert ("Changed: ratio=0.7" in text) == (given.get("ratio") == 0.7)


def test_every_parameter_of_the_notebooks_has_a_rule_and_a_legal_default():
    found = 0
    for folder in ("Lab1", "Lab2", "Assignment_MobileNet"):
        for path in sorted((ROOT / folder).glob("*.ipynb")):
            lesson.check(lesson.parameters(path))
            lab, about = lesson.find(path.stem)
            assert lab == path.parent and {"quick", "laptop", "full", "title", "report"} <= set(about)
            found += 1
    assert found == 9
