"""All tests at once, in lanes: what most of them import is imported once, and the lanes are forks of this process.

    python tools/test_lanes.py

The lanes of `pytest` and the docs begin first, then the pages, the longest first, `WORKERS` at a time. Prints the end of
each lane's output; status 1 if one fails, after all of its output.
"""
import os
import sys
import tempfile
from pathlib import Path

import hypothesis  # noqa: F401  its pytest plugin imports it at the end of each lane
import pytest
from nbdev.doclinks import nbglob
from test_pages import jobs_of, prepare, report, run_jobs

WORKERS = 3     # on two cores, as tests of processes often wait; with six, each takes a fifth more processor time
LANES = dict(
    processes=["kill", "labeled", "ranks", "shell", "sizes", "unlabeled"],
    numbers=["bad_input", "options", "properties", "selectors"],
    runs=["cka", "face", "frames", "knn", "nodes", "precision", "recipes", "reproducible"])
FILES = {name: [f"tests/test_{stem}.py" for stem in stems] for name, stems in LANES.items()}
FILES["others"] = ["tests", *(f"--ignore={path}" for paths in FILES.values() for path in paths)]


def write_to(log):
    "Have this process write what it says into a file"
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1); os.dup2(output, 2)


def lane(files, log):
    "Run pytest on `files` with its output in `log`, and end this process with its status"
    write_to(log)
    sys.path.pop(0)                     # this folder, in which the tests do not lie
    sys.dont_write_bytecode = True      # a module that tests write twice within a second would be read as it was
    sys.exit(pytest.main(["-q", "--durations=10", *files]))


def docs(log):
    "Become a Python that draws the docs"
    write_to(log)
    os.execv(sys.executable, [sys.executable, "tools/docs.py"])


def main():
    folder = Path(tempfile.mkdtemp())
    prepare()
    lanes = {name: (lane, files, folder/name) for name, files in FILES.items()} | dict(docs=(docs, folder/"docs"))
    pages = jobs_of([p.absolute() for p in sorted(nbglob(as_path=True))], [])
    seconds, failed = run_jobs(lanes | pages, WORKERS)
    for name in lanes:
        output = (folder/name).read_text()
        print(f"{name}:", output if name in failed else "\n".join(output.splitlines()[-14:]), sep="\n", flush=True)
    return report(seconds, failed)


if __name__ == "__main__": sys.exit(main())
