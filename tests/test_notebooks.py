"""Notebooks as committed, and what they do with bad input. (`pytest --nbval-lax` runs their cells.)"""

import ast
import builtins
import json
import subprocess
import sys

import pytest
import yaml

from common import ROOT

NOTEBOOKS = sorted(str(p.relative_to(ROOT)) for d in ("Lab1", "Lab2", "Assignment_MobileNet") for p in (ROOT / d).glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_committed_clean(name):
    notebook = json.loads((ROOT / name).read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert "widgets" not in notebook["metadata"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code), "run nbstripout"
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in code) == 1
    assert "raises-exception" not in str([cell["metadata"] for cell in code]), "papermill would stop there"


@pytest.mark.parametrize("path", [ROOT / "Lab1" / "cifar100.yaml"])
def test_parameter_files_name_parameters(path):
    cells = json.loads(path.with_suffix(".ipynb").read_text())["cells"]
    source = next("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
    kinds = {node.target.id: getattr(builtins, node.annotation.id) for node in ast.parse(source).body}
    for name, value in yaml.safe_load(path.read_text()).items():
        assert isinstance(value, (kinds[name], int if kinds[name] is float else kinds[name])), f"{name}: {value!r}"


def papermill(notebook, folder, *parameters):
    command = [sys.executable, "-m", "papermill", str(ROOT / notebook), str(folder / "out.ipynb"), "--no-progress-bar"]
    environment = {"RUNS_DIR": str(folder / "runs"), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *parameters], cwd=folder, capture_output=True, text=True, env={**__import__("os").environ, **environment}
    )


@pytest.mark.parametrize(
    "notebook,name,value,message",
    (
        ("Lab1/baseline.ipynb", "epochs", "0", "epochs=0"),
        ("Lab1/advanced.ipynb", "strength", "stronk", "did you mean 'strong'"),
        ("Lab1/speedrun.ipynb", "seeds", "0.5", "seeds=0.5"),
        ("Lab1/under_5m.ipynb", "final", "vgg16", "seresnet44, fastnet"),
        ("Lab1/cifar100.ipynb", "dropout", "1", "dropout=1"),
        ("Lab2/modelprune.ipynb", "ratio", "1.5", "ratio=1.5"),
        ("Lab2/modelprune.ipynb", "criterion", "gama", "did you mean 'gamma'"),
        ("Lab2/modelprune.ipynb", "ratoi", "0.7", "did you mean 'ratio'"),
        ("Lab2/sparsity_train.ipynb", "scale", "huge", "quick, laptop, full"),
        ("Lab2/train_prune_model.ipynb", "checkpoint", "missing.pt", "does not exist"),
        ("Assignment_MobileNet/hyperparameter_study.ipynb", "workers", "0", "workers=0"),
    ),
)
def test_bad_input_ends_with_one_line_and_a_failure(notebook, name, value, message, tmp_path):
    result = papermill(notebook, tmp_path, "-p", name, value)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("WorkbookError: ") and message in last
    assert not list((tmp_path / "runs").rglob("*.*")), "nothing was written"
