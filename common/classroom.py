"""How is a lab handed out and graded? nbgrader does it; this sees to folders and failures."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

from common import ROOT, WorkbookError, choose, folder_from, write_file

LIMIT = 180  # seconds a cell of a hand-in may take
GRADING = Path(__file__).parent / "grading"
SHARED = ("common", "requirements.txt", "pyproject.toml", "LICENSE")
RECORDED = ("reports/runs", "reports/weights")  # what lessons load in place of training
KEPT_PRIVATE = ("__pycache__", "grading", "classroom.py", "course.py", "pages.py", "site")


def folder() -> Path:
    """Where all of a course lies that is no lesson: released, handed in, graded, the grades."""
    return folder_from("RUNS_DIR", "runs") / "course"


def labs() -> dict:
    """Name → notebooks of each lab that has exercises."""
    found = {}
    for path in sorted(ROOT.glob("*/*.ipynb")):
        if any("nbgrader" in cell["metadata"] for cell in cells_of(path)):
            found.setdefault(path.parent.name, []).append(path)
    return found


def exercises_of(lab: str) -> list:
    """The notebooks of a lab, which must have exercises; raises WorkbookError."""
    found = labs()
    if not found:
        raise WorkbookError("no lab has exercises: cells with nbgrader's metadata; add some first")
    return found[choose("lab with exercises", lab, found)]


def cells_of(path: Path) -> list:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def student(lab: str) -> Path:
    """Write the student's edition of a lab: a folder that works alone, without solutions.

    Stubs and checks may fail in it, so that Run All goes to the end. Raises WorkbookError for a lab
    without exercises, and with nbgrader's last line where that fails.
    """
    notebooks = exercises_of(lab)
    shutil.rmtree(folder() / "release" / lab, ignore_errors=True)
    done = nbgrader("generate_assignment", lab, "--force", "--create")
    if done.returncode:
        raise WorkbookError(f"nbgrader cannot make {lab}: {last_error(done)}")
    target, draft = folder() / "student" / lab, folder() / "student" / f".{lab}.partial"
    shutil.rmtree(draft, ignore_errors=True)
    ignore = shutil.ignore_patterns(*KEPT_PRIVATE, "earlier")
    (draft / lab).mkdir(parents=True)
    for name in filter(lambda name: (ROOT / name).exists(), SHARED + RECORDED):
        copy = partial(shutil.copytree, ignore=ignore) if (ROOT / name).is_dir() else shutil.copy
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, draft / name)
    for path in (ROOT / lab).glob("*.yaml"):
        if not path.name.startswith(("experiment", "study")):  # they say what came out
            shutil.copy(path, draft / lab)
    for path in notebooks:
        released = folder() / "release" / lab / path.name
        write_file(draft / lab / path.name, may_fail(released.read_text(encoding="utf-8")))
    told = (GRADING / "STUDENT.md").read_text(encoding="utf-8")
    names = ", ".join(f"`{path.name}`" for path in notebooks)
    title = f"Lab {lab.removeprefix('Lab')}" if lab.startswith("Lab") else "Assignment"
    write_file(draft / "README.md", told.format(lab=lab, names=names, title=title))
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    print(f"{target}: hand out this folder")
    return target


def may_fail(notebook: str) -> str:
    """A notebook whose stubs and checks do not stop Run All, without the numbers of answers."""
    told = json.loads(notebook)
    for cell in told["cells"]:
        cell["metadata"].pop("answer", None)
        if cell["cell_type"] == "code" and "nbgrader" in cell["metadata"]:
            tags = cell["metadata"].setdefault("tags", [])
            tags += ["raises-exception"] * ("raises-exception" not in tags)
    return json.dumps(told, indent=1, ensure_ascii=False) + "\n"


def grade(lab: str) -> Path:
    """Grade what lies in `submitted/<student>/<lab>/`; write grades.csv, and a page each.

    Runs code that others wrote. What cannot be graded is named, and costs nobody else their grade;
    points given by hand are kept.
    """
    notebooks = exercises_of(lab)
    handed_in = sorted(path.parent.name for path in (folder() / "submitted").glob(f"*/{lab}"))
    if not handed_in:
        place = folder() / "submitted" / "NAME" / lab
        raise WorkbookError(f"nothing handed in; put each student's notebooks into {place}")
    done = nbgrader("generate_assignment", lab, "--force", "--create")
    if done.returncode:
        raise WorkbookError(f"nbgrader cannot make {lab}: {last_error(done)}")
    problems, limit = {}, f"--ExecutePreprocessor.timeout={LIMIT}"
    for name in handed_in:
        theirs = folder() / "submitted" / name / lab
        told = {path: trouble(theirs / path.name, path) for path in notebooks}
        forget(lab, name)
        for old in ("feedback", "autograded"):
            shutil.rmtree(folder() / old / name / lab, ignore_errors=True)
        for path in notebooks:
            if (theirs / path.name).exists():
                which = (f"--student={name}", f"--notebook={path.stem}")
                done = nbgrader("autograde", lab, *which, "--force", limit)
                if done.returncode and not told[path]:
                    told[path] = f"{path.name} cannot be graded: {last_error(done)}"
        problems[name] = "; ".join(filter(None, told.values()))
        nbgrader("generate_feedback", lab, f"--student={name}", "--force")
    grades = folder() / "grades.csv"
    done = nbgrader("export", f"--to={grades}")
    if done.returncode:
        raise WorkbookError(f"nbgrader cannot export: {last_error(done)}")
    for name, problem in problems.items():
        if problem:
            print(f"{name}: {problem}")
    print(f"{grades}: {len(handed_in)} handed in; a page each in {folder() / 'feedback'}")
    return grades


def forget(lab: str, name: str) -> None:
    """An earlier hand-in's points by autograding do not stand for one that cannot be graded."""
    from nbgrader.api import Gradebook, MissingEntry

    if not (grades := folder() / "gradebook.db").exists():
        return
    book = Gradebook(f"sqlite:///{grades}")
    with book, contextlib.suppress(MissingEntry):
        for notebook in book.find_submission(lab, name).notebooks:
            for each in notebook.grades:
                each.auto_score = 0
        book.db.commit()


def trouble(theirs: Path, ours: Path) -> str:
    """What is wrong with a notebook that was handed in, beside its answers; or nothing."""
    if not theirs.exists():
        return f"lacks {ours.name}"
    try:
        found = Counter(marked(theirs))
    except (OSError, ValueError, LookupError, TypeError):
        return f"{ours.name} is no notebook"
    wanted = Counter(marked(ours))
    gone, more = (", ".join(each) for each in (wanted - found, found - wanted))
    told = [f"{ours.name} lacks the cells {gone}"] * bool(gone)
    return "; ".join(told + [f"{ours.name} has too many cells {more}"] * bool(more))


def marked(path: Path) -> list:
    """The names of a notebook's cells for nbgrader."""
    metadata = [cell["metadata"] for cell in cells_of(path)]
    return [each["nbgrader"]["grade_id"] for each in metadata if "nbgrader" in each]


def nbgrader(*words) -> subprocess.CompletedProcess:
    """Call nbgrader on this workbook; raises WorkbookError where it is not installed."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # nbgrader calls alembic, which lies beside this Python.
    programs = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    own = os.environ | dict(JUPYTER_CONFIG_PATH=str(GRADING), PYTHONPATH=paths, PATH=programs)
    command = [sys.executable, "-m", "nbgrader", *words, f"--CourseDirectory.root={ROOT}"]
    done = subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True)
    if "No module named nbgrader" in done.stderr:
        raise WorkbookError('nbgrader is not installed; pip install "nbgrader>=0.9"')
    return done


def last_error(done: subprocess.CompletedProcess) -> str:
    """The line of nbgrader's output that says most: of an exception, or of its log."""
    lines = [line.strip() for line in done.stderr.splitlines()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    logged = [line.partition("| ERROR] ")[2] for line in lines if "| ERROR] " in line]
    return (named or logged or lines or ["no message"])[-1]
