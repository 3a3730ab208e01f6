"What is released: one name, one version, and a refusal where another project's `basd` shares the folder"
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from shutil import copy

import pytest

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
