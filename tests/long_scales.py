"""Every lesson runs at the scales that no test can afford, in a small world; what one leaves, the next one takes."""

import json

import nbformat
import pytest
from nbclient import NotebookClient

from common import ROOT, config

LESSONS = (  # in the order in which they build on each other
    "Lab1/baseline", "Lab1/advanced", "Lab1/speedrun", "Lab1/under_5m", "Lab1/cifar100",
    "Lab2/sparsity_train", "Lab2/modelprune", "Lab2/train_prune_model", "Assignment_MobileNet/hyperparameter_study",
)  # fmt: skip
INSTALL = "from tests import small_world\n\nsmall_world.install()"


def run(lesson, scale, folder, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / f"{lesson}.ipynb", as_version=4)
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    given = f"# Parameters\nscale = {scale!r}"
    given += "\nworkers = 1" * (lesson.startswith("Assignment"))
    given += "\nretrain = True" * (lesson.startswith("Lab2"))  # it would take all from records
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(given))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(INSTALL))
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()


def told(path):
    """Settings and network of a run, without what the small world makes smaller."""
    manifest = json.loads(path.read_text())
    settings = config.full_config(manifest["config"])
    for key in ("epochs", "batch_size", "warmup", "init", "lam"):  # lam: some depend on the images
        del settings[key]
    network = config.full_spec(manifest["spec"])
    return settings, {key: value for key, value in network.items() if key != "cfg"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("scales")


@pytest.mark.parametrize("lesson", LESSONS)
@pytest.mark.parametrize("scale", ("laptop", "full"))
def test_a_lesson_runs_at_its_scale(lesson, scale, root, monkeypatch):
    folder = root / scale
    folder.mkdir(exist_ok=True)
    before = set(folder.rglob("run.json"))
    run(lesson, scale, folder, monkeypatch)
    made = set(folder.rglob("run.json")) - before
    assert made or lesson == "Lab2/modelprune"
    for path in made:
        assert json.loads(path.read_text())["finished"]
        reported = ROOT / "reports" / "runs" / f"{path.parent.name}.json"
        if reported.exists():  # a lesson still trains what its report tells of
            assert told(path) == told(reported)
