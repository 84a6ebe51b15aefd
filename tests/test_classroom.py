"""A lab goes out and comes back: a small one, from the student's edition to grades and feedback."""

import contextlib
import io
import shutil

import nbformat
import pytest
from nbclient import NotebookClient

from common import WorkbookError, classroom

pytest.importorskip("nbgrader")
v4 = nbformat.v4
SOLUTION = "return 2 * x  # the solution, in a line of its own"
OURS = "Because two is the number of times that it is taken."


def graded(cell, name, points=None, solution=False):
    told = dict(grade_id=name, schema_version=3, solution=solution, task=False, locked=not solution, grade=points is not None)
    cell.metadata["nbgrader"] = told | ({} if points is None else dict(points=points))
    return cell


def toy():
    """A lesson with an exercise, its check, an answer to be marked by hand, and a last cell."""
    stub = f"def double(x):\n    ### BEGIN SOLUTION\n    {SOLUTION}\n    ### END SOLUTION"
    cells = [
        v4.new_markdown_cell("# Toy\n\n**Question.** Twice?"),
        graded(v4.new_code_cell(stub), "double", solution=True),
        graded(v4.new_code_cell('assert double(3) == 6, "did you add two?"'), "check-double", 2),
        graded(v4.new_markdown_cell(OURS), "why", 3, solution=True),
        v4.new_code_cell("print('to the end')"),
    ]
    kernel = dict(name="python3", display_name="Python 3", language="python")
    return v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A workbook with one small lab; its student's edition."""
    home = tmp_path_factory.mktemp("classroom")
    (home / "Toy").mkdir()
    nbformat.write(toy(), home / "Toy" / "toy.ipynb")
    (home / "Toy" / "README.md").write_text("what the instructor knows")
    (home / "Toy" / "settings.yaml").write_text("toy: {}\n")
    (home / "common").mkdir()
    for name in ("reports/runs/a.json", "reports/weights/a.pt", "reports/a.md"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("recorded")
    for name in ("helper.py", "course.py"):
        (home / "common" / name).write_text("# " + name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classroom, "ROOT", home)
        patch.setenv("RUNS_DIR", str(home / "runs"))
        classroom.student("Toy")
        yield home


@pytest.fixture
def edition(home):
    return home / "runs" / "course" / "student" / "Toy"


def test_a_students_folder_works_alone_and_tells_nothing(edition):
    found = sorted(str(path.relative_to(edition)) for path in edition.rglob("*") if path.is_file())
    recorded = ["reports/runs/a.json", "reports/weights/a.pt"]
    assert found == ["README.md", "Toy/settings.yaml", "Toy/toy.ipynb", "common/helper.py", *recorded]
    text = "".join((edition / name).read_text() for name in found)
    assert SOLUTION not in text and OURS not in text and "what the instructor knows" not in text
    assert "YOUR CODE HERE" in text and "`toy.ipynb`" in text and "{" not in (edition / "README.md").read_text()


def test_run_all_goes_to_the_end_of_a_students_notebook(edition):
    notebook = nbformat.read(edition / "Toy" / "toy.ipynb", as_version=4)
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    outputs = ["".join(str(output) for output in cell.get("outputs", ())) for cell in notebook.cells]
    assert "NotImplementedError" in outputs[2] and "to the end" in outputs[4]


def hand_in(home, name, change):
    notebook = nbformat.read(home / "runs/course/student/Toy/Toy/toy.ipynb", as_version=4)
    change(notebook.cells)
    place = home / "runs" / "course" / "submitted" / name / "Toy"
    place.mkdir(parents=True)
    nbformat.write(notebook, place / "toy.ipynb")


def write(code):
    def change(cells):
        cells[1].source = code

    return change


def easier(cells):
    cells[2].source = "pass"


def copied(cells):
    cells.insert(2, v4.new_code_cell(cells[1].source, metadata=cells[1].metadata))


@pytest.fixture(scope="module")
def grades(home):
    """Points of each student after all handed in what they have; what was printed lies beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classroom, "LIMIT", 10)
        hand_in(home, "perfect", write("def double(x):\n    return x + x"))
        hand_in(home, "loops", write("while True:\n    pass"))
        hand_in(home, "easier", easier)
        hand_in(home, "warns", write("import warnings\n\ndef double(x):\n    warnings.warn('twice')\n    return 2 * x"))
        hand_in(home, "own-common", write("from common.own import double"))
        own = home / "runs" / "course" / "submitted" / "own-common" / "Toy" / "common"
        own.mkdir()
        (own / "__init__.py").write_text("")
        (own / "own.py").write_text("def double(x):\n    return 2 * x")
        hand_in(home, "deleted", lambda cells: cells.pop(2))
        hand_in(home, "copied", copied)
        for name, content in (("no-notebook", "this is no notebook"), ("empty", None)):
            place = home / "runs" / "course" / "submitted" / name / "Toy"
            place.mkdir(parents=True)
            if content:
                (place / "toy.ipynb").write_text(content)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            path = classroom.grade("Toy")
    (home / "said").write_text(said.getvalue())
    rows = [line.split(",") for line in path.read_text().splitlines()]
    return {row[3]: float(row[rows[0].index("score")]) for row in rows[1:]}


def test_each_gets_their_points_and_nobody_costs_others_theirs(grades):
    assert grades["perfect"] == 2, "the answer waits for its mark; the rest stands already"
    none = {name: points for name, points in grades.items() if name not in ("perfect", "warns")}
    assert set(none) >= {"loops", "easier", "deleted", "copied"} and not any(none.values())


def test_feedback_is_a_page_for_each_that_was_graded(grades, home):
    pages = {path.parent.parent.name for path in (home / "runs" / "course" / "feedback").rglob("*.html")}
    assert pages >= {"perfect", "loops", "easier"} and "no-notebook" not in pages


def test_what_cannot_be_graded_is_named(home, grades):
    said = (home / "said").read_text().splitlines()
    for line in (
        "no-notebook: toy.ipynb is no notebook",
        "empty: lacks toy.ipynb",
        "deleted: toy.ipynb lacks the cells check-double",
        "copied: toy.ipynb has too many cells double",
    ):
        assert line in said
    assert not [line for line in said if line.startswith(("perfect", "loops", "easier"))]


def test_points_given_by_hand_stay_when_the_lab_is_graded_again(home, grades):
    for path in (home / "runs" / "course" / "submitted").iterdir():
        if path.name != "perfect":
            shutil.rmtree(path)
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{home / 'runs' / 'course' / 'gradebook.db'}") as book:
        book.find_grade("why", "toy", "Toy", "perfect").manual_score = 3
        book.db.commit()
    path = classroom.grade("Toy")
    row = next(line for line in path.read_text().splitlines() if ",perfect," in line)
    assert ",5.0," in row


def test_points_of_an_earlier_hand_in_do_not_stand_for_a_broken_one(home, grades):
    place = home / "runs" / "course" / "submitted" / "perfect" / "Toy" / "toy.ipynb"
    place.write_text("this is no notebook")
    row = next(line for line in classroom.grade("Toy").read_text().splitlines() if ",perfect," in line)
    assert ",3.0," in row and not list((home / "runs" / "course" / "feedback" / "perfect").rglob("*.html"))


def test_every_notebook_that_fails_is_told(home, monkeypatch, capsys):
    """Two notebooks that cannot be graded, one of them no notebook: both are named."""
    from types import SimpleNamespace

    monkeypatch.setenv("RUNS_DIR", str(home / "elsewhere"))
    paths = [home / "Toy" / "toy.ipynb", home / "Toy" / "other.ipynb"]
    shutil.copy(*paths)
    monkeypatch.setattr(classroom, "exercises_of", lambda lab: paths)
    place = home / "elsewhere" / "course" / "submitted" / "anna" / "Toy"
    place.mkdir(parents=True)
    shutil.copy(paths[0], place)
    (place / "other.ipynb").write_text("no notebook")

    def nbgrader(*words):
        failed = words[0] == "autograde"
        if words[0] == "export":
            (home / "elsewhere" / "course" / "grades.csv").touch()
        return SimpleNamespace(returncode=int(failed), stderr="OSError: the kernel died")

    monkeypatch.setattr(classroom, "nbgrader", nbgrader)
    classroom.grade("Toy")
    paths[1].unlink()
    assert "anna: toy.ipynb cannot be graded: OSError: the kernel died; other.ipynb is no notebook" in capsys.readouterr().out


def test_a_warning_costs_no_points_and_a_students_package_is_not_used(grades):
    assert grades["warns"] == 2 and grades["own-common"] == 0


def test_bad_input_is_one_line(home, tmp_path, monkeypatch):
    with pytest.raises(WorkbookError, match="unknown lab with exercises 'Tay' .did you mean 'Toy'"):
        classroom.student("Tay")
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    with pytest.raises(WorkbookError, match="nothing handed in; put each student's notebooks into"):
        classroom.grade("Toy")
    monkeypatch.setattr(classroom.sys, "executable", "/usr/bin/false")
    with pytest.raises(WorkbookError, match="nbgrader cannot make Toy"):
        classroom.student("Toy")
    monkeypatch.setattr(classroom, "ROOT", tmp_path)
    with pytest.raises(WorkbookError, match="no lab has exercises"):
        classroom.student("Toy")
