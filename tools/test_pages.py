"""Test pages as `nbdev_test` does, each in a process of its own: a page defines anew what the package registered
(its methods, losses, selectors), and no other page may see that.

    python tools/test_pages.py                                  # all pages, two at a time
    python tools/test_pages.py nbs/losses/*.ipynb --flags "slow data" --workers 1

Prints the slowest pages; status 1 if a page fails, after its traceback, or shows other words than are saved in it.
"""
import argparse
import gc
import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot  # noqa: F401  what most pages import is imported once, before the fork
import scipy.stats  # noqa: F401
import sklearn.datasets  # noqa: F401  with its pandas and scipy the slowest of all
import sklearn.linear_model  # noqa: F401
import timm  # noqa: F401
import torch  # noqa: F401
import torchmetrics  # noqa: F401
import torchvision  # noqa: F401
import basd.cli  # noqa: F401
import basd.core.distributed
import basd.training.build  # noqa: F401
import basd.training.callbacks
from basd.data.sources import open_source
from basd.runs.recipe_files import recipe_names
from basd.runs.recipes import load_recipe
import nbdev.test
from execnb.shell import CaptureShell
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib_inline.backend_inline import set_matplotlib_formats
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb


def prepare():
    """Do what most tests and pages begin with, before the fork: read the digits, compile the options of the packaged recipes. The
    collector leaves alone what there is then: it would look through all modules again in each fork, and copy their memory. It is also called less often"""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)            # a pool of threads would not survive the fork
    for split in ("train", "test"): open_source("digits", split)
    for name in recipe_names(): load_recipe(name)
    torch.set_num_threads(threads)
    gc.collect(); gc.freeze(); gc.set_threshold(100_000, 50, 100)


class Rank:
    "What `subprocess.Popen` starts with `python -c`, as a fork of this process, which has imported the package already"
    def __init__(self, command, env=None):
        self.process = multiprocessing.get_context("fork").Process(target=self.run, args=command[2:])
        self.process.start()
        self.kill, self.wait = self.process.kill, self.process.join

    @staticmethod
    def run(code, *args):
        sys.argv = ["-c", *args]
        exec(code, {"__name__": "__main__"})

    def poll(self): return self.process.exitcode


def shown_text(outputs):
    "Text of a cell's outputs, without errors, figures and the time that is left"
    text = []
    for o in outputs:
        data = o.get("data") or {}
        if o.get("name") != "stderr" and "image/png" not in data:
            shown = data.get("text/markdown") or data.get("text/html") or data.get("text/plain") or o.get("text") or ""
            text.append("".join(shown))
    return "\n".join(line for line in "\n".join(text).splitlines() if "at this pace" not in line)


def words(text):
    "How often each word stands in a text; what has a digit in it differs from machine to machine"
    return Counter(w for w in re.findall(r"\w{3,}", text) if not re.search(r"\d", w))


class Saved(CaptureShell):
    "A shell that compares what a cell shows with what is saved in it, and notes where words differ; on the kind of machine that saved it"
    differ = None if torch.cuda.is_available() else ()

    def cell(self, cell, **kwargs):
        before = words(shown_text(cell.get("outputs") or []))
        cell["outputs"] = []
        super().cell(cell, **kwargs)
        text = shown_text(cell["outputs"])
        after = words(text)
        if text.startswith("not run here, since"): self.differ = None          # the package that a guide is about is missing
        if self.differ is not None and before != after:
            self.differ = (*self.differ, f"cell {cell.get('id')}: saved {' '.join(before - after) or '–'}, shown {' '.join(after - before) or '–'}")


def watch(found, shells):
    """Have pages run in a shell, put into `shells`, that puts into `found` the first cell after which torch's own generator has moved
    and was not seeded: its first state differs from process to process, and with it what the page shows and asserts. (A cell that draws
    and then seeds is not noticed.) Figures are drawn once and small, without adjusting their layout"""
    seed, start = torch.seed(), torch.get_rng_state()           # no page's own

    def watched(*args, **kwargs):
        shells.append(shell := Saved(*args, **kwargs))
        set_matplotlib_formats("png", bbox_inches=None)
        ConstrainedLayoutEngine.execute = lambda self, fig: None
        def look(result):
            if not found and torch.initial_seed() == seed and not torch.equal(torch.get_rng_state(), start):
                found.append(result.info.raw_cell)
        shell.events.register("post_run_cell", look)
        return shell
    nbdev.test.CaptureShell = watched


def test_page(path, skip, flags):
    ("Test the page at `path` and end this process with status 1 if it fails, draws without a seed or has saved outputs that it does not "
     "show any more. Runs draw their figure where the page shows it; ranks of `run_on_ranks` are forks, but on its own page")
    watch(unseeded := [], shells := [])
    basd.core.distributed.subprocess = SimpleNamespace(Popen=Rank)
    if not re.search(r"figures/run.png|'figures'", path.read_text()): basd.training.callbacks.plot_run = lambda run: None
    os.chdir(get_config().nbs_path)
    passed, _ = test_nb(path, skip_flags=skip, force_flags=flags, basepath=get_config().config_path)
    if unseeded: print(f"{path}: a cell draws from torch's generator, which nothing has seeded:\n{unseeded[0]}", file=sys.stderr)
    stale = [d for shell in shells for d in shell.differ or ()] if passed else []
    if stale: print(f"{path}: outputs are not those of the code, run tools/run_notebooks.py on it:", *stale, sep="\n    ", file=sys.stderr)
    sys.exit(0 if passed and not unseeded and not stale else 1)


FIRST = ["93_any_tokens", "88_compare", "91_first_run", "75_build", "84_compare_runs", "96_text"]   # the longest pages, so that none runs alone at the end


def jobs_of(pages, flags):
    "name → function and arguments of a process that tests a page, the longest first"
    skip = get_config().tst_flags.split()
    return {os.path.relpath(p): (test_page, p, skip, flags) for p in sorted(pages, key=lambda p: p.stem not in FIRST)}


def run_jobs(jobs, workers):
    "Run jobs as forks of this process, `workers` at a time and in their order: seconds of each, and names of those that failed"
    fork, waiting, running, seconds, failed = multiprocessing.get_context("fork"), list(jobs), {}, {}, []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                function, *args = jobs[name := waiting.pop(0)]
                process = fork.Process(target=function, args=args)
                process.start()
                running[process.sentinel] = name, process, time.monotonic()
            for sentinel in wait(running):
                name, process, start = running.pop(sentinel)
                process.join()
                seconds[name] = time.monotonic() - start
                if process.exitcode: failed.append(name)
    finally:
        for _, process, _ in running.values(): process.kill()
    return seconds, failed


def report(seconds, failed):
    "Print the slowest jobs and those that failed; whether there are any"
    print("slowest:", *(f"{t:6.1f} s  {name}" for name, t in sorted(seconds.items(), key=lambda o: -o[1])[:15]), sep="\n")
    print(f"{len(seconds)} jobs, {len(failed)} failed", *failed, sep="\n    ", flush=True)
    return bool(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="notebooks; all of `nbs` if none is given")
    parser.add_argument("--flags", default="", help="run the cells with these flags too")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    prepare()
    pages = [p.absolute() for p in sorted(args.pages or nbglob(as_path=True))]
    sys.exit(report(*run_jobs(jobs_of(pages, args.flags.split()), args.workers)))
