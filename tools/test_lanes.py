"""All tests at once, in lanes: what most of them import is imported once, and the lanes are forks of this process.

    python tools/test_lanes.py

Prints the end of each lane's output; status 1 if one fails, after all of its output. Tests of processes mostly wait for
starts and stops, and pages differ much in length: with six lanes, no core of two idles.
"""
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis  # noqa: F401  its pytest plugin imports it at the end of each lane
import pytest
from nbdev.doclinks import nbglob
from test_pages import prepare, report, test_pages

LANES = dict(
    processes=["kill", "labeled", "ranks", "shell", "sizes", "unlabeled"],
    numbers=["bad_input", "options", "properties", "selectors"],
    runs=["cka", "face", "frames", "knn", "nodes", "precision", "recipes", "reproducible"])
FILES = {name: [f"tests/test_{stem}.py" for stem in stems] for name, stems in LANES.items()}
FILES["others"] = ["tests", *(f"--ignore={path}" for paths in FILES.values() for path in paths)]


def lane(files, log):
    "Run pytest on `files` with its output in `log`, and end this process with its status"
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1); os.dup2(output, 2)
    sys.path.pop(0)                     # this folder, in which the tests do not lie
    sys.dont_write_bytecode = True      # a module that tests write twice within a second would be read as it was
    sys.exit(pytest.main(["-q", "--durations=10", *files]))


def start_docs(folder):
    "Start the docs, in a Python of their own"
    with open(folder/"docs", "w") as log: return subprocess.Popen([sys.executable, "tools/docs.py"], stdout=log, stderr=log)


def start_lanes(folder):
    "name → process"
    fork = multiprocessing.get_context("fork")
    lanes = {name: fork.Process(target=lane, args=(files, folder/name)) for name, files in FILES.items()}
    for process in lanes.values(): process.start()
    return lanes


def status_of(process):
    "Exit status of a lane, once it has ended"
    if isinstance(process, subprocess.Popen): return process.wait()
    process.join()
    return process.exitcode


def main():
    folder = Path(tempfile.mkdtemp())
    lanes = dict(docs=start_docs(folder))
    try:
        prepare()
        lanes |= start_lanes(folder)
        failed = report(*test_pages([p.absolute() for p in sorted(nbglob(as_path=True))], [], 2))
        for name, process in lanes.items():
            status, output = status_of(process), (folder/name).read_text()
            failed |= bool(status)
            print(f"{name}:", output if status else "\n".join(output.splitlines()[-14:]), sep="\n", flush=True)
        return failed
    finally:
        for process in lanes.values(): process.kill()


if __name__ == "__main__": sys.exit(main())
