"""Mutation testing of the mathematics: change one line in a copy, run the tests that concern it, expect a failure.

    python tests/mutate.py [--only losses.rsd methods …] [--jobs 2]

`mutants.yaml` lists the changes, to geometry/, losses/, methods/ and what they stand on. Each is made in a copy of the repository, in the notebook's cell and in the module that
the cell exports to. Until the first failure, run: for a mean over ranks, every piece on two ranks; the module's own page; the
pages of these rooms that import it; for a selector, `test_selectors.py`; the properties of `test_properties.py`; for a mean over ranks, every method on
several; all other pages that import the module. What failed must pass without the change. Processes are forked from one that has imported
torch, so that a page costs what its cells cost. Results go to experiments/results/mutants.json as they come; those of
other mutants are kept.
"""
import argparse
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, lru_cache
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
ROOMS = ("core", "geometry", "losses", "methods")
ELSEWHERE, UNTOUCHED = {"runs.diagnostics"}, {"core.files", "core.processes"}     # processes and files have tests of their own
LIST, RESULTS = ROOT/"tests"/"mutants.yaml", ROOT/"experiments"/"results"/"mutants.json"
PROPERTIES, SELECTORS = "tests/test_properties.py", ["tests/test_selectors.py"]
RANKS = [f"tests/test_ranks.py::test_every_{what}_on_several_ranks" for what in ("piece", "method")]
LIMIT = 300         # seconds for one page or test file
HEAVY = ("torch", "timm", "torchvision.transforms.v2", "matplotlib.pyplot", "sklearn.datasets", "scipy.linalg", "torchmetrics",
         "safetensors.torch", "pydantic", "fastprogress", "fastcore.test", "execnb.shell", "nbdev.process", "hypothesis",
         "pytest", "torch.testing", "torch.utils.data")
_context = multiprocessing.get_context("fork")


def mutants(only=()):
    "Entries of the list, numbered within their module; of these modules or rooms, if any are named"
    listed = yaml.safe_load(LIST.read_text())
    return [dict(module=module, number=i, **entry) for module, entries in listed.items() for i, entry in enumerate(entries, 1)
            if not only or module in only or module.split(".")[0] in only]


def source(module, root=ROOT): return root/"basd"/(module.replace(".", "/") + ".py")


@cache
def page(module):
    "The notebook that exports `module`, below the root"
    return "nbs/" + re.search(r"File to edit: [./]*nbs/(\S+\.ipynb)", source(module).read_text())[1]


def code(page):
    "The code cells of a notebook"
    return [c for c in page["cells"] if c["cell_type"] == "code"]


@lru_cache(maxsize=2)
def notebook(path): return json.loads(path.read_text())


def exported(cell): return re.search(r"^#\|\s*export[si]?\b", "".join(cell["source"]), re.M) is not None


def changed(mutant, root):
    "The two files that a mutant changes: path → text, path → notebook"
    old, new, where = mutant["old"], mutant["new"], f"{mutant['module']} {mutant['number']}"
    py, ipynb = source(mutant["module"], root), root/page(mutant["module"])
    text, whole = py.read_text(), notebook(ipynb)
    cells = [c for c in code(whole) if exported(c) and old in "".join(c["source"])]
    times = text.count(old), sum("".join(c["source"]).count(old) for c in cells)
    if times != (1, 1):
        raise ValueError(f"{where}: {old!r} occurs {times[0]} times in the module and {times[1]} in exported cells of its "
                         "page; choose a text that occurs once, as the code is now")
    if old == new: raise ValueError(f"{where} changes nothing")
    source_of_cell = "".join(cells[0]["source"]).replace(old, new)
    compile(source_of_cell, ipynb, "exec")
    new_cell = cells[0] | dict(source=source_of_cell.splitlines(True))
    return {py: text.replace(old, new), ipynb: whole | dict(cells=[new_cell if c is cells[0] else c for c in whole["cells"]])}


@cache
def pages():
    "Page → its code, in reading order"
    return {str(p.relative_to(ROOT)): "\n".join("".join(c["source"]) for c in code(json.loads(p.read_text())))
            for p in sorted(ROOT.glob("nbs/*/[!.]*.ipynb"), key=lambda p: p.name)}


@cache
def importers(module):
    "Pages that name `module` in their code"
    named = re.compile(rf"\bbasd\.{re.escape(module)}\b")
    return [p for p, text in pages().items() if named.search(text)]


def concerned(mutant):
    "Checks to run for a mutant, in order"
    own, others = page(mutant["module"]), importers(mutant["module"])
    near = [p for p in others if p.split("/")[1] in ROOMS]
    ranks = RANKS if mutant["kind"] == "ranks" else []
    selectors = SELECTORS if "@SELECTORS.register(" in source(mutant["module"]).read_text() else []
    return list(dict.fromkeys([*ranks[:1], own, *near, *selectors, PROPERTIES, *ranks[1:], *others]))


def git(*words, root=ROOT): return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip("\0\n")


def copy_of(root, to):
    "A copy of what git tracks, compiled"
    for name in git("ls-files", "-z", root=root).split("\0"):
        if (root/name).is_file():
            (to/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root/name, to/name)
    subprocess.run([sys.executable, "-m", "compileall", "-q", "basd", "tests"], cwd=to, check=True)


def run_page(path):
    "Run a notebook in this process; returns the error or None"
    from execnb.shell import CaptureShell
    from nbdev.config import get_config
    from nbdev.process import NBProcessor
    from run_notebooks import skipped
    flags, heading = set(get_config().tst_flags.split()), ["the beginning"]
    def preproc(cell):
        heading.extend(re.findall(r"^#+ (.+)", cell.source, re.M) if cell.cell_type == "markdown" else [])
        return skipped(cell, flags)
    nb, shell = NBProcessor(path, rm_directives=False).nb, CaptureShell(path, mpl_format="png")
    os.chdir(path.parent)
    try: shell.run_all(nb, exc_stop=True, preproc=preproc)
    except BaseException as e:
        return f"{heading[-1]}: {type(e).__name__} {next(iter(str(e).strip().splitlines()), '')}".strip()
    return None


def run_tests(words):
    "Run test files in this process; returns the failure or None"
    import pytest
    failed = []
    class Failed:
        def pytest_runtest_logreport(self, report):
            if report.failed: failed.append(report.nodeid.split("::")[-1])
        def pytest_collectreport(self, report):
            if report.failed: failed.append(f"{report.nodeid} cannot be collected")
    status = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *words], plugins=[Failed()])
    return None if status == 0 else failed[0] if failed else f"status {status}"


def child(check, tree, out):
    "Main function of a process that runs one page or test file in a copy"
    os.setsid()
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1); os.dup2(log, 2)
    paths = [str(tree), str(tree/"tests"), str(tree/"tools")]
    here = {"", *(str(p) for p in (ROOT, ROOT/"tests", ROOT/"tools"))}
    sys.path[:] = paths + [p for p in sys.path if p not in here]
    os.environ.update(PYTHONPATH=os.pathsep.join(paths), IN_TEST="1")
    os.chdir(tree)
    import basd
    assert Path(basd.__file__).is_relative_to(tree), basd.__file__
    wrong = run_page(tree/check) if check.endswith(".ipynb") else run_tests([check])
    Path(out).write_text(json.dumps(wrong))
    sys.stdout.flush()
    os._exit(0)


def run(check, tree, limit=LIMIT):
    "Run a check in a process of its own; returns the failure or None, and the seconds it took"
    with tempfile.TemporaryDirectory() as tmp:
        began, out = time.time(), Path(tmp)/"out"
        p = _context.Process(target=child, args=(check, tree, out))
        p.start(); p.join(limit)
        late = p.is_alive()
        try: os.killpg(p.pid, signal.SIGKILL)      # workers and ranks, too
        except ProcessLookupError: pass
        p.join()
        wrong = (f"no end within {limit} s" if late else json.loads(out.read_text()) if out.is_file()
                 else f"died with status {p.exitcode}")
        return wrong, time.time() - began


def green(check, clean):
    "Whether a check passes without any change (cached)"
    kept = clean.parent/f"{re.sub(r'[^a-z0-9]+', '_', check.lower())}.json"
    if not kept.is_file(): kept.write_text(json.dumps(run(check, clean)))
    return json.loads(kept.read_text())[0] is None


def judge(mutant, clean, own=False):
    "The mutant with what killed it, or None"
    began, red = time.time(), []
    with tempfile.TemporaryDirectory(dir=clean.parent) as tmp:
        tree = Path(tmp)/"tree"
        shutil.copytree(clean, tree)
        for path, text in changed(mutant, tree).items(): path.write_text(text if path.suffix == ".py" else json.dumps(text))
        for compiled in source(mutant["module"], tree).parent.glob(f"__pycache__/{mutant['module'].split('.')[1]}.*"):
            compiled.unlink()
        found = dict(by=None, how=None)
        for check in [page(mutant["module"])] if own else concerned(mutant):
            wrong, _ = run(check, tree)
            if wrong is None: continue
            if green(check, clean):
                found = dict(by=check, how=wrong[:200])
                break
            red.append(check)
    return mutant | found | dict(seconds=round(time.time() - began, 1), red=red)


def score(found):
    "Numbers of killed and of all mutants, by room and by module"
    names = dict.fromkeys(n for m in found for n in (m["module"].split(".")[0], m["module"]))
    of = lambda n: [m for m in found if m["module"] == n or m["module"].split(".")[0] == n]
    return {n: [sum(m["by"] is not None for m in of(n)), len(of(n))] for n in names}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--only", nargs="*", default=[], help="modules, as in losses.rsd, or rooms")
    p.add_argument("--number", nargs="*", type=int, default=[], help="and of these only the entries with these numbers")
    p.add_argument("--alive", action="store_true", help="and of these only what no result so far says is killed")
    p.add_argument("--own", action="store_true", help="run the module's own page alone, for a first look")
    p.add_argument("--jobs", type=int, default=2)
    p.add_argument("--out", type=Path, default=RESULTS)
    args = p.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", MPLBACKEND="agg")
    chosen = [m for m in mutants(args.only) if not args.number or m["number"] in args.number]
    if args.alive:
        dead = {(m["module"], m["old"], m["new"]) for m in recorded(args.out) if m["by"]}
        chosen = [m for m in chosen if (m["module"], m["old"], m["new"]) not in dead]
    if not chosen: sys.exit(f"no mutants of {', '.join(args.only)}; modules are {', '.join(yaml.safe_load(LIST.read_text()))}")
    for m in chosen: changed(m, ROOT)
    os.nice(10)
    sys.path.append(str(ROOT/"tools"))
    for name in HEAVY: importlib.import_module(name)
    began, found, commit = time.time(), [], git("rev-parse", "--short", "HEAD")
    with tempfile.TemporaryDirectory() as tmp:
        clean = Path(tmp).resolve()/"clean"
        clean.mkdir()
        copy_of(ROOT, clean)
        with ProcessPoolExecutor(args.jobs, mp_context=_context) as pool:
            for f in as_completed([pool.submit(judge, m, clean, args.own) for m in chosen]):
                m = f.result() | dict(commit=commit)
                found.append(m)
                if not len(found) % 20: keep(found, args.out, time.time() - began)
                print(f"{m['module']} {m['number']}, {m['kind']}, {m['new']!r}:", f"killed by {m['by']}, {m['how']}" if m["by"]
                      else f"SURVIVED {m.get('survives', '')}", f"({m['seconds']} s)",
                      *[f"(red without it, too: {c})" for c in m["red"]], flush=True)
    for name, (killed, of) in score(found).items(): print(f"{name:24} {killed:3} of {of:3}")
    keep(found, args.out, time.time() - began)
    if any(m["red"] for m in found): sys.exit("some pages or tests are red without a change")


def recorded(out): return json.loads(out.read_text())["mutants"] if out.is_file() else []


def keep(found, out, seconds):
    "Write the results, merged with earlier ones of mutants that are still in the list"
    if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
    from basd.runs.run_directory import environment
    key = lambda m: (m["module"], m["old"], m["new"])
    outcome = {key(m): {w: m[w] for w in ("by", "how", "seconds", "commit")} for m in [*recorded(out), *found]}
    found = [m | outcome[key(m)] for m in mutants() if key(m) in outcome]
    out.write_text(json.dumps(dict(
        mutants=found, score=score(found), listed=len(mutants()), seconds=round(seconds), date=time.strftime("%Y-%m-%d"),
        environment=environment()), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__": main()
