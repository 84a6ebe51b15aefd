"""Studies: each run exactly once, whatever happens to the workers."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
import pytest
import torch
import yaml
from optuna.trial import TrialState

from common import ROOT, WorkbookError, config, storage, sweep

optuna.logging.set_verbosity(optuna.logging.ERROR)
STUDY = dict(
    name="small",
    base=dict(model="mobilenet", width=0.05, dataset="cifar10-sample", epochs=2, batch_size=500, augment=["flip"], lr=0.05),
    seeds=[0, 1],
    configurations=dict(plain=None, decay=dict(weight_decay=0.01)),
)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    return tmp_path / "runs"


def write(folder, **changes):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY | changes))
    return path


def base(**changes):
    return dict(base=STUDY["base"] | changes)


def start(path, *words, **environment):
    command = [sys.executable, "-m", "common.sweep", str(path), "--heartbeat", "1", *words]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)


def states(opened):
    return [trial.state for trial in opened.get_trials() if "key" in trial.user_attrs]


def plain(history):
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in history]


def test_every_run_once_and_never_again(runs, tmp_path):
    study = config.read_study(write(tmp_path))
    assert sorted(study.runs) == ["decay/0", "decay/1", "plain/0", "plain/1"]
    opened = sweep.open_study(study)
    assert all(run["state"] == "not run" for run in sweep.results(opened, study).values())
    sweep.work(opened)
    found = sweep.results(opened, study)
    assert all(run["state"] == "complete" and len(run["history"]) == 2 for run in found.values())
    assert found["decay/1"]["manifest"]["config"]["weight_decay"] == 0.01 and found["decay/1"]["manifest"]["config"]["seed"] == 1
    again = sweep.open_study(study)
    sweep.work(again)
    assert states(again) == [TrialState.COMPLETE] * 4


def test_every_seed_has_first_weights_of_its_own_and_its_data(runs, tmp_path, monkeypatch):
    asked, load = [], sweep.load
    monkeypatch.setattr(sweep, "load", lambda *words: asked.append(words) or load(*words))
    study = config.read_study(write(tmp_path, configurations=dict(plain=None), **base(val=500)))
    sweep.work(sweep.open_study(study))
    first, second = (sweep.runs.load_manifest(sweep.folder_of("small", f"plain/{seed}")) for seed in (0, 1))
    assert first["start"] != second["start"]
    assert asked == [("cifar10-sample", 500)] * 2


def test_heartbeats_are_what_was_asked_for(runs, tmp_path):
    storage = sweep.open_study(config.read_study(write(tmp_path)), heartbeat=7)._storage
    inner = getattr(storage, "_backend", storage)
    assert inner.heartbeat_interval == 7 and inner.grace_period == 7 * sweep.MISSED


def test_settings_may_be_merged(tmp_path):
    path = write(tmp_path)
    path.write_text(path.read_text() + "shared: {slow: &slow {lr: 0.01, epochs: 1}}\n")
    text = path.read_text().replace("configurations:", "configurations:\n  merged: {<<: *slow, lr: 0.02}")
    path.write_text("\n".join(sorted(text.split("\n"), key=lambda line: not line.startswith("shared"))))
    assert (study := config.read_study(path)).runs["merged/0"]["lr"] == 0.02 and study.runs["merged/0"]["epochs"] == 1


def test_a_file_that_grew_adds_its_new_runs(runs, tmp_path):
    sweep.work(sweep.open_study(config.read_study(write(tmp_path, configurations=dict(plain=None), seeds=[0]))))
    opened = sweep.open_study(config.read_study(write(tmp_path, seeds=[0])))
    assert states(opened) == [TrialState.COMPLETE, TrialState.WAITING]


def test_runs_that_two_machines_enqueued_at_once_run_once(runs, tmp_path):
    study = config.read_study(write(tmp_path, seeds=[0]))
    opened = sweep.open_study(study)
    for key, settings in study.runs.items():
        opened.enqueue_trial({}, user_attrs={"key": key, "settings": settings})
    sweep.work(opened)
    assert sorted(state.name for state in states(opened)) == ["COMPLETE"] * 2 + ["PRUNED"] * 2
    assert all(run["state"] == "complete" for run in sweep.results(opened, study).values())


def test_a_pruned_duplicate_does_not_hide_a_lost_run(runs, tmp_path):
    """Two machines enqueue the same run; one steps aside, the other dies: the run must come back."""
    study = config.read_study(write(tmp_path, configurations=dict(plain=None), seeds=[0]))
    opened = sweep.open_study(study)
    attributes = {"key": "plain/0", "settings": study.runs["plain/0"]}
    opened.enqueue_trial({}, user_attrs=attributes)
    first, second = opened.ask(), opened.ask()
    opened.tell(second, state=TrialState.PRUNED)
    lost = sweep.requeue(opened, failed=False, dead=lambda trial: trial.number == first.number)
    assert lost == ["plain/0"] and sweep.requeue(opened) == []
    sweep.work(opened)
    assert sweep.results(opened, study)["plain/0"]["state"] == "complete"


def test_what_runs_is_queued_again_only_on_demand(runs, tmp_path):
    opened = sweep.open_study(config.read_study(write(tmp_path, configurations=dict(plain=None), seeds=[0])))
    opened.ask()
    assert sweep.requeue(opened) == []
    assert sweep.requeue(opened, dead=lambda trial: True) == ["plain/0"]


def test_a_worker_that_died_before_its_first_heartbeat_is_found(runs, tmp_path, monkeypatch):
    study = config.read_study(write(tmp_path, configurations=dict(plain=None), seeds=[0]))
    opened = sweep.open_study(study)
    opened.ask()  # and nothing more: no heartbeat, no name
    monkeypatch.setattr(sweep, "MISSED", 0.1)
    sweep.work(opened)
    assert sweep.results(opened, study)["plain/0"]["state"] == "complete"


def test_a_worker_that_died_without_a_run_keeps_nobody_waiting(runs, tmp_path, monkeypatch):
    opened = sweep.open_study(config.read_study(write(tmp_path, configurations=dict(plain=None), seeds=[0])))
    sweep.work(opened)
    assert "key" not in opened.ask().user_attrs  # it found nothing to run, and never says so
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: pytest.fail("it waits for a run that nobody has"))
    sweep.work(opened)


@pytest.mark.parametrize("kind", ("sqlite:///", "journal:"))
def test_paths_of_storages_begin_at_the_repository(kind, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    sweep.open_study(config.read_study(write(tmp_path)), f"{kind}here.db")
    assert (tmp_path / "here.db").exists() and not (tmp_path.parent / "here.db").exists()


@pytest.mark.parametrize("sign", "%?#")
def test_a_path_that_no_database_can_name_is_refused(sign, tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / f"my{sign}runs"))
    with pytest.raises(WorkbookError, match="a path of a storage must not hold %"):
        sweep.open_study(config.read_study(write(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


def test_a_mistake_on_the_command_line_queues_nothing(runs, tmp_path):
    path = write(tmp_path)
    with pytest.raises(WorkbookError, match="threads=0 is not legal"):
        sweep.run(sweep.StudyCommand(str(path), workers=1, threads=0))
    assert not sweep.open_study(config.read_study(path), enqueue=False).get_trials()


def test_reading_a_study_enqueues_nothing(runs, tmp_path):
    study = config.read_study(write(tmp_path))
    opened = sweep.open_study(study, enqueue=False)
    assert not opened.get_trials() and {run["state"] for run in sweep.results(opened, study).values()} == {"not run"}


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "Assignment_MobileNet").glob("study*.yaml")))
def test_committed_studies_are_legal(name):
    runs = config.read_study(ROOT / "Assignment_MobileNet" / name).runs
    assert {key.split("/")[0] for key in runs} >= {"lr-0.2", "constant", "cosine", "wd-5e-4", "sigmoid"}


def test_no_trial_is_taken_twice(runs):
    """Four processes empty one queue on SQLite, which by itself would let two of them take the same trial."""
    script = (
        "from common import config, sweep\n"
        "opened = sweep.open_study(config.Study('race', {f'c/{i}': {'seed': i} for i in range(40)}))\n"
        "while 'key' in (trial := opened.ask()).user_attrs:\n"
        "    opened.tell(trial, 1.0)\n"
        "    print(trial.user_attrs['key'])\n"
    )
    opened = sweep.open_study(config.Study("race", {f"c/{i}": {"seed": i} for i in range(40)}))
    command = dict(cwd=ROOT, env={**os.environ, "RUNS_DIR": str(runs)}, stdout=subprocess.PIPE, text=True)
    workers = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], **command) for _ in range(4)]
    taken = [key for worker in workers for key in worker.communicate()[0].split()]
    assert [worker.returncode for worker in workers] == [0] * 4
    assert sorted(taken) == sorted(f"c/{i}" for i in range(40)) and states(opened).count(TrialState.COMPLETE) == 40


def kill_one_of_two(path, storage, words, **environment):
    """Two workers; one dies by kill -9 with a run at hand and its first checkpoint written; then a third joins."""
    study = config.read_study(path)
    opened = sweep.open_study(study, storage, 1)
    workers = [start(path, "--workers", "1", "--threads", "1", *words, **environment) for _ in range(2)]
    deadline = time.monotonic() + 120
    victim = None
    while victim is None and time.monotonic() < deadline:
        time.sleep(0.05)
        for trial in opened.get_trials(states=(TrialState.RUNNING,)):
            pid = trial.user_attrs.get("worker", (None, 0, 0))[1]
            started = (sweep.folder_of(study.name, trial.user_attrs["key"]) / "checkpoint.pt").exists()
            victim = (trial.user_attrs["key"], pid) if started and pid == workers[0].pid else victim
    assert victim, "the first worker never had a run at hand"
    os.kill(victim[1], getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows knows one kind
    workers[0].wait()
    return study, victim[0], [workers[1], start(path, "--workers", "1", "--threads", "1", *words, **environment)]


def finish(workers, study, victim=None):
    """Wait for the workers; whoever took over the victim's run went on from its checkpoint."""
    printed = "".join(worker.communicate()[0] for worker in workers)
    assert [worker.returncode for worker in workers] == [0] * len(workers)
    if victim:
        name = sweep.folder_of(study.name, victim).name
        assert f"{name} epoch   4/4" in printed and f"{name} epoch   1/4" not in printed, "not trained from the start again"


def tries(opened, key):
    """States of the trials that had this run; a worker that joins while another one queues it may queue it too, in vain."""
    found = sorted(t.state.name for t in opened.get_trials() if t.user_attrs.get("key") == key)
    return [state for state in found if state != "PRUNED"]


def compare_with_undisturbed(study, opened, tmp_path, monkeypatch):
    found = sweep.results(opened, study)
    complete = [t.user_attrs["key"] for t in opened.get_trials(states=(TrialState.COMPLETE,))]
    assert sorted(complete) == sorted(study.runs), "each run finished exactly once"
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "undisturbed"))
    calm = sweep.open_study(study)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sweep.work(calm)
    torch.set_num_threads(threads)
    for key, run in sweep.results(calm, study).items():
        assert plain(run["history"]) == plain(found[key]["history"]), f"{key} differs from an undisturbed run"


def test_killed_worker_of_two_costs_nothing(runs, tmp_path, monkeypatch):
    path = write(tmp_path, **base(epochs=4, batch_size=200))
    study, victim, workers = kill_one_of_two(path, None, (), RUNS_DIR=str(runs))
    finish(workers, study, victim)
    opened = sweep.open_study(study)
    assert tries(opened, victim) == ["COMPLETE", "FAIL"], "the killed worker's run was queued again"
    compare_with_undisturbed(study, opened, tmp_path, monkeypatch)


def test_journal_has_no_heartbeat_and_requeue_returns_what_is_left(runs, tmp_path, monkeypatch):
    path, storage = write(tmp_path, seeds=[0], **base(epochs=4, batch_size=200)), f"journal:{tmp_path / 'journal.log'}"
    study, victim, workers = kill_one_of_two(path, storage, ("--storage", storage), RUNS_DIR=str(runs))
    finish(workers, study)
    opened = sweep.open_study(study, storage)
    assert sweep.results(opened, study)[victim]["state"] == "running", "nobody noticed"
    words = ("--workers", "1", "--threads", "1", "--storage", storage)
    finish([start(path, *words, "--requeue-all", RUNS_DIR=str(runs))], study, victim)
    opened = sweep.open_study(study, storage)
    assert sweep.requeue(opened) == []
    compare_with_undisturbed(study, opened, tmp_path, monkeypatch)


def test_a_failed_run_keeps_its_error_and_stops_no_other(runs, tmp_path):
    configurations = dict(broken=dict(lr=1e30, optimizer="sgd"), plain=None)
    study = config.read_study(write(tmp_path, configurations=configurations, seeds=[0]))
    opened = sweep.open_study(study)
    sweep.work(opened)
    found = sweep.results(opened, study)
    assert found["plain/0"]["state"] == "complete" and found["broken/0"]["state"] == "fail"
    assert "WorkbookError: the loss became" in found["broken/0"]["error"]
    again = sweep.open_study(study)
    assert states(again) == states(opened), "a run that failed by itself is not repeated unasked"
    assert sweep.requeue(again) == ["broken/0"]


@pytest.mark.parametrize(
    "changes,message",
    (
        (base(lrr=0.1), "unknown key 'lrr'.*did you mean 'lr'"),
        (base(depth=3), "unknown key 'depth'"),
        (base(activation="sigmiod"), "unknown activation 'sigmiod'.*'sigmoid'"),
        (base(activation_at={"sigmoid": [13]}), "block 13 is out of range"),
        (base(lr=-1), "lr=-1 is not legal"),
        (base(model="mobilnet"), "unknown model 'mobilnet'"),
        (dict(configurations=dict(a=None, b=dict(lr=0.05))), "configuration 'b': 'a' is the same"),
        (dict(seeds=[1, 1]), "a seed is given twice"),
        (dict(sedes=[1]), "look at 'sedes'; it must hold exactly name"),
        (dict(seeds=3), "look at 'seeds'.*seeds .list."),
        (dict(seeds=["a"]), "seeds='a' is not legal; give a whole number"),
        (dict(seeds=[-1]), "seeds=-1 is not legal"),
        (dict(configurations=dict(a=dict(seeds=3))), "seeds=3 is not legal; give a list"),
        (dict(configurations=dict(a=dict(seeds=[]))), r"seeds=\[\] is not legal; give a list"),
        (dict(configurations=dict(a=dict(seed=3))), "unknown key 'seed'.*did you mean 'seeds'"),
        (dict(configurations=dict(a=[1])), "configuration 'a'"),
        (dict(configurations={"a/b": None}), "configuration='a/b' is not legal; give letters"),
        (base(activation_at=[4]), r"activation_at=\[4\]"),
        (base(width=float("nan")), "width of mobilenet=nan is not legal"),
        (base(width=0), "width of mobilenet=0 is not legal"),
        (base(watch="layers.99.conv1.weight"), "unknown parameter 'layers.99.conv1.weight'"),
        (base(val="x"), "val='x' is not legal"),
        (base(dataset="cifar100", val=10001), "val=10001 is not legal.*multiple of 100"),
        (base(dataset="cifar100", val=50000), "val=50000 is not legal.*49900"),
        (dict(name="a/b"), "name='a/b' is not legal; give letters"),
        (dict(name=".."), "name='..' is not legal"),
        (dict(configurations=dict(a=None, b=dict(activation="relu", val=500))), "configuration 'b': 'a' is the same"),
        (base(milestones=0.5), "milestones=0.5 is not legal; give a list"),
        (dict(configurations={}), "look at 'configurations'"),
        (dict(configurations=dict(a=None, b=dict(momentum=0.9))), "configuration 'b': 'a' is the same"),
    ),
)
def test_mistakes_in_the_file_are_named(tmp_path, changes, message):
    with pytest.raises(WorkbookError, match=message) as error:
        config.read_study(write(tmp_path, **changes))
    assert str(error.value).count("\n") == 0


def test_a_configuration_given_twice_is_named(tmp_path):
    text = write(tmp_path).read_text()
    (tmp_path / "study.yaml").write_text(text.replace("  plain: null", "  plain: null\n  plain:\n    lr: 0.1"))
    with pytest.raises(WorkbookError, match="'plain' is a duplicate"):
        config.read_study(tmp_path / "study.yaml")


@pytest.mark.parametrize(
    "address",
    (
        "me:secret@127.0.0.1:1/none",
        "me:sec/ret@127.0.0.1:1/none",
        "me:sec@ret@127.0.0.1:1/none",
        "me:sec%40ret@127.0.0.1:1/none",
        "127.0.0.1:1/none?user=me&password=secret",
        "127.0.0.1:1/none?password=sec@ret",
    ),
)
def test_passwords_stay_out_of_messages(runs, tmp_path, address):
    with pytest.raises(WorkbookError, match="^storage postgresql.* cannot be reached [^\\n]*; check it$") as caught:
        sweep.open_study(config.read_study(write(tmp_path)), f"postgresql+psycopg://{address}")
    assert "sec" not in str(caught.value) and "ret" not in str(caught.value)


MISSPELT = ("postgresql+psycopg//me:secret@host/db", "postgresql:/me:secret@host/db", "me:secret@host:5432/db")


@pytest.mark.parametrize("url", MISSPELT)
def test_passwords_of_misspelt_addresses_stay_out_too(runs, tmp_path, url):
    with pytest.raises(WorkbookError, match="cannot be reached") as caught:
        sweep.open_study(config.read_study(write(tmp_path)), url)
    assert "secret" not in str(caught.value)


def test_a_user_named_like_the_database_garbles_nothing():
    url = "postgresql://postgres:e@host/db"
    shown = storage.without_secrets(f"storage {url} cannot be reached", url)
    assert shown == "storage postgresql://***:***@host/db cannot be reached"


def test_a_storage_may_be_named_by_a_variable(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_STORAGE", f"sqlite:///{tmp_path}/variable.db")
    sweep.open_study(config.read_study(write(tmp_path)))
    assert (tmp_path / "variable.db").exists()


def test_unreadable_files_and_storages_are_named(runs, tmp_path):
    (tmp_path / "bad.yaml").write_text("name: [")
    for name in ("bad.yaml", "missing.yaml"):
        with pytest.raises(WorkbookError, match=f"{name} cannot be read"):
            config.read_study(tmp_path / name)
    study = config.read_study(write(tmp_path))
    for url in ("sqlite:////proc/none/x.db", "postgresql://nobody@127.0.0.1:1/none", "nonsense"):
        with pytest.raises(WorkbookError, match="cannot be reached") as error:
            sweep.open_study(study, url)
        assert str(error.value).count("\n") == 0


def test_the_file_decides_about_settings_and_no_run_is_mixed(runs, tmp_path):
    configurations = dict(plain=None)
    first = config.read_study(write(tmp_path, configurations=configurations, seeds=[0]))
    sweep.work(sweep.open_study(first))
    other = config.read_study(write(tmp_path, configurations=configurations, seeds=[0], **base(lr=0.2)))
    opened = sweep.open_study(other)
    assert states(opened) == [TrialState.COMPLETE, TrialState.WAITING]
    assert sweep.results(opened, other)["plain/0"]["state"] == "not run"
    sweep.work(opened)
    failed = sweep.results(opened, other)["plain/0"]
    assert failed["state"] == "fail" and "holds a run with lr=0.05" in failed["error"]
    assert sweep.results(opened, first)["plain/0"]["state"] == "complete"


@pytest.fixture
def postgres():
    """A PostgreSQL server of its own on loopback; skips where PostgreSQL is not installed."""
    places = os.pathsep.join([*map(str, Path("/usr/lib/postgresql").glob("*/bin")), os.environ["PATH"]])
    binary = shutil.which("pg_ctl", path=places)
    pytest.importorskip("psycopg")
    if binary is None or shutil.which("initdb", path=places) is None:
        pytest.skip("PostgreSQL is not installed")
    folder, port = Path(tempfile.mkdtemp()), 20000 + os.getpid() % 20000
    user = ["runuser", "-u", "nobody", "--"] if os.geteuid() == 0 else []  # PostgreSQL refuses to run as root
    if user:
        shutil.chown(folder, "nobody")
    run = lambda *words: subprocess.run([*user, *words], check=True, capture_output=True, cwd=folder)
    run(shutil.which("initdb", path=places), "-D", str(folder / "db"), "-U", "student", "-A", "trust")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    run(binary, "-D", str(folder / "db"), "-l", str(folder / "log"), "-w", "-o", options, "start")
    yield f"postgresql+psycopg://student@127.0.0.1:{port}/postgres"
    run(binary, "-D", str(folder / "db"), "-m", "immediate", "stop")
    shutil.rmtree(folder)


def test_killed_worker_with_postgresql(runs, tmp_path, monkeypatch, postgres):
    path = write(tmp_path, seeds=[0], **base(epochs=4, batch_size=200))
    study, victim, workers = kill_one_of_two(path, postgres, ("--storage", postgres), RUNS_DIR=str(runs))
    finish(workers, study, victim)
    opened = sweep.open_study(study, postgres)
    assert tries(opened, victim) == ["COMPLETE", "FAIL"]
    compare_with_undisturbed(study, opened, tmp_path, monkeypatch)


def test_command_runs_a_study_with_two_workers(runs, tmp_path):
    path = write(tmp_path, seeds=[0])
    queued = start(path, "--workers", "0", RUNS_DIR=str(runs))
    assert "small: 2 not run" in queued.communicate()[0] and not list(runs.glob("*/"))
    process = start(path, "--workers", "2", RUNS_DIR=str(runs))
    assert "small: 2 complete" in process.communicate()[0] and process.returncode == 0
    for words in (("--workers", "-1"), ("--heartbeat", "0"), ("--threads", "0")):
        with pytest.raises(WorkbookError, match=f"{words[0][2:]}={words[1]} is not legal"):
            sweep.run(sweep.StudyCommand(str(path), **{words[0][2:]: int(words[1])}))
    bad = subprocess.run(
        [sys.executable, "-m", "common.sweep", str(write(tmp_path, **base(lrr=1)))], cwd=ROOT, capture_output=True, text=True
    )
    assert bad.returncode == 1 and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1
