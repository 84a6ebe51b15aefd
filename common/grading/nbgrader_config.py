"""nbgrader's settings: our lab folders are its source; all else lies in $RUNS_DIR/course.

nbgrader finds this file where JUPYTER_CONFIG_PATH names its folder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import ROOT, folder_from

c = get_config()  # noqa: F821
course = folder_from("RUNS_DIR", "runs") / "course"
course.mkdir(parents=True, exist_ok=True)
c.CourseDirectory.root = str(ROOT)
c.CourseDirectory.course_id = "cifar"
c.CourseDirectory.source_directory = "."
c.CourseDirectory.release_directory = str(course / "release")
c.CourseDirectory.submitted_directory = str(course / "submitted")
c.CourseDirectory.autograded_directory = str(course / "autograded")
c.CourseDirectory.feedback_directory = str(course / "feedback")
c.CourseDirectory.db_url = f"sqlite:///{course / 'gradebook.db'}"
c.IncludeHeaderFooter.enabled = False
c.IgnorePattern.enabled = True  # a warning on stderr costs no points
c.IgnorePattern.pattern = "."
c.CourseDirectory.ignore = ["*"]  # notebooks alone: a student's common/ would take ours' place
