"""Notebook parameters and reports."""

import dataclasses
import json
import types

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F

from common import ROOT, WorkbookError, evaluate, params, report, runs
from common.config import TrainConfig

RULES = dict(scale=params.one_of(params.SCALES), ratio=params.number(0, below=1), epochs=params.optional(params.whole(1)))
GOOD = dict(scale="quick", ratio=0.5, epochs=None)


def test_legal_parameters_pass():
    params.check(GOOD, **RULES)
    params.check(GOOD | dict(epochs=3, ratio=0), **RULES)


@pytest.mark.parametrize(
    "wrong",
    ({"ratio": 1}, {"ratio": 1.5}, {"ratio": -0.1}, {"ratio": float("nan")}, {"ratio": "50%"}, {"ratio": "0,5"}, {"ratio": True},
     {"scale": "quik"}, {"scale": 1}, {"epochs": 0}, {"epochs": 2.5}, {"epochs": "true"}, {"epochs": [1, 2]}),
)  # fmt: skip
def test_illegal_values_are_named(wrong):
    with pytest.raises(WorkbookError, match=next(iter(wrong))) as caught:
        params.check(GOOD | wrong, **RULES)
    assert "\n" not in str(caught.value)


def test_unknown_names_get_the_nearest():
    cells = ["", "ratio: float = 0.5", "# Parameters\nratoi = 0.7\n"]
    with pytest.raises(WorkbookError, match=r"unknown parameter 'ratoi' \(did you mean 'ratio'\?\)"):
        params.check(GOOD | dict(In=cells, ratoi=0.7), **RULES)


def test_names_of_the_notebook_itself_are_not_parameters():
    params.check(GOOD | dict(In=["x = 3", "# Parameters\nratio = 0.5"], x=3), **RULES)


def test_a_mapping_names_its_unknown_keys():
    rule = params.optional(params.mapping(("lr", "momentum")))
    rule("more", None), rule("more", {"lr": 1})
    with pytest.raises(WorkbookError, match="unknown key of more 'momentun'.*did you mean 'momentum'"):
        rule("more", {"momentun": 0.9})
    with pytest.raises(WorkbookError, match="give a mapping, with papermill as -y"):
        rule("more", "lr=1")


def test_settings_take_overrides():
    assert params.settings({"quick": dict(a=1, b=2)}, "quick", a=None, b=5) == dict(a=1, b=5)


def test_table_marks_what_was_not_run():
    text = report.table([dict(network="a", params=1000, accuracy=0.5), dict(network="b", accuracy=None)])
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    assert "1,000" in lines[2] and "50.00%" in lines[2] and lines[3].count("not run") == 2


@pytest.fixture
def manifest():
    machine = dict(cpu="x", cores=2, threads=2, gpu=None, torch="2")
    best = dict(epoch=2, val_accuracy=0.5)
    row = dict(name="run", finished=True, epochs=3, seconds=60, commit="abc", machine=machine, best=best)
    return row | dict(
        config=json.loads(json.dumps(dataclasses.asdict(TrainConfig()))),
        data=dict(name="d", train=10, val=5),
        spec=dict(name="resnet17"),
    )


def test_quick_reports_never_touch_committed_ones(manifest, tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    monkeypatch.setattr(params, "standard", True)
    figure = plt.subplots()[0]
    report.write_file(tmp_path / "run" / "history.csv", "epoch,val_accuracy\n1,0.5\n")
    report.write_file(tmp_path / "run" / "run.json", json.dumps(manifest))
    path = report.write_report("lab", "quick", "Title", ["text ![](plot)"], dict(plot=figure), [manifest])
    assert path.is_relative_to(tmp_path) and "quick" in path.read_text()
    assert (path.parent / "figures" / "lab_plot.png").stat().st_size > 1000
    assert json.loads((path.parent / "runs" / "run.json").read_text()) == manifest
    assert (path.parent / "runs" / "run.csv").read_text() == "epoch,val_accuracy\n1,0.5\n"
    assert "run" in (path.parent / "README.md").read_text()
    assert report.report_folder("laptop") == ROOT / "reports"


def test_the_history_of_another_run_stays_out(manifest, tmp_path, monkeypatch):
    """A run of that name was trained here, but the report is about one of another machine."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    report.write_file(tmp_path / "run" / "history.csv", "epoch,val_accuracy\n1,0.5\n")
    report.write_file(tmp_path / "run" / "run.json", json.dumps(manifest | dict(seconds=61)))
    path = report.write_report("lab", "quick", "Title", ["text"], {}, [manifest])
    assert (path.parent / "runs" / "run.json").exists() and not (path.parent / "runs" / "run.csv").exists()
    report.write_report("lab", "quick", "Title", ["text"], {}, [manifest | dict(seconds=61)])
    assert (path.parent / "runs" / "run.csv").exists()
    report.write_report("lab", "quick", "Title", ["text"], {}, [manifest])
    assert not (path.parent / "runs" / "run.csv").exists(), "not that of an earlier report either"


def test_a_run_of_two_machines_names_both(manifest):
    other = manifest["machine"] | dict(cpu="y", threads=1)
    parts = [dict(machines=[manifest["machine"]]), dict(machines=[other])]
    assert "min on x, 2 threads, then on y, 1 threads, torch" in report.provenance(manifest | dict(parts=parts))


def test_columns_say_what_they_hold():
    row = dict(lr=0.05, weight_decay=5e-4, minutes=3.5, seconds=12.34, loss=1.5, accuracy=0.5)
    assert [report.cell(*item) for item in row.items()] == ["0.05", "0.0005", "3.5", "12.3", "1.500", "50.00%"]


def test_changed_settings_never_replace_the_standard_report(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    rules = dict(scale=params.one_of(params.SCALES), ratio=params.number(0, below=1))
    for cell, folder in (("scale = 'laptop'", ROOT), ("scale = 'laptop'\nratio = 0.7", tmp_path), ("", tmp_path)):
        params.check(dict(scale="laptop", ratio=0.5, In=["", f"# Parameters\n{cell}"]), **rules)
        assert report.report_folder("laptop") == folder / "reports"
    params.check(dict(scale="laptop", ratio=0.7, In=["# Parameters\nscale = 'laptop'\nratio = 0.7"]), ("ratio",), **rules)
    assert params.standard
    params.check(dict(scale="laptop", ratio=0.7, In=["scale: str = 'laptop'\nratio: float = 0.7"]), **rules)
    assert not params.standard, "a cell edited by hand does not tell what was changed"


def test_a_figure_that_is_not_shown_is_an_error(manifest, tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    with pytest.raises(WorkbookError, match="plot"):
        report.write_report("lab", "quick", "Title", ["text"], dict(plot=plt.figure()), [manifest])
    assert not list(tmp_path.rglob("*.md"))


def test_the_index_hides_validation_only_where_it_was_trained_on(manifest, tmp_path):
    for name, train in (("held", 45_000), ("all", 50_000)):
        row = manifest | dict(name=name, data=dict(name="cifar10", train=train, val=5000))
        report.write_file(tmp_path / "runs" / f"{name}.json", json.dumps(row))
    report.write_index(tmp_path)
    rows = {line.split("]")[0].split("[")[1]: line for line in (tmp_path / "README.md").read_text().splitlines() if "[" in line}
    assert "| 50.00%" in rows["held"] and "50.00%" not in rows["all"] and "| –" in rows["all"]


def test_the_index_puts_single_view_and_tta_beside_published_figures(manifest, tmp_path):
    for seed, top1 in enumerate((0.5, 0.6)):
        row = manifest | dict(
            test=dict(accuracy=top1), test_tta=dict(accuracy=top1 + 0.1), data=dict(manifest["data"], name="cifar10")
        )
        report.write_file(tmp_path / "runs" / f"run-{seed}.json", json.dumps(row))
    entries = [dict(what="theirs", accuracy="90 %", runs=["run-0", "run-1"], differs="all"),
               dict(what="another's", accuracy="95 %", runs=["none"], differs="all")]  # fmt: skip
    report.write_file(tmp_path / "published.json", json.dumps(entries))
    report.write_index(tmp_path)
    rows = {
        line.split("|")[1].strip(): line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("|")
    }
    assert "| 55.00% ± 7.07% (n = 2) | 65.00% ± 7.07% (n = 2) |" in rows["theirs"]
    assert rows["another's"].count("not run") == 2


def test_a_note_stands_with_its_run(manifest):
    assert report.provenance(manifest | dict(note="Shared machine.")) == report.provenance(manifest) + ". Shared machine."


def test_results_join_the_manifest(tmp_path, manifest):
    report.write_file(tmp_path / "run" / "run.json", json.dumps(manifest))
    assert runs.save_result(tmp_path / "run", test=dict(accuracy=0.9))["test"]["accuracy"] == 0.9
    assert runs.load_manifest(tmp_path / "run") == manifest | dict(test=dict(accuracy=0.9))
    (tmp_path / "run").rename(tmp_path / "copy")
    assert runs.load_manifest(tmp_path / "copy")["name"] == "copy"
    with pytest.raises(WorkbookError, match="no manifest"):
        runs.load_manifest(tmp_path / "sub" / "model.pt")


def test_verdict_holds_the_difference_against_the_spread():
    assert "unknown" in evaluate.verdict([0.5], [0.6, 0.61])
    far, near = evaluate.verdict([0.70, 0.71], [0.60, 0.61]), evaluate.verdict([0.70, 0.60], [0.66, 0.61])
    assert far.startswith("+10.00 points, which exceeds") and "does not exceed" in near
    assert far.endswith("(± 3.04 points, 95 %)")  # pooled deviation and standard error 0.00707, times 4.30
    more = evaluate.verdict([0.70, 0.71], [0.60, 0.61], [[0.5, 0.51]] * 6 + [[0.9]])
    assert more.endswith("(± 1.63 points, 95 %)")  # the same deviation from eight pairs: 2.31 instead of 4.30
    assert "unknown" in evaluate.verdict([], [0.6, 0.61], [[0.5, 0.51]] * 6)


def test_mean_and_deviation_say_n():
    assert report.mean_std([0.5, 0.6]) == "55.00% ± 7.07% (n = 2)"
    assert report.mean_std([0.5]) == "50.00% (n = 1)" and report.mean_std([]) == "not run"


def test_test_images_are_measured_once(manifest, tmp_path, monkeypatch, sample):
    calls, labels = [], sample.test.y[:10]

    def answer(model, images, spec, tta):
        """Logits that are right for the first 5, 6, 7 of ten images."""
        calls.append(tta)
        given = torch.where(torch.arange(10) < 5 + tta, labels, (labels + 1) % 10)
        return F.one_hot(given, 10).float()

    monkeypatch.setattr(report, "predict", answer)
    (tmp_path / "run.json").write_text(json.dumps(manifest))

    def loaded():
        manifest = json.loads((tmp_path / "run.json").read_text())
        return types.SimpleNamespace(model=None, manifest=manifest, folder=tmp_path)

    split = types.SimpleNamespace(test=sample.test[:10], spec=None)
    for _ in range(2):
        assert [round(report.tested(loaded(), split, tta)["accuracy"], 4) for tta in (0, 1, 2)] == [0.5, 0.6, 0.7]
    assert calls == [0, 1, 2]
    assert (runs.load_answers(tmp_path) == labels).tolist() == [True] * 5 + [False] * 5
    other = types.SimpleNamespace(test=sample.test[:40], spec=None)
    with pytest.raises(WorkbookError, match="was tested on other images"):
        report.tested(loaded(), other)
    before = json.loads((tmp_path / "run.json").read_text())
    del before["test"]["pixels"]  # made before digests
    (tmp_path / "run.json").write_text(json.dumps(before))
    assert report.tested(loaded(), other)["accuracy"] == 0.5
