"""The way in: the first cell wherever it may stand, badges, what is missing, the doctor, the pages."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup

import common
from common import ROOT, WorkbookError, course, doctor, mirrors, pages, sources

LESSONS = list(pages.lessons())
CELL = course.FIRST_CELL.format(source="")
USED = "\nprint('used', common.HOME)"


def run(code, folder, **environment):
    """A first cell, run as a script: in an environment that has no other way to the workbook."""
    own = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "WORKBOOK_REPOSITORY")}
    own |= dict(LC_ALL="C")  # git's words are matched
    # -S: not even an editable installation is seen.
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=own | environment)


def last(result):
    assert result.returncode
    return result.stderr.strip().splitlines()[-1]


@pytest.fixture
def clone(tmp_path):
    """A repository in small: what the first cell looks for, and what it calls."""

    def make(name, parent=tmp_path):
        home = parent / name
        (home / "common").mkdir(parents=True)
        shutil.copy(ROOT / "common" / "__init__.py", home / "common")
        (home / "common" / "lesson.py").touch()
        (home / "pyproject.toml").write_text('Release = "https://github.com/x/y/tree/v1"\n')
        (home / "requirements.txt").write_text("# nothing\n")
        return home

    return make


def commit(home):
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com", "-C", str(home)]
    for words in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-q", "-m", "x"], ["tag", "v1"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    return f"file://{home}"


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_is_as_make_badges_writes_it(path):
    address, tag = pages.repository()
    text = path.read_text()
    assert course.addressed(text, path.relative_to(ROOT).as_posix(), address, tag) == text, "make badges"
    assert sum("common.enter(homes" in "".join(cell["source"]) for cell in json.loads(text)["cells"]) == 1


def test_the_first_cell_is_short_and_speaks_old_python():
    assert len(CELL.splitlines()) <= 15 and max(map(len, CELL.splitlines())) <= 88
    for text in (CELL, (ROOT / "common" / "__init__.py").read_text()):
        ast.parse(text, feature_version=(3, 9))


def test_a_badge_and_a_first_cell_lead_to_one_version():
    path, name = LESSONS[0], "Lab1/baseline.ipynb"
    text = course.addressed(path.read_text(), name, "", "")
    of = "https://github.com/someone/some-course"
    tagged = course.addressed(text, name, of, "v1.0")
    cells = json.loads(tagged)["cells"]
    badge = f"colab.research.google.com/github/someone/some-course/blob/v1.0/{name})"
    assert "".join(cells[0]["source"]).count(badge) == 1
    assert f'"--branch v1.0 {of}"' in tagged.replace('\\"', '"')
    untagged = course.addressed(tagged, name, of, "")
    assert "/blob/main/" in untagged and "v1.0" not in untagged and untagged.count("colab-badge") == 1
    assert course.addressed(untagged, name, "", "") == text


@pytest.fixture
def course_copy(tmp_path, monkeypatch):
    """A copy of what `badges` writes to, in a repository of its own."""
    home = tmp_path / "course"
    for path in LESSONS:
        (home / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        notebook = course.addressed(path.read_text(), "x", "", "")
        (home / path.relative_to(ROOT)).write_text(notebook)
        shutil.copy(path.parent / "settings.yaml", home / path.parent.relative_to(ROOT))
    project = re.sub(r"\n\[project.urls\]\n([^\[\n].*\n)*", "", (ROOT / "pyproject.toml").read_text())
    (home / "pyproject.toml").write_text(project)
    subprocess.run(["git", "init", "-q", str(home)], check=True)
    monkeypatch.setattr(course, "ROOT", home)
    monkeypatch.setattr(pages, "ROOT", home)
    return home


@pytest.mark.parametrize(
    "origin,found",
    (
        ("https://github.com/someone/some-course.git", True),
        ("https://github.com/someone/some-course/", True),
        ("https://someone:secret@github.com/someone/some-course.git", False),
        ("git@github.com:someone/some-course.git", False),
        ("https://git.example.com/someone/some-course", False),
        ("https://github.com/someone/some-course/../x", False),
        ("/home/someone/some-course", False),
    ),
)
def test_only_a_public_address_is_taken_from_git(origin, found, course_copy):
    before = {path: path.read_bytes() for path in course_copy.rglob("*") if path.is_file() and ".git" not in path.parts}
    subprocess.run(["git", "-C", str(course_copy), "remote", "add", "origin", origin], check=True)
    course.badges()
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    if not found:
        assert not changed
        return
    assert changed == {"pyproject.toml", *(path.name for path in LESSONS)}
    assert pages.repository() == ("https://github.com/someone/some-course", "")
    course.badges("v2.1")
    assert pages.repository() == ("https://github.com/someone/some-course", "v2.1")
    for path in LESSONS:
        name = path.relative_to(ROOT)
        text = (course_copy / name).read_text()
        assert f"/github/someone/some-course/blob/v2.1/{name.as_posix()})" in text and "--branch v2.1 https" in text
    fork = ["git", "-C", str(course_copy), "remote", "set-url", "origin", "https://github.com/fork/of-it"]
    subprocess.run(fork, check=True)
    course.badges()
    assert pages.repository()[0] == "https://github.com/someone/some-course", "what is written counts"
    assert pages.repository()[1] == "v2.1", "a release stays until another one is named"
    course.badges("")
    assert pages.repository() == ("https://github.com/someone/some-course", "")
    with pytest.raises(WorkbookError, match="name of a release"):
        course.badges('v1" --upload-pack "x')


def test_other_addresses_of_the_project_stay_and_a_strange_one_is_refused(course_copy):
    file = course_copy / "pyproject.toml"
    before = file.read_text()
    own = "\n[project.urls]\nHomepage = \"https://example.com\"\nRepository = 'https://github.com/a/b'\n\n[tool."
    file.write_text(before.replace("\n[tool.", own, 1))
    course.badges("v1")
    assert pages.repository() == ("https://github.com/a/b", "v1")
    assert 'Homepage = "https://example.com"' in file.read_text() and file.read_text().count("Repository") == 1
    for address in ("https://gitlab.com/a/b", "https://me:sesame@github.com/a/b", "https://github.com/a/b/tree/main"):
        file.write_text(before.replace("\n[tool.", f'\n[project.urls]\nRepository = "{address}"\n\n[tool.', 1))
        with pytest.raises(WorkbookError, match="no public address at github.com; write one") as caught:
            course.badges()
        assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("below", (".", "Lab1", "Lab1/inner/inner"))
def test_the_first_cell_finds_the_workbook_above(below, clone):
    home = clone("workbook")
    (home / below).mkdir(parents=True, exist_ok=True)
    result = run(CELL + USED, home / below)
    assert result.stdout == f"used {home}\n", result.stderr


def test_the_nearest_workbook_comes_first(clone, tmp_path):
    """Above the notebook, then beside it, then where Python looks."""
    far, here, above = clone("far", tmp_path / "x"), clone("here"), tmp_path / "above"
    clone("aaa", here)
    clone("beside", above)
    (tmp_path / "empty").mkdir()
    for folder, expected in ((here, here), (above, above / "beside"), (tmp_path / "empty", far)):
        result = run(CELL + USED, folder, PYTHONPATH=str(far))
        assert result.stdout.endswith(f"used {expected}\n"), result.stderr


def test_the_workbook_stays_found_after_a_change_of_folder(clone, tmp_path):
    address, empty = commit(clone("origin", tmp_path / "far")), tmp_path / "empty"
    empty.mkdir()
    result = run(CELL + "\nos.chdir('/')\nimport common.lesson" + USED, empty, WORKBOOK_REPOSITORY=address)
    assert result.stdout.endswith(f"used {empty / 'cifar-workbook'}\n"), result.stderr


def test_of_several_workbooks_it_says_which_one(clone, tmp_path):
    first, second = clone("a"), clone("b")
    result = run(CELL + USED, tmp_path)
    assert result.stdout.splitlines() == [f"This is the workbook in {first}; not used: {second}.", f"used {first}"]
    assert "not used" not in run(CELL + USED, second, PYTHONPATH=str(second)).stdout, "the same one twice"


@pytest.mark.parametrize("tag", ("", "--branch v1 "))
def test_where_there_is_none_it_is_cloned_once(tag, clone, tmp_path):
    address, empty = commit(clone("origin", tmp_path / "far")), tmp_path / "empty"
    empty.mkdir()
    for _ in range(2):
        result = run(CELL + USED, empty, WORKBOOK_REPOSITORY=tag + address)
        first = "" if address == "file:///nowhere" else f"The workbook was cloned to {empty / 'cifar-workbook'}.\n"
        assert result.stdout == f"{first}used {empty / 'cifar-workbook'}\n", result.stderr
        address = "file:///nowhere"  # the second time it is here


def test_a_lesson_of_another_release_is_told(clone):
    home = clone("workbook")
    for tag, words in (("v1", ""), ("v2", "This lesson is of release v2, the workbook in")):
        said = run(CELL, home, WORKBOOK_REPOSITORY=f"--branch {tag} https://github.com/x/y").stdout
        assert said.startswith(words) and bool(said) == bool(words)


@pytest.mark.parametrize(
    "case,message",
    (
        ("no address", "put the repository here"),
        ("unreachable", "does not appear to be a git repository"),
        ("no git", "git: not found"),
        ("read-only", "could not create work tree"),
        ("in the way", "already exists"),
    ),
)
def test_what_keeps_it_from_cloning_is_one_line(case, message, clone, tmp_path):
    address, folder = commit(clone("origin", tmp_path / "far")), tmp_path / "empty"
    folder.mkdir()
    if case == "in the way":
        (folder / "cifar-workbook").mkdir()
        (folder / "cifar-workbook" / "mine.txt").touch()
    own = dict(WORKBOOK_REPOSITORY=address)
    if case in ("no address", "unreachable"):
        own = dict(WORKBOOK_REPOSITORY=case[:2] == "un" and "file:///nowhere" or "")
    if case == "no git":
        own["PATH"] = str(tmp_path)
    if case == "read-only":
        folder = Path("/proc")  # the administrator cannot write there either
        if not folder.exists():
            pytest.skip("no /proc")
    result = run(CELL, folder, **own)
    assert re.match("AssertionError: put the repository here", last(result)) and message in last(result), result.stderr
    assert case != "in the way" or (folder / "cifar-workbook" / "mine.txt").exists()


def test_another_package_of_this_name_is_told_apart(clone, tmp_path):
    home, other = clone("workbook"), tmp_path / "other"
    (other / "common").mkdir(parents=True)
    (other / "common" / "__init__.py").touch()
    assert run(CELL + USED, home, PYTHONPATH=str(other)).stdout == f"used {home}\n", "on the path: ours comes first"
    result = run("import common\n" + CELL, home / "common", PYTHONPATH=str(other))
    assert "restart the kernel" in last(result) and str(other) in last(result)


def test_an_old_python_is_one_line(clone):
    result = run("import sys\nsys.version_info = (3, 9, 18)\n" + CELL, clone("workbook"))
    assert last(result) == "ImportError: the workbook needs Python 3.10 or newer; this is 3.9"


@pytest.fixture
def lacking(tmp_path, monkeypatch):
    """A workbook that needs two packages that nobody has."""
    own = "# a comment\ntorch>=2.9\nno-such-package>=1.0\npyyaml>=6\nnobodys>=2\njupyterlab>=4\n-e .\n"
    (tmp_path / "requirements.txt").write_text(own)
    monkeypatch.setattr(common, "HOME", tmp_path)
    return {"no-such-package": "no-such-package>=1.0", "nobodys": "nobodys>=2"}


def test_a_folder_that_is_named_like_a_package_is_none(lacking, tmp_path, monkeypatch):
    (tmp_path / "nobodys").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert common.missing() == lacking


def test_the_command_to_install_works_from_any_folder(lacking, tmp_path):
    """requirements.txt names "."; and paths may have spaces."""
    assert common.install_command().startswith(f'cd "{tmp_path}" && "{sys.executable}" -m pip')


def test_what_is_missing_is_named_with_the_command(lacking):
    assert common.missing() == lacking
    with pytest.raises(WorkbookError, match="not installed: no-such-package, nobodys; .* -m pip install -r requirements.txt"):
        common.enter([])


def test_on_colab_only_what_is_missing_is_installed(lacking, tmp_path, monkeypatch, capsys):
    """And what is there is pinned: pip is told to change none of it."""
    calls = []

    def pip(command, **options):
        calls.append((command, Path(command[command.index("-c") + 1]).read_text()))
        return subprocess.CompletedProcess(command, 0, "", "")

    (tmp_path / "google" / "colab").mkdir(parents=True)
    (tmp_path / "google" / "colab" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "google", raising=False)
    monkeypatch.setattr(common.subprocess, "run", pip)
    common.enter(["."])
    (command, pins), said = calls[0], capsys.readouterr().out
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert [word for word in command if ">=" in word] == list(lacking.values())
    version = importlib.metadata.version
    assert pins.split() == [f"{name}=={version(name)}" for name in ("torch", "pyyaml", "jupyterlab")]
    assert "installing no-such-package, nobodys" in said and "RUNS_DIR" in said and "Save a copy" in said
    monkeypatch.setattr(
        common.subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, 1, "", "a\nERROR: no network")
    )
    with pytest.raises(WorkbookError, match="cannot install no-such-package, nobodys .ERROR: no network.; check the connection"):
        common.enter([])


def test_the_requirements_are_named_as_they_are_installed():
    """Each name of requirements.txt has a version here, and its module is found."""
    assert len(common.requirements()) > 10 and not common.missing()
    for name in common.requirements():
        assert importlib.metadata.version(name)


def check(*found):
    def told():
        yield from found

    return told


def test_the_doctor_says_how_and_ends_with_a_status(capsys):
    assert doctor.main([check(("fine", None))]) == 0
    assert capsys.readouterr().out.splitlines() == ["[OK]  fine", "This machine is ready."]

    def broken():
        yield "found before", None
        raise OSError("something\nstrange")

    def lame():
        import no_such_package

        yield no_such_package

    def refused():
        raise WorkbookError("the file is bad; delete it")
        yield

    assert doctor.main([broken, check(("bad", "mend it")), refused, check(("fine", None))]) == 1
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "[OK]  found before"
    assert lines[0] == "[FIX] broken: OSError: something strange" and "report it" in lines[1]
    assert lines[2:-1] == ["[FIX] bad", "      → mend it", "[FIX] the file is bad", "      → delete it", "[OK]  fine"]
    assert doctor.main([lame]) == 1 and "pip install" in capsys.readouterr().out


def test_the_doctor_lives_without_packages(tmp_path):
    """A Python that has none of them: each is named, and the command; the status is 1."""
    code = "import sys; from common import doctor; sys.exit(doctor.main([doctor.packages, doctor.place, doctor.data]))"
    result = run(code, ROOT, PYTHONPATH=str(ROOT), CIFAR_DIR=str(tmp_path))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "accelerate is missing; " in result.stdout and result.stdout.count("pip install -r requirements.txt") >= 2


@pytest.mark.parametrize(
    "found,line,fits",
    (
        ("2.14.1+cu130", "torch>=2.9", True),
        ("2.8.1", "torch>=2.9", False),
        ("2.9", "torch>=2.9", True),
        ("10.0", "pillow>=9.5", True),
        ("0.1.1.post2", "thop>=0.1.1.post2", True),
    ),
)
def test_the_doctor_compares_versions_as_numbers(found, line, fits, monkeypatch):
    monkeypatch.setattr(doctor, "requirements", lambda: {"it": line})
    monkeypatch.setattr(doctor.metadata, "version", lambda name: found)
    mends = [mend for _, mend in doctor.packages()]
    assert (mends == [None]) == fits


def test_the_doctor_names_what_is_missing_and_asks_all_mirrors_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR_DIR", str(tmp_path))
    monkeypatch.delenv("CIFAR_URL", raising=False)
    monkeypatch.setattr(sources, "MIRRORS", ["https://a.example/x", "https://b.example", "https://c.example"])
    started, all_three = [], threading.Barrier(3, timeout=5)

    def rate(url, seconds):
        started.append(url)
        all_three.wait()  # each waits for the others
        return 2e6 if "b.example" in url else 0

    monkeypatch.setattr(mirrors, "rate", rate)
    ((text, mend),) = doctor.data()
    assert "a.example no answer, b.example 2.0 MB/s, c.example no answer" in text
    assert mend.endswith("-m common.sources cifar10 cifar100")
    assert "https://a.example/x/cifar-10-python.tar.gz" in started
    (tmp_path / "cifar10.npz").write_bytes(b"nothing")
    with pytest.raises(WorkbookError, match="cifar10.npz"):
        list(doctor.data())


def test_the_doctor_names_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(doctor, "requirements", lambda: {"no-such-package": "no-such-package>=1"})
    assert [text for text, mend in doctor.packages() if mend] == ["no-such-package is missing"]


def test_the_doctor_looks_at_disk_memory_and_device(tmp_path, monkeypatch):
    import psutil
    import torch

    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    usage, memory = shutil.disk_usage("/")._replace(free=10**9), psutil.virtual_memory()._replace(available=10**9)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    (_, fine), (disk, mend) = doctor.place()
    assert fine is None and "1 GB free" in disk and "RUNS_DIR" in mend and not list((tmp_path / "runs").iterdir())
    (kind, fine), (free, mend) = doctor.device()
    assert fine is None and "1.0 GB of memory" in free and mend
    assert ("no GPU" in kind) == (not torch.cuda.is_available() and not torch.backends.mps.is_available())
    (tmp_path / "file").touch()
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "file"))
    with pytest.raises(WorkbookError, match="cannot write"):
        list(doctor.place())


def test_the_doctor_compares_with_the_recorded_run():
    ((text, mend),) = doctor.speed(0)
    here, there, minutes = (float(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:images|in its|minutes)", text))
    manifest = json.loads((ROOT / "reports" / "runs" / f"{doctor.REFERENCE}.json").read_text())
    assert here > 0 and abs(minutes - manifest["seconds"] / 60) < 1
    assert abs(there - 45_000 * manifest["epochs"] / manifest["seconds"]) < 0.1 * there, "its images a second"
    assert bool(mend) == (here < there / 3)


def test_the_doctor_ends_with_a_status(tmp_path):
    (tmp_path / "cifar10.npz").write_bytes(b"nothing")
    own = os.environ | dict(CIFAR_DIR=str(tmp_path))
    result = subprocess.run([sys.executable, "-m", "common.doctor"], cwd=ROOT, env=own, capture_output=True, text=True)
    assert result.returncode == 1 and "[FIX] cannot read" in result.stdout
    assert result.stdout.count("[OK]") >= 4 and result.stdout.splitlines()[-1].startswith("Something is to be mended")


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def executed(path):
    """A lesson's notebook as it might look after a run: a badge, one picture, one widget."""
    text = course.addressed(path.read_text(), path.relative_to(ROOT).as_posix(), "https://github.com/a/b", "v1")
    notebook = nbformat.reads(text, as_version=4)
    picture = {"image/png": PIXEL, "text/plain": "a picture"}
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    output = nbformat.v4.new_output("display_data", picture, metadata={"image/png": {"alt": 'a "small" picture'}})
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "x", "version_major": 2, "version_minor": 0}}
    cell.outputs = [output, nbformat.v4.new_output("display_data", widget | {"text/plain": "a bar of progress"})]
    return notebook


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """All pages, of lessons that did not run."""
    folder = tmp_path_factory.mktemp("site")

    def execute(path, scale, kept):
        nbformat.write(executed(path), folder / path.name)
        return folder / path.name

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS_DIR", str(folder))
        patch.setattr(pages, "execute", execute)
        patch.setattr(pages, "mathjax", lambda site: True)
        pages.build()
    return folder / "pages"


def test_every_link_of_the_pages_leads_somewhere(site):
    found = sorted(site.rglob("*.html"))
    assert len(found) == 1 + len(LESSONS) + len(pages.texts())
    soups = {page: BeautifulSoup(page.read_text(), "html.parser") for page in found}
    ids = {page: {each["id"] for each in soup.select("[id]")} for page, soup in soups.items()}
    for page, soup in soups.items():
        for element in soup.select("a[href], img[src], script[src]"):
            address, _, part = (element.get("href") or element["src"]).partition("#")
            if not re.match("https?:|data:", address) and "mathjax" not in address:
                target = Path(os.path.normpath(page.parent / address)) if address else page
                assert target.is_file() and target.stat().st_size, f"{page.name} leads to {address}"
                assert not part or target not in ids or part in ids[target], f"{page.name} leads to {address}#{part}"
        inside = {urllib.parse.unquote(a["href"].partition("#")[0]) for a in soup.main.select("a[href]")}
        sources_too = [address for address in inside if address.endswith((".ipynb", ".md")) and "//" not in address]
        assert len(sources_too) <= (page.name == "README.html") * 3, "a lesson or report has a page"


def test_the_pages_load_nothing_from_elsewhere_and_every_picture_has_words(site):
    for page in site.rglob("*.html"):
        soup = BeautifulSoup(page.read_text(), "html.parser")
        loaded = [e.get("src") or e.get("href") for e in soup.select("[src], link[href]")]
        assert not [address for address in loaded if re.match("https?:|//", address)], page
        assert all(img.get("alt") and "No description" not in img["alt"] for img in soup.select("img")), page
        assert "a bar of progress" not in soup.get_text(), "that needs a kernel"
    assert "url(" not in (site / "style.css").read_text() and "@import" not in (site / "style.css").read_text()


def test_the_index_has_the_question_the_time_and_a_picture_of_each_lesson(site):
    soup = BeautifulSoup((site / "index.html").read_text(), "html.parser")
    cards = soup.select("section")
    assert len(cards) == len(LESSONS)
    for item, (path, about) in zip(cards, pages.lessons().items()):
        name, (quick, laptop) = path.relative_to(ROOT), (about[scale]["minutes"] for scale in ("quick", "laptop"))
        quick, laptop = (each if isinstance(each, str) else f"{each} min" for each in (quick, laptop))
        assert item.select_one(".small").get_text() == f"quick: {quick} · laptop: {laptop}"
        assert {a["href"] for a in item.select("a")} == {name.with_suffix(".html").as_posix()}
        title, question = (item.select_one(tag).get_text() for tag in ("h2", "p"))
        first = "".join(json.loads(path.read_text())["cells"][0]["source"])
        assert first.startswith(f"# {title}\n") and question.endswith("?") and question in first.replace("*", "")
        assert item.img["alt"] == 'a "small" picture' and (site / item.img["src"]).read_bytes()[:4] == b"\x89PNG"
        assert (site / path.relative_to(ROOT)).read_bytes() == path.read_bytes(), "the lesson to download"


def test_a_lesson_leads_to_its_neighbours_and_its_file(site):
    text = (site / "Lab1" / "advanced.html").read_text()
    soup = BeautifulSoup(text, "html.parser")
    links = {a.get_text(): a["href"] for a in soup.nav.select("a")}
    assert links == {
        "CIFAR Workbook": "../index.html", "Reports": "../reports/README.html",
        "Previous": "baseline.html", "Next": "speedrun.html", "Download": "advanced.ipynb",
    }  # fmt: skip
    last = BeautifulSoup((site / LESSONS[-1].relative_to(ROOT).with_suffix(".html")).read_text(), "html.parser")
    assert [a.get_text() for a in last.nav.select("a")][2:] == ["Previous", "Download"]
    assert "colab-badge.svg" not in text and soup.find("a", string="Open in Colab")["href"].endswith("/v1/Lab1/advanced.ipynb")
    assert "mathjax/tex-svg.js" in text and "common.enter" not in text
    others = {a["href"] for a in BeautifulSoup((site / "index.html").read_text(), "html.parser").nav.select("a")}
    assert {f"{lab}/README.html" for lab in pages.LABS} < others


def test_without_npm_formulas_stay_and_it_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pages.mathjax(tmp_path / "site") is False and "npm cannot fetch" in capsys.readouterr().out
    assert not (tmp_path / "site").exists()


def test_names_and_words_are_escaped_and_pictures_from_elsewhere_are_words(tmp_path, monkeypatch):
    lab = tmp_path / "lab"
    lab.mkdir()
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    pictures = "![a cat](https://example.com/cat.png) ![a dog](//example.com/dog.png)"
    text = f"# One <1> & two\n\n**Question.** Why?\n\n{pictures} [gone](gone.md) [near](near.txt)"
    (lab / "near.txt").write_text("near")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    pages.write_page(tmp_path / "site", lab / "one.ipynb", notebook, set(), False)
    soup = BeautifulSoup((tmp_path / "site" / "lab" / "one.html").read_text(), "html.parser")
    assert soup.title.get_text() == "One <1> & two" and not soup.select("img") and "a cat a dog" in soup.get_text()
    assert [a["href"] for a in soup.main.select("a:not(.anchor-link)")] == ["near.txt"]
    assert (tmp_path / "site" / "lab" / "near.txt").read_text() == "near"
    card = pages.card(tmp_path / "site", lab / "one.ipynb", notebook, {"quick": {"minutes": 1}, "laptop": {"minutes": "2 h"}})
    index = pages.render(title="x", root="", links=[], cards=[card | dict(picture="p.png", alt='the "best"')], scale="quick")
    assert BeautifulSoup(index, "html.parser").img["alt"] == 'the "best"'
    assert card["picture"] is None and card["quick"] == "1 min" and card["question"] == "Why?"


def test_a_page_is_made_anew_only_if_something_changed(tmp_path, monkeypatch):
    lab = tmp_path / "lab"
    lab.mkdir()
    lesson, calls = lab / "one.ipynb", []
    lesson.write_text("1")
    (lab / "settings.yaml").write_text("1")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "x.py").write_text("1")

    status, scales = [0], []

    def papermill(command, **options):
        calls.append(options["env"]["RUNS_DIR"])
        scales.append(command[command.index("scale") + 1] if "scale" in command else "quick")
        Path(next(word for word in command if "draft" in word)).write_text(json.dumps({"ran in": calls[-1]}))
        return subprocess.CompletedProcess(command, status[0], "", "many lines\nWorkbookError: epochs=0")

    monkeypatch.setattr(pages.subprocess, "run", papermill)
    made = [pages.execute(lesson, "quick", tmp_path / "kept") for _ in range(2)]
    assert len(calls) == 1 and made[0] == made[1] and made[0].exists()
    for path in (lesson, lab / "settings.yaml", tmp_path / "common" / "x.py"):
        path.write_text("2")
        pages.execute(lesson, "quick", tmp_path / "kept")
    assert len(set(calls)) == 4, "each in a folder of its own"
    assert len(list((tmp_path / "kept").iterdir())) == 1, "what is old goes"
    assert "tmp" not in next((tmp_path / "kept").iterdir()).read_text(), "no path of this machine"
    (lab / "experiment.py").write_text("1")
    quick, laptop = (pages.execute(lesson, scale, tmp_path / "kept") for scale in ("quick", "laptop"))
    assert quick != laptop and quick.exists() and scales == ["quick"] * 5 + ["laptop"]
    other = pages.execute(lesson.rename(lab / "two.ipynb"), "quick", tmp_path / "kept")
    assert quick.exists() and other.exists(), "each lesson has its own"
    status[0] = 1
    (lab / "two.ipynb").write_text("broken")
    with pytest.raises(WorkbookError, match="two.ipynb failed: WorkbookError: epochs=0$"):
        pages.execute(lab / "two.ipynb", "quick", tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 3, "what failed is not kept"


def test_a_lesson_that_fails_does_not_cost_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    monkeypatch.setattr(pages, "mathjax", lambda site: False)
    monkeypatch.setattr(pages, "texts", lambda: [ROOT / name / "README.md" for name in (*pages.LABS, "reports")])
    told = tmp_path / "told.ipynb"
    nbformat.write(executed(LESSONS[0]), told)

    def execute(path, scale, kept):
        if path == LESSONS[1]:
            raise WorkbookError("Lab1/advanced.ipynb failed: WorkbookError: epochs=0")
        return told

    monkeypatch.setattr(pages, "execute", execute)
    with pytest.raises(WorkbookError, match="^Lab1/advanced.ipynb failed"):
        pages.build()
    site = tmp_path / "pages"
    assert (site / "index.html").read_text().count("<section>") == len(LESSONS) - 1
    for page in site.rglob("*.html"):
        for element in BeautifulSoup(page.read_text(), "html.parser").select("a[href]"):
            address = element["href"].partition("#")[0]
            assert not address or "//" in address or (page.parent / address).is_file(), f"{page}: {address}"
    with pytest.raises(WorkbookError, match="unknown scale 'big'"):
        pages.build("big")
