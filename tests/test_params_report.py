"""Notebook parameters and reports."""

import dataclasses
import json
import types

import pytest
import torch
import torch.nn.functional as F

from common import WorkbookError, evaluate, report, runs
from common.config import TrainConfig


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


def test_a_report_has_the_manifests_and_curves_of_its_runs(manifest, tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    report.write_file(tmp_path / "run" / "history.csv", "epoch,val_accuracy\n1,0.5\n")
    report.write_file(tmp_path / "run" / "run.json", json.dumps(manifest))
    path = report.write_report(tmp_path / "out", "lab", "Title", ["text"], [manifest])
    assert "# Title" in path.read_text() and "text" in path.read_text() and "`run`: 3 epochs" in path.read_text()
    assert json.loads((path.parent / "runs" / "run.json").read_text()) == manifest
    assert (path.parent / "runs" / "run.csv").read_text() == "epoch,val_accuracy\n1,0.5\n"
    assert "run" in (path.parent / "README.md").read_text() and "before" not in path.read_text()
    report.write_file(tmp_path / "out" / "history" / "lab.md", "# Tried")
    path = report.write_report(tmp_path / "out", "lab", "Title", ["text"], [manifest])
    assert "[What was tried before](history/lab.md)." in path.read_text()


def test_the_history_of_another_run_stays_out(manifest, tmp_path, monkeypatch):
    """A run of that name was trained here, but the report is about one of another machine."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    report.write_file(tmp_path / "run" / "history.csv", "epoch,val_accuracy\n1,0.5\n")
    report.write_file(tmp_path / "run" / "run.json", json.dumps(manifest | dict(seconds=61)))

    def written(manifest):
        path = report.write_report(tmp_path / "out", "lab", "Title", ["text"], [manifest])
        return (path.parent / "runs" / "run.csv").exists()

    assert not written(manifest)
    assert written(manifest | dict(seconds=61))
    assert not written(manifest), "not that of an earlier report either"


def test_a_run_of_two_machines_names_both(manifest):
    other = manifest["machine"] | dict(cpu="y", threads=1)
    parts = [dict(machines=[manifest["machine"]]), dict(machines=[other])]
    assert "min on x, 2 threads, then on y, one thread, torch" in report.provenance(manifest | dict(parts=parts))


def test_columns_say_what_they_hold():
    row = dict(lr=0.05, weight_decay=5e-4, minutes=3.5, seconds=12.34, val_loss=1.5, accuracy=0.5)
    assert [report.cell(*item) for item in row.items()] == ["0.05", "0.0005", "3.5", "12.3", "1.500", "50.00%"]


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
