"""The case of Colab, by hand: nothing but a notebook, in an environment that is not ours.

    python3 -m venv colab
    colab/bin/pip install torch torchvision numpy matplotlib pandas ipykernel ipywidgets==7.7.1
    python -m tests.colab colab/bin/python Lab2/modelprune.ipynb

The notebook runs in an empty folder, with a module `google.colab`; it clones this repository as it is
committed, installs what is missing, and runs to its end. What was installed before stays as it was.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client import KernelManager
from nbclient import NotebookClient

from common import ROOT, course

KEPT = ("torch", "torchvision", "numpy", "matplotlib", "pandas", "ipykernel", "ipywidgets")
VERSIONS = f"from importlib.metadata import version\nprint({{name: version(name) for name in {KEPT}}})"


def ask(python, code):
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout


def main(python: str, notebook: str) -> None:
    before, python = ask(python, VERSIONS), os.path.abspath(python)
    with tempfile.TemporaryDirectory() as folder:
        empty, modules = Path(folder, "content"), Path(folder, "modules")
        (modules / "google" / "colab").mkdir(parents=True)
        (modules / "google" / "colab" / "__init__.py").touch()
        empty.mkdir()
        told = nbformat.read(ROOT / notebook, as_version=4)
        nbformat.write(told, empty / Path(notebook).name)
        manager = KernelManager(kernel_name="python3")
        manager.kernel_spec.argv[0] = python
        own = dict(WORKBOOK_REPOSITORY=f"file://{ROOT}", PYTHONPATH=str(modules))
        os.environ.pop("RUNS_DIR", None)
        os.environ.update(own)
        began = time.monotonic()
        client = NotebookClient(told, km=manager, timeout=1800, resources={"metadata": {"path": str(empty)}})
        client.execute()
        print(f"{notebook}: {time.monotonic() - began:.0f} s; it left {sorted(os.listdir(empty))}")
    first = next(cell for cell in told.cells if course.FIRST_CELL[:60] in cell.source)
    print("".join(output.get("text", "") for output in first.outputs))
    after = ask(python, VERSIONS)
    assert after == before, f"{before} became {after}"
    print(f"unchanged: {after}")


if __name__ == "__main__":
    main(*sys.argv[1:])
