"""Recorded runs: what is kept of them, who finds them, and what a damaged file leads to."""

import copy
import json
import re
import shutil

import experiment
import pytest
import torch
import yaml

from common import ROOT, WorkbookError, cli, config, data, measure, models, report, runs, slimming, sweep, train
from common.config import TrainConfig
from common.evaluate import paired, predict
from common.models import files
from common.train import fit

CONFIG = TrainConfig(epochs=2, batch_size=50, optimizer="muon", lr=0.1, momentum=0.6, lam=0.01)
TINY = dict(depth=3, gammas=True, cfg=[8, 8, 8, 8, 8, 8])


def network(split, seed=0):
    x = data.normalise(split.train.x, split.spec)
    return models.fresh("fastnet", seed, x, **TINY)


@pytest.fixture
def once(places, small):
    """A run "once", trained and recorded with its weights; its folder is gone, and no run may be trained."""
    run = fit(network(small), small, CONFIG, runs.folder("once"))
    report.record("once", small, weights=True)
    run.manifest = runs.load_manifest("once")
    shutil.rmtree(runs.folder("once"))
    return run


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def no_training(monkeypatch):
    def refuse(*_):
        raise AssertionError("a recorded run was trained")

    monkeypatch.setattr(train, "Learner", refuse)


def test_a_recorded_run_is_not_trained_again(once, small, monkeypatch, capsys):
    no_training(monkeypatch)
    rows = []
    run = fit(network(small), small, CONFIG, runs.folder("once"), on_epoch=rows.append)
    assert run.history == rows == once.history and run.manifest == once.manifest
    assert same_weights(run.model, files.rounded(once.model))
    assert re.search(r"^once: recorded, 0 minutes on .*retrain=True", capsys.readouterr().out)
    assert not runs.folder("once").exists()


def test_runs_are_found_by_name_and_by_folder(once):
    for run in ("once", runs.folder("once"), str(runs.folder("once"))):
        assert runs.load_manifest(run) == once.manifest and runs.load_run(run).history == once.history
        assert same_weights(runs.load_model(run), files.rounded(once.model))
    with pytest.raises(WorkbookError, match="not a 'resnet17'"):
        runs.load_model("once", expect="resnet17")
    with pytest.raises(WorkbookError, match="does not exist"):
        runs.load_model("elsewhere")


def test_what_is_recorded_is_as_good_as_the_run(once, small):
    kept = runs.load_model("once")
    assert all(torch.equal(a, b) for a, b in zip(slimming.gammas(kept), slimming.gammas(once.model)))
    state = torch.load(runs.recorded("once", "best.pt"), weights_only=True)["state_dict"]
    kinds = {name: value.dtype for name, value in state.items() if value.is_floating_point()}
    assert {kind for name, kind in kinds.items() if "bn" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if "bn" not in name} == {torch.float16}
    answers = runs.load_answers("once")
    assert torch.equal(answers, predict(once.model, small.test, small.spec).argmax(1).byte())
    assert float((answers == small.test.y).float().mean()) == pytest.approx(once.manifest["test"]["accuracy"])


def test_retrain_and_other_settings_train(once, small, capsys):
    other = config.dataclasses.replace(CONFIG, lr=0.05)
    assert "recorded" not in fit(network(small), small, other, runs.folder("once")).manifest
    assert "the recorded run has lr=0.1, not 0.05: it is trained here" in capsys.readouterr().out
    shutil.rmtree(runs.folder("once"))
    run = fit(network(small), small, CONFIG, runs.folder("once"), retrain=True)
    assert "recorded" not in run.manifest and len(run.manifest["parts"]) == 1
    assert "recorded" not in capsys.readouterr().out


@pytest.mark.parametrize("differs", ("weights", "pixels", "sha256", "cfg"))
def test_another_start_or_other_data_train(once, small, differs, capsys):
    split, net = small, network(small)
    if differs == "weights":
        net = network(small, seed=1)
    elif differs == "cfg":
        net = models.fresh("fastnet", 0, data.normalise(small.train.x, small.spec), **TINY | dict(cfg=[8, 8, 8, 8, 8, 9]))
    else:
        images = copy.deepcopy(small.train)
        (images.x if differs == "pixels" else images.y)[0] += 1
        split = data.Split(images, small.val, small.test, small.spec, small.class_names)
    fit(net, split, CONFIG, runs.folder("once"))
    assert f"the recorded run has {differs}=" in capsys.readouterr().out


def test_a_start_from_another_run_is_told_by_init(places, small, monkeypatch):
    """Its weights may differ, as where they were recalibrated on another machine."""
    told = config.dataclasses.replace(CONFIG, init="sparse, gap")
    fit(network(small), small, told, runs.folder("once"))
    report.record("once", small)
    shutil.rmtree(runs.folder("once"))
    no_training(monkeypatch)
    assert fit(network(small, seed=1), small, told, runs.folder("once")).manifest["config"]["init"] == "sparse, gap"


def test_an_unfinished_folder_hides_no_record(once, small):
    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(network(small), small, CONFIG, runs.folder("once"), on_epoch=stop, retrain=True)
    assert runs.load_manifest("once") == once.manifest
    assert same_weights(runs.load_model("once"), files.rounded(once.model))
    assert "recorded" not in fit(network(small), small, CONFIG, runs.folder("once")).manifest, "what was begun goes on"


def test_a_run_of_ones_own_comes_first(once, small):
    own = fit(network(small), small, CONFIG, runs.folder("once"), retrain=True)
    again = fit(network(small), small, CONFIG, runs.folder("once"))
    assert same_weights(again.model, own.model) and not same_weights(own.model, files.rounded(own.model))
    assert "recorded" not in runs.load_manifest("once")


def test_without_weights_there_is_the_rest(places, small, monkeypatch):
    fit(network(small), small, CONFIG, runs.folder("once"))
    report.record("once", small)
    shutil.rmtree(runs.folder("once"))
    no_training(monkeypatch)
    run = fit(network(small), small, CONFIG, runs.folder("once"))
    assert len(run.history) == 2 and len(runs.load_answers("once")) == len(small.test)
    for ask in (lambda: run.model, lambda: runs.load_model("once")):
        with pytest.raises(WorkbookError, match="weights of once were not recorded; train it with retrain=True"):
            ask()


READ = {
    "run.json": runs.load_manifest,
    "history.csv": runs.load_run,
    "answers.bin": runs.load_answers,
    "best.pt": runs.load_model,
}


@pytest.mark.parametrize("damage", ("missing", "cut off", "another network's"))
@pytest.mark.parametrize("file", READ)
def test_a_damaged_record_is_one_line(once, small, file, damage):
    path = runs.recorded("once", file)
    if damage == "missing":
        path.unlink()
    elif damage == "cut off":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        fit(network(small, 1), small, config.dataclasses.replace(CONFIG, lr=0.05), runs.folder("other"))
        report.record("other", small, weights=True)
        shutil.copy(runs.recorded("other", file), path)
    message = "^[^\n]*once[^\n]*; (restore it|train it|give another)[^\n]*$"
    with pytest.raises(WorkbookError, match=message):
        READ[file]("once")


def test_recording_again_keeps_the_weights(once, small):
    report.record("once", small)
    assert same_weights(runs.load_model("once"), files.rounded(once.model))


def test_no_report_replaces_a_record(once, small):
    """Another training of that name may be reported elsewhere, but not over the recorded one."""
    own = fit(network(small), small, CONFIG, runs.folder("once"), retrain=True)
    with pytest.raises(WorkbookError, match="once was recorded from another training; rename this one"):
        report.write_report(report.recorded_folder(), "lab", "Title", ["text"], [own.manifest])
    assert runs.is_recorded("once")


def test_a_report_keeps_what_was_recorded(places, small):
    """The manifest that a notebook holds may be older than the record."""
    own = fit(network(small), small, CONFIG, runs.folder("once"))
    report.record("once", small, weights=True)
    report.write_report(report.recorded_folder(), "lab", "Title", ["text"], [own.manifest])
    shutil.rmtree(runs.folder("once"))
    assert runs.is_recorded("once") and runs.load_model("once")


def test_a_report_keeps_what_was_measured_since_it_began(places, small):
    run = fit(network(small), small, CONFIG, runs.folder("begun"))
    report.record("begun", small)
    shutil.rmtree(run.folder)
    measure.once("begun", "before", list, "c", keep=True)
    begun = runs.load_manifest("begun")
    assert measure.once("begun", "sweep", list, "ab", keep=True) == ["a", "b"]
    report.write_report(report.recorded_folder(), "one", "One", [], [begun])
    assert runs.load_manifest("begun")["measured"]["sweep"]["found"] == ["a", "b"]


def test_what_is_measured_of_a_record_makes_no_folder(once, small):
    run = runs.load_run("once")
    assert 0 <= report.tested(run, small, tta=1)["accuracy"] <= 1 and "test_tta" not in once.manifest
    runs.recorded("once", "answers.bin").unlink()
    report.tested(run, small)
    assert not runs.folder("once").exists()


def test_only_finished_runs_are_recorded(places, small):
    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(network(small), small, CONFIG, runs.folder("once"), on_epoch=stop)
    with pytest.raises(WorkbookError, match="not finished"):
        report.record("once", small)
    assert not (places / "reports").exists()


def test_another_training_is_not_recorded_over_the_first(once, small):
    fit(network(small), small, CONFIG, runs.folder("once"), retrain=True)
    before = runs.recorded("once", "run.json").read_text()
    with pytest.raises(WorkbookError, match="records another training; delete it, or rename this one"):
        report.record("once", small, weights=True)
    assert runs.recorded("once", "run.json").read_text() == before


def test_weights_that_rounding_spoils_are_kept_as_they_are(places, small, monkeypatch):
    run = fit(network(small), small, CONFIG, runs.folder("once"))
    monkeypatch.setattr(files, "rounded", lambda model: network(small, seed=5))
    report.record("once", small, weights=True)
    shutil.rmtree(runs.folder("once"))
    assert same_weights(runs.load_model("once"), run.model)


def test_a_start_is_the_same_from_the_run_and_from_its_record(places, small):
    run = fit(network(small), small, CONFIG, runs.folder("once"))
    before = cli.pruned("once, ratio 0.5", small)
    report.record("once", small, weights=True)
    shutil.rmtree(runs.folder("once"))
    after = cli.pruned("once, ratio 0.5", small)
    assert same_weights(before, after) and sum(after.cfg) < sum(run.model.cfg)


STUDY = dict(
    name="order",
    base=dict(dataset="cifar10-sample", model="fastnet", epochs=1, batch_size=50, lam=0.01, **TINY),
    seeds=[0, 1],
    title="An experiment",
    configurations=dict(
        sparse=dict(why="the dense one", pmacs=0.001, weights=[0, 1]),
        half=dict(init="order-sparse-{seed}, ratio 0.5", lam=0, pmacs=0.002),
        plain=dict(lam=0, seeds=[0]),
    ),
    comparisons=[dict(question="Is half as good?", a="half", b="sparse")],
)


@pytest.fixture
def study(places, small, monkeypatch):
    for module in (experiment, sweep):
        monkeypatch.setattr(module, "load", lambda name, val=None: small)
    path = places / "study.yaml"
    path.write_text(yaml.dump(STUDY, sort_keys=False))
    return path


def run_all(path, **more):
    experiment.run_all(config.read_study(path), **more)


def trained(monkeypatch):
    """The names of runs as they are trained."""
    names, learner = [], train.Learner

    def watched(model, split, config, folder):
        names.append(folder.name)
        return learner(model, split, config, folder)

    monkeypatch.setattr(train, "Learner", watched)
    return names


def test_an_experiment_trains_what_is_missing_in_order(study, places, monkeypatch):
    names = trained(monkeypatch)
    run_all(study)
    assert names == ["order-sparse-0", "order-half-0", "order-plain-0", "order-sparse-1", "order-half-1"]
    start = runs.load_manifest("order-half-1")["config"]["init"]
    assert start == "order-sparse-1, ratio 0.5" and runs.load_manifest("order-half-1")["spec"]["cfg"] != TINY["cfg"]
    shutil.rmtree(runs.folder())
    runs.recorded("order-half-1", "run.json").unlink()
    names.clear()
    run_all(study)
    assert names == ["order-half-1"]


def test_an_experiment_says_how_far_it_has_come(study, places, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    run_all(study, only_report=True)
    text = (places / "reports" / "order_experiment.md").read_text()
    assert "0 of 5 runs are done." in text and len(re.findall(r"\bopen\b", text)) == 9 and text.startswith("# An experiment")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cli, "pruned", stop)
        run_all(study)
    text = (places / "reports" / "order_experiment.md").read_text()
    assert "1 of 5 runs are done; at their pace the others take " in text and "**sparse**: the dense one" in text
    assert re.search(r"half/0 +\| open +\| 0.002 +\| 0.003 ", text)  # its own, and with that of the run it starts from
    run_all(study)
    text = (places / "reports" / "order_experiment.md").read_text()
    differences = list(enumerate(re.findall(r"([+-]\d+\.\d\d) ± \d+\.\d\d", text)[:2]))  # and their mean
    accuracy = lambda name: runs.load_manifest(f"order-{name}")["test"]["accuracy"]
    for seed, points in differences:
        assert float(points) == pytest.approx(100 * (accuracy(f"half-{seed}") - accuracy(f"sparse-{seed}")), abs=0.006)
    assert len(differences) == 2


def test_records_that_are_gone_are_made_again(study, places):
    run_all(study)
    shutil.rmtree(places / "reports")
    run_all(study)
    assert "5 of 5 runs are done." in (places / "reports" / "order_experiment.md").read_text()
    assert same_weights(runs.load_model("order-sparse-1"), runs.load_run(runs.folder("order-sparse-1")).model)


def test_one_run_that_fails_stops_no_other(study, places, monkeypatch):
    def refuse(*_):
        raise WorkbookError("there is no gap")

    names = trained(monkeypatch)
    monkeypatch.setattr(cli, "pruned", refuse)
    with pytest.raises(WorkbookError, match="half/0, half/1 failed, see above"):
        run_all(study)
    assert names == ["order-sparse-0", "order-plain-0", "order-sparse-1"]


@pytest.mark.parametrize(
    "right, verdict",
    (
        (((60, 20), (60, 20)), "a is better"),
        (((20, 60), (20, 60)), "b is better"),
        (((60, 20), (20, 60)), "not told apart"),
        (((60, 20), (50, 50)), "not told apart"),
        (((60, 20), None), "a is better, in one seed"),
        (((50, 50), None), "not told apart, in one seed"),
        ((None, None), "open"),
    ),
)
def test_verdicts_need_all_seeds_on_one_side(right, verdict, monkeypatch):
    """By how many of 100 images a and b answer rightly: which differences are told apart?"""
    labels = torch.ones(100, dtype=torch.long)
    answers = {f"s-{which}-{seed}": (torch.arange(100) < pair[i]).byte()
               for seed, pair in enumerate(right) if pair for i, which in enumerate("ab")}  # fmt: skip
    monkeypatch.setattr(runs, "load_answers", answers.get)
    keys = [f"{which}/{seed}" for which in "ab" for seed in (0, 1)]
    told = config.Study("s", {key: dict(seed=int(key[-1]), dataset="cifar10") for key in keys})
    split = data.Split(None, None, data.Images(labels, labels), None, ())
    done = {key: {} for key in keys if f"s-{key.replace('/', '-')}" in answers}
    monkeypatch.setattr(experiment, "load", lambda *_: split)
    row = experiment.compare(told, done, "?", "a", "b")
    assert row["verdict"] == verdict
    if right[0]:
        share, half = (right[0][0] - right[0][1]) / 100, abs(right[0][0] - right[0][1]) / 100
        half = 196 * (half - share**2) ** 0.5 / 10
        assert row["seed 0"] == f"{100 * share:+.2f} ± {half:.2f}"


def test_labels_are_those_of_the_runs_that_are_compared(study, places, monkeypatch, small):
    """Another data set among the configurations lends its labels to nobody."""
    mixed = copy.deepcopy(STUDY)
    mixed["configurations"] = dict(first=dict(dataset="cifar100", seeds=[0]), **mixed["configurations"])
    study.write_text(yaml.dump(mixed, sort_keys=False))
    asked = []
    monkeypatch.setattr(experiment, "load", lambda name, val=None: asked.append(name) or small)
    run_all(study, only_report=True)
    assert "cifar100" not in asked
    done = {key: {} for key in ("half/0", "sparse/0")}
    monkeypatch.setattr(runs, "load_answers", lambda name: small.test.y.byte())
    experiment.compare(config.read_study(study), done, "?", "half", "sparse")
    assert asked == ["cifar10-sample"]


def test_a_study_takes_recorded_runs_as_done(study, monkeypatch):
    run_all(study)
    shutil.rmtree(runs.folder())
    no_training(monkeypatch)
    opened = sweep.open_study(config.read_study(study))
    sweep.work(opened)
    found = sweep.results(opened, config.read_study(study))
    assert [run["state"] for run in found.values()] == ["complete"] * 5
    assert found["plain/0"]["history"][0]["epoch"] == 1


@pytest.mark.parametrize("init", ("order-sparse-0", "order-sparse-0, ratio 50 %", "order-sparse-0,gap", "../x, gap", "a b, gap"))
def test_mistakes_in_a_start_are_named(study, init):
    wrong = copy.deepcopy(STUDY)
    wrong["configurations"]["half"] |= dict(init=init)
    study.write_text(yaml.dump(wrong, sort_keys=False))
    with pytest.raises(WorkbookError, match="give random"):
        config.read_study(study)


def test_the_paired_interval_agrees_with_a_bootstrap():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (4000,), generator=generator)
    spoil = lambda share: torch.where(torch.rand(4000, generator=generator) < share, (labels + 1) % 10, labels)
    a, b = spoil(0.05), spoil(0.08)
    difference, half = paired(a, b, labels)
    assert difference == pytest.approx(float((a == labels).float().mean() - (b == labels).float().mean()))
    better = (a == labels).float() - (b == labels).float()
    again = torch.stack([better[torch.randint(4000, (4000,), generator=generator)].mean() for _ in range(4000)])
    low, high = again.quantile(torch.tensor([0.025, 0.975])).tolist()
    assert low == pytest.approx(difference - half, abs=0.0008) and high == pytest.approx(difference + half, abs=0.0008)
    assert paired(b, a, labels) == (pytest.approx(-difference), pytest.approx(half)) and paired(a, a, labels) == (0, 0)
    n10, n01 = (float(((x == labels) & (y != labels)).sum()) for x, y in ((a, b), (b, a)))
    assert half == pytest.approx(1.96 * (n10 + n01 - (n10 - n01) ** 2 / 4000) ** 0.5 / 4000)
    mean, _ = paired(torch.stack([a, b]), torch.stack([b, b]), labels)
    assert mean == pytest.approx(difference / 2)


def heaps(dead, alive, spread=0.5, level=-6.0):
    """Scores of `dead` channels around 10^level and `alive` ones around 0.1, in two groups, shuffled."""
    generator = torch.Generator().manual_seed(0)
    logs = torch.cat([torch.randn(dead, generator=generator) * spread + level, torch.randn(alive, generator=generator) * 0.2 - 1])
    values = (10**logs)[torch.randperm(dead + alive, generator=generator)]
    return dict(zip("ab", values.split([len(values) // 2, len(values) - len(values) // 2])))


@pytest.mark.parametrize("dead, alive", ((70, 30), (30, 70), (557, 163), (5, 95), (95, 5)))
def test_the_gap_lies_between_the_heaps(dead, alive):
    scores = heaps(dead, alive)
    ratio = slimming.gap(scores)
    assert ratio == dead / (dead + alive)
    assert 1 - slimming.achieved(slimming.make_masks(scores, ratio)) == pytest.approx(alive / (dead + alive))


def test_the_widest_of_several_gaps_is_taken():
    zeros, dead, alive = torch.zeros(20), 10 ** torch.linspace(-6.5, -6, 50), 10 ** torch.linspace(-1.5, -1, 30)
    assert slimming.gap(dict(a=torch.cat([zeros.clamp(min=1e-8), dead, alive]))) == 0.7


def test_exact_zeros_are_a_heap():
    scores = heaps(60, 40)
    zeros = {name: torch.where(score < 1e-3, 0.0, score) for name, score in scores.items()}
    assert slimming.gap(zeros) == 0.6


def test_a_few_channels_between_the_heaps_hide_no_gap():
    scores = heaps(70, 30) | dict(c=torch.tensor([3e-4, 9e-3]))
    assert slimming.gap(scores) in (70 / 102, 71 / 102, 72 / 102)


ALIKE = (heaps(0, 100), heaps(98, 2), heaps(100, 0, 2.0), dict(a=torch.ones(64)), dict(a=torch.linspace(0, 1, 500)))


@pytest.mark.parametrize("scores", ALIKE)
def test_where_there_is_no_gap_it_is_said(scores):
    with pytest.raises(WorkbookError, match="there is no gap in the scores.*; give a ratio, or train with a longer reach"):
        slimming.gap(scores)


RECORDED = [path for path in sorted((ROOT / "reports" / "runs").glob("*.json")) if "recorded" in json.loads(path.read_text())]


@pytest.mark.parametrize("name", [path.stem for path in RECORDED])
def test_committed_records_are_whole(name):
    run = runs.load_run(name)
    assert len(runs.load_answers(name)) in (1000, 10_000) and run.manifest["name"] == name
    if run.kept:
        assert json.loads(json.dumps(run.model.spec)) == run.manifest["spec"]


def test_recorded_weights_stay_small():
    sizes = {path.stem: path.stat().st_size for path in (ROOT / "reports" / "weights").glob("*.pt")}
    assert set(sizes) <= {path.stem for path in RECORDED}
    assert sum(sizes.values()) <= 45e6 and sum(n for name, n in sizes.items() if name.startswith("lab2")) <= 18e6


EXPERIMENT = config.read_study(ROOT / "Lab2" / "experiment.yaml")


def cost(spec, settings):
    """10^15 multiply-accumulates of a training."""
    images = 2000 if settings["dataset"] == "cifar10-sample" else 45_000
    return measure.pflops(models.build(**spec), images, settings["epochs"], settings.get("low_res", 0)) / 2


@pytest.mark.parametrize("key", EXPERIMENT.runs)
def test_the_experiment_says_what_its_runs_cost(key):
    """As computed from the network of the file, or of the recorded run, if it starts from another."""
    settings, said = EXPERIMENT.runs[key], EXPERIMENT.about[key.split("/")[0]]["pmacs"]
    name = cli.folder_of("lab2", key).name
    if "init" not in settings:
        assert cost(config.config_and_network(settings)[1], settings) == pytest.approx(said, rel=0.005)
    elif runs.is_recorded(name):
        near = 0.005 if key.endswith("/0") else 0.06  # another seed is left with other widths
        assert cost(runs.load_manifest(name)["spec"], settings) == pytest.approx(said, rel=near)


def test_rivals_have_as_much_computation():
    spent = {name: told["pmacs"] for name, told in EXPERIMENT.about.items()}
    for rival in ("small", "uniform", "longer"):
        assert spent[rival] == pytest.approx(spent["sparse"] + spent["gap"], rel=0.025)
    assert spent["tenth-small"] == pytest.approx(spent["sparse"] + spent["tenth"], rel=0.025)
    sizes = {name: measure.macs(models.build(**config.config_and_network(EXPERIMENT.runs[f"{name}/0"])[1]))
             for name in ("small", "uniform")}  # fmt: skip
    assert sizes["small"] == pytest.approx(sizes["uniform"], rel=0.001)


def test_rivals_have_the_widths_that_pruning_leaves():
    dense = runs.load_model("lab2-sparse-0")
    scores = slimming.scores(dense)
    for rival, ratio in (("small", slimming.gap(scores)), ("tenth-small", 0.9)):
        left = slimming.slim(dense, slimming.make_masks(scores, ratio, min_channels=4))
        assert left.cfg == EXPERIMENT.runs[f"{rival}/0"]["cfg"]


def test_the_report_of_the_experiment_is_made_of_the_records():
    """Test accuracies and differences; the answers alone do not tell the labels, so only differences of accuracies."""
    text = (ROOT / "reports" / "lab2_experiment.md").read_text()
    done = re.findall(r"^\| ([\w.-]+)/(\d) +\| done .*\| +([\d.]+)% +\| +([\d.]+)% +\|$", text, re.M)
    assert len(done) == int(re.search(r"^(\d+) of \d+ runs are done", text, re.M)[1]) > 0
    for name, seed, validation, test in done:
        manifest = runs.load_manifest(f"lab2-{name}-{seed}")
        found = manifest["best"]["val_accuracy"], manifest["test"]["accuracy"]
        assert [f"{value:.2%}" for value in found] == [f"{validation}%", f"{test}%"]
    accuracy = {(name, seed): float(test) for name, seed, _, test in done}
    for a, b, *differences in re.findall(r"\| ([\w-]+) − ([\w-]+) +\| ([+-][\d.]+|open)[^|]*\| ([+-][\d.]+|open)", text):
        for seed, said in enumerate(differences):
            if said != "open":
                assert float(said) == pytest.approx(accuracy[a, str(seed)] - accuracy[b, str(seed)], abs=0.011)
