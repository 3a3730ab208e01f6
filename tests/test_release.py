"What is released: its name, version, files and types, and a refusal where another project's `basd` shares the folder"
import ast
import inspect
import json
import os
import re
import subprocess
import sys
import tarfile
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path
from shutil import copy
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import basd

ROOT = Path(__file__).parents[1]
CONFIG = ConfigParser(delimiters=["="])
CONFIG.read(ROOT/"settings.ini", encoding="utf-8")
CFG = CONFIG["DEFAULT"]
THEIRS = "def main(): print('a battery')"


def test_names():
    assert CFG["lib_name"] == "basd-distill" and CFG["lib_path"] == "basd"
    assert 'name="basd-distill"' in (ROOT/"pyproject.toml").read_text()
    assert set(CFG["console_scripts"].split()) == {"basd=basd_distill:start", "basd-distill=basd_distill:start"}
    for path in [ROOT/"README.md", *ROOT.glob("basd/**/*.py")]:
        assert not re.search(r"pip install '?basd(\[|['\s]|$)", path.read_text()), f"{path} installs another project"


def test_version():
    cited = yaml.safe_load((ROOT/"CITATION.cff").read_text())
    assert CFG["version"] == basd.__version__ == cited["version"]
    assert cited["title"] in (ROOT/"README.md").read_text() and cited["license"] == "Apache-2.0"
    assert cited["cff-version"] == "1.2.0" and cited["message"] and cited["authors"] == [
        {"name": CFG["author"], "email": CFG["author_email"]}]
    assert cited["repository-code"] == CFG["git_url"] and cited["url"] == CFG["doc_host"] + CFG["doc_baseurl"]


def test_tag(tmp_path):
    "A tag is refused if any of the four places has another version, and accepted if none has"
    sys.path.insert(0, str(ROOT/"tools"))
    try: from check_tag import tag_error
    finally: sys.path.pop(0)
    version = CFG["version"]
    (tmp_path/"basd").mkdir()
    for name in "settings.ini", "CITATION.cff", "basd/__init__.py": copy(ROOT/name, tmp_path/name)
    (tmp_path/"CHANGELOG.md").write_text(f"# Changelog\n\n## {version}\n\n## 0.0.1\n")
    assert tag_error(f"v{version}", tmp_path) is None
    assert tag_error(version, tmp_path).startswith(f"the tag is {version} and settings.ini has version {version}; tag v{version}")
    for name, sentence in (("CITATION.cff", "CITATION.cff has version 9.9.9"), ("basd/__init__.py", "basd/__init__.py has version 9.9.9"),
                           ("CHANGELOG.md", "the first section of CHANGELOG.md is '9.9.9'"), ("settings.ini", "settings.ini has version 9.9.9")):
        kept = (tmp_path/name).read_text()
        (tmp_path/name).write_text(kept.replace(version, "9.9.9"))
        assert sentence in tag_error(f"v{version}", tmp_path)
        (tmp_path/name).write_text(kept)


def test_workflows():
    "What workflows and issue forms name exists, and the versions of Python that they try are those that the package states"
    flows = {p.stem: yaml.safe_load(p.read_text()) for p in (ROOT/".github/workflows").glob("*.yml")}
    assert {"ci", "docs", "slow", "release"} == {*flows}
    for name, flow in flows.items():
        for job in flow["jobs"].values():
            for step in job["steps"]:
                assert ("run" in step) != ("uses" in step)
                for path in re.findall(r"(?:python|bash|pytest -q --slow) ((?:tools|tests|\.ci)/\S+)", step.get("run", "")): assert (ROOT/path).is_file(), path
        assert not {*(j for job in flow["jobs"].values() for j in [job.get("needs")] if j)} - {*flow["jobs"]}
    tried = flows["ci"]["jobs"]["versions"]["strategy"]["matrix"]
    assert tried == {"python": ["3.10", "3.11", "3.12", "3.13"], "which": ["lowest", "newest"]}
    assert str(tried["python"]).replace("'", '"')[1:-1] in (ROOT/"setup.py").read_text() and CFG["min_python"] == tried["python"][0]
    publish = flows["release"]["jobs"]["publish"]
    assert publish["needs"] == "build" and publish["permissions"] == {"id-token": "write"} and publish["if"] == "github.event_name == 'push'"
    for path in (ROOT/".github/ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        if path.stem == "config": continue
        assert form["name"] and form["description"] and all(f["type"] in ("textarea", "input") and f["attributes"]["label"] for f in form["body"])
        assert len({f["id"] for f in form["body"]}) == len(form["body"])


def test_core_has_no_web_framework():
    "What the package needs, and what that needs in turn, as it is installed here"
    found, waiting = set(), CFG["requirements"].split()
    while waiting:
        need = Requirement(waiting.pop())
        name = canonicalize_name(need.name)
        if name in found or need.marker and not need.marker.evaluate({"extra": ""}): continue
        found.add(name)
        try: waiting += requires(name) or []
        except PackageNotFoundError: pass       # for another system
    assert {"torch", "numpy", "fastprogress", "huggingface-hub"} <= found
    assert not found & set("aiohttp django fastapi flask python-fasthtml starlette tornado uvicorn werkzeug".split())


def test_lowest_python():
    "What Python 3.10 lacks, though its syntax allows it: the order of bytes has no default there"
    files = [*ROOT.glob("basd/**/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("tools/*.py"), ROOT/"basd_distill.py"]
    code = {path: path.read_text() for path in files}
    for path in ROOT.glob("nbs/**/*.ipynb"):
        cells = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        code[path] = "\n".join(c for c in cells if "_bytes(" in c and not re.search("^[%!]", c, re.M))
    for path, text in code.items():
        for n in ast.walk(ast.parse(text, feature_version=(3, 10))):
            if isinstance(n, ast.Call) and getattr(n.func, "attr", "") in ("from_bytes", "to_bytes"):
                assert len(n.args) == 2 or "byteorder" in {k.arg for k in n.keywords}, f"{path}: {ast.unparse(n)}"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "Names in the source distribution, and in the wheel that is made from it without the rest of the repository"
    pytest.importorskip("setuptools", "70.1")     # the first that makes wheels by itself
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    for name in subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n"):
        if (ROOT/name).is_file() and name.split("/")[0] not in ("experiments", "nbs") or name == "nbs/index.ipynb":
            (source/name).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT/name, source/name)
    build = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    def run(kind, folder):
        done = subprocess.run([sys.executable, "-c", build, kind, str(out)], cwd=folder, capture_output=True, text=True, check=True)
        return out/done.stdout.split()[-1]
    with tarfile.open(run("build_sdist", source)) as tar:
        tar.extractall(out, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))     # from Python 3.10.12 and 3.11.4
        inside = {n.partition("/")[2] for n in tar.getnames()}
    return inside, set(ZipFile(run("build_wheel", next(p for p in out.iterdir() if p.is_dir()))).namelist())


def test_files(built):
    "The package and no more: neither tests, notebooks, tools nor results"
    sdist, wheel = built
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT/"basd").rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert {"basd/py.typed", "basd/__init__.pyi", "basd/page.mplstyle", "basd/recipe.schema.json", "basd/recipes/digits/digits.yaml"} <= package
    extra = {n for n in wheel - package if ".dist-info/" not in n}
    assert package <= wheel and extra == {"basd_distill.py"}
    about = {n for n in sdist - package if n and "egg-info" not in n and "." in n.split("/")[-1]}
    assert package <= sdist and about == {"basd_distill.py", "settings.ini", "setup.py", "setup.cfg", "pyproject.toml", "README.md",
                                          "CHANGELOG.md", "CITATION.cff", "MANIFEST.in"}


def test_stubs():
    "Each public name is in the stub with the arguments that it has; the stubs are those that the package makes"
    sys.path.insert(0, str(ROOT/"tools"))
    try: import stubs
    finally: sys.path.pop(0)
    for path, text in stubs.stubs().items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)} is out of step; run python tools/stubs.py"
    tree = ast.parse((ROOT/"basd/__init__.pyi").read_text())
    functions = {n.name: [a.arg for a in n.args.posonlyargs + n.args.args + n.args.kwonlyargs] for n in tree.body
                 if isinstance(n, ast.FunctionDef)}
    named = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    for name, arguments in functions.items():
        assert arguments == [p.name for p in inspect.signature(getattr(basd, name)).parameters.values() if p.kind in named], name
    others = {a.asname for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names if a.asname}
    others |= {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign)} - {"__version__"}
    assert {*functions} | others == {*basd.__all__}


def test_typed_script(capsys):
    "The script that mypy reads runs, too"
    import typed_script
    typed_script.main()
    assert "'basd'" in capsys.readouterr().out


@pytest.mark.slow
def test_types(tmp_path):
    "`mypy --strict` accepts the script, and not one with each of six mistakes; half a minute, for the types of torch"
    if not find_spec("mypy"): pytest.skip("mypy is not installed")
    wrong = {"basd.create_taks": "attr-defined", "basd.create_student(num_classes='ten')": "arg-type", "TASK.follow()": "call-arg",
             "basd.load_recipe('digits')['kd'].train.epoch = 3": "attr-defined", "STUDENT(1).logit": "attr-defined",
             "with basd.tap(STUDENT.model) as taps: taps.wonder()": "attr-defined"}
    script = tmp_path/"wrong.py"
    script.write_text("\n".join(["import basd", "STUDENT = basd.create_student()", "TASK = basd.create_task('kd', STUDENT)", *wrong]))
    done = subprocess.run([sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path/"cache"),
                           str(ROOT/"tests/typed_script.py"), str(ROOT/"basd/__init__.pyi"), str(script)], cwd=tmp_path,
                          env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True)
    found = [(line.split(":")[0], line.split(":")[1], line.split("[")[-1][:-1]) for line in done.stdout.splitlines() if ": error: " in line]
    assert found == [("wrong.py", str(i), kind) for i,kind in enumerate(wrong.values(), 4)], done.stdout + done.stderr


@pytest.fixture
def folder(tmp_path):
    "A folder into which the distribution was installed, as far as its first lines need"
    (tmp_path/"basd").mkdir()
    for name in "basd_distill.py", "basd/__init__.py", "basd/__main__.py": copy(ROOT/name, tmp_path/name)
    (tmp_path/"basd/cli.py").write_text("def main(load): print('ours'); return 0")
    (tmp_path/"basd_distill-0.1.0.dist-info").mkdir()
    return tmp_path


def python(*words, path):
    "Exit status, output and errors of Python without the packages of this environment"
    done = subprocess.run([sys.executable, "-S", *words], env={"PYTHONPATH": str(path)}, cwd="/", capture_output=True, text=True)
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def install_theirs(folder, name="basd-2024.3.0.dist-info"): (folder/name).mkdir()


def refused(*words, path, needs="basd 2024.3.0, a distribution of another project, shares the folder"):
    status, out, error = python(*words, path=path)
    assert status == 2 and not out and error.count("\n") == 0, error
    assert needs in error and "pip uninstall -y basd basd-distill" in error, error


def test_alone(folder):
    for words in ["-m", "basd"], ["-m", "basd_distill"]: assert python(*words, path=folder) == (0, "ours", "")
    install_theirs(folder, "basd_extra-1.0.dist-info")
    assert python("-m", "basd_distill", path=folder) == (0, "ours", "")


def test_installed_over_theirs(folder):
    install_theirs(folder)
    for words in ["-m", "basd"], ["-m", "basd_distill"]: refused(*words, path=folder)
    status, _, error = python("-c", "import basd", path=folder)
    assert status == 1 and "\nImportError: basd 2024.3.0, a distribution of another project" in error


def test_theirs_installed_over(folder):
    install_theirs(folder)
    for name in "basd/__init__.py", "basd/__main__.py": (folder/name).write_text(THEIRS)
    refused("-m", "basd_distill", path=folder)


def test_theirs_found_first(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    install_theirs(other)
    (other/"basd").mkdir()
    (other/"basd/__init__.py").write_text(THEIRS)
    refused("-m", "basd_distill", path=f"{other}:{folder}")
    assert python("-m", "basd_distill", path=f"{folder}:{other}") == (0, "ours", "")


def test_their_uninstallation_took_ours_along(folder):
    for name in "basd/__init__.py", "basd/__main__.py": (folder/name).unlink()
    refused("-m", "basd_distill", path=folder, needs="files of basd-distill are missing")


def test_their_command_finds_our_package(folder):
    refused("-c", "import sys; from basd import main; sys.exit(main())", path=folder, needs="is the command of another project")
