"""What an instructor and a student read: commands that exist, few words, a template that can be filled."""

import importlib.util
import re

import pytest

from common import ROOT, classroom

TEXT = (ROOT / "TEACHING.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"^```bash\n(.*?)^```", TEXT, flags=re.M | re.S))


def test_every_command_for_teachers_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = set(re.findall(r"^make ([\w-]+)", BLOCKS, flags=re.M))
    assert named >= {"student", "grade", "course-check"} and named <= targets, named - targets
    modules = set(re.findall(r"python3? -m ([\w.]+)", TEXT))
    assert "common.course" in modules
    assert not [module for module in modules if not importlib.util.find_spec(module)]


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:common|\.github)/[\w./]*\w", TEXT))))
def test_every_file_that_teachers_are_told_of_exists(path):
    assert (ROOT / path).exists()


def test_texts_for_teachers_and_students_are_short():
    told = (classroom.GRADING / "STUDENT.md").read_text(encoding="utf-8")
    assert len(TEXT.split()) <= 900 and len(told.split()) <= 350


def test_a_students_text_is_filled_with_lab_names_and_title():
    told = (classroom.GRADING / "STUDENT.md").read_text(encoding="utf-8")
    assert set(re.findall(r"{(.*?)}", told)) == {"lab", "names", "title"}
    filled = told.format(lab="Lab7", names="`a.ipynb`, `b.ipynb`", title="Lab 7")
    assert "{" not in filled and "}" not in filled and "Lab7/" in filled and "`b.ipynb`" in filled
