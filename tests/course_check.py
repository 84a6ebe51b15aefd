"""Does a lab come back graded as it should? By hand: `python -m tests.course_check Lab2`.

Five hand-ins, made of the student's edition, in a temporary folder; each notebook runs five times.
"""

import csv
import json
import os
import sys
import tempfile
import time
from types import SimpleNamespace

from nbgrader.api import Gradebook

from common import WorkbookError, classroom, write_file

LIMIT = 90  # seconds that a cell may take here, since one hand-in has a loop without an end
MINUTES = 5  # that autograding one hand-in may take
STUB = "raise NotImplementedError()"  # nbgrader leaves this in place of a solution


def exercises(paths) -> list:
    """Exercises in their order: each a code cell to fill, its checks below it, their points."""
    found = []
    for path in paths:
        for cell in filter(lambda cell: cell["cell_type"] == "code", classroom.cells_of(path)):
            told = cell["metadata"].get("nbgrader", {})
            name = path.stem, told.get("grade_id")
            if told.get("solution"):
                found.append(SimpleNamespace(name=name, checks=set(), points=0))
            elif told.get("grade"):
                found[-1].checks.add(name)
                found[-1].points += told["points"]
    return found


def hand_ins(number: int) -> dict:
    """Student → exercise → what stands there in place of the solution; -1 are the answers."""
    gap = lambda gap, solution: gap
    endless = lambda gap, solution: gap.replace(STUB, "while True: pass")
    broken = lambda gap, solution: f"import no_such_module\n{solution}"
    return {
        "perfect": {},
        "empty": dict.fromkeys(range(-1, number), gap),
        "half": dict.fromkeys(range(1, number, 2), gap),
        "loops": {number // 2: endless},
        "import": {0: broken},
    }


def hand_in(student, instead, lab, paths, found) -> None:
    """Fill the gaps of the student's edition, and put it where hand-ins lie."""
    places = {exercise.name: i for i, exercise in enumerate(found)}
    for path in paths:
        ours = {cell["id"]: "".join(cell["source"]) for cell in classroom.cells_of(path)}
        edition = classroom.folder() / "student" / lab / lab / path.name
        told = json.loads(edition.read_text("utf-8"))
        for cell in told["cells"]:
            if (mark := cell["metadata"].get("nbgrader", {})).get("solution"):
                place = places.get((path.stem, mark["grade_id"]), -1)
                gap, solution = "".join(cell["source"]), ours[cell["id"]]
                cell["source"] = instead[place](gap, solution) if place in instead else solution
        write_file(classroom.folder() / "submitted" / student / lab / path.name, json.dumps(told))


def grade(lab: str) -> tuple:
    """Student → row of grades.csv, and student → minutes of autograding."""
    minutes, plain = {}, classroom.nbgrader

    def timed(*words):
        began, done = time.monotonic(), plain(*words)
        if words[0] == "autograde":
            student = words[2].removeprefix("--student=")
            minutes[student] = minutes.get(student, 0) + (time.monotonic() - began) / 60
        return done

    classroom.nbgrader, classroom.LIMIT = timed, LIMIT
    with open(classroom.grade(lab), encoding="utf-8") as file:
        return {row["student_id"]: row for row in csv.DictReader(file)}, minutes


def failed(lab: str, student: str) -> set:
    """Cells of a student to which autograding gave nothing."""
    with Gradebook(f"sqlite:///{classroom.folder() / 'gradebook.db'}") as book:
        notebooks = book.find_submission(lab, student).notebooks
        return {(n.name, g.name) for n in notebooks for g in n.grades if not g.auto_score}


def main(lab: str = "Lab2") -> None:
    paths = classroom.exercises_of(lab)
    found, wrong = exercises(paths), []
    students, worth = hand_ins(len(found)), sum(each.points for each in found)
    with tempfile.TemporaryDirectory() as os.environ["RUNS_DIR"]:
        classroom.student(lab)
        for student, instead in students.items():
            hand_in(student, instead, lab, paths, found)
        rows, minutes = grade(lab)
        print(f"{len(found)} exercises, {worth:g} points by autograding\n")
        names = lambda some: ", ".join(each.name[1] for each in some) or "none"
        print("hand-in  points  maximum  minutes  exercises that got nothing")
        for student, instead in students.items():
            points, most = float(rows[student]["score"]), float(rows[student]["max_score"])
            nothing = failed(lab, student)
            lost = [each for each in found if each.checks & nothing]
            wanted = [found[i] for i in sorted(instead) if i >= 0]
            due = worth - sum(each.points for each in wanted)
            print(f"{student:7}{points:8g}{most:9g}{minutes[student]:9.1f}  {names(lost)}")
            if points != due or lost != wanted:
                wrong.append(f"{student} must get {due:g} points and lose {names(wanted)}")
            if minutes[student] > MINUTES:
                wrong.append(f"{student} took more than {MINUTES} minutes")
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except WorkbookError as error:
        sys.exit(f"error: {error}")
