"Pages are numbered in import order, rooms import one way, and no room holds most of the code"
import ast
import io
import json
import multiprocessing
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# room → rooms whose modules it may import
ORDER = ["core", "geometry", "losses", "models", "data", "methods", "runs", "training", "analysis", "benchmark", "cli"]
MAY = {room: set(ORDER[:i + 1]) for i, room in enumerate(ORDER)}
MAY["geometry"] = {"core", "geometry"}
MAY["losses"] = {"core", "geometry", "losses"}
MAY["models"] = {"core", "models"}
MAY["data"] = {"core", "data"}
MAY["analysis"] -= {"training"}
# Demonstrations that show a function on what a later page makes
LOOKS_AHEAD = {
    "geometry/11_selector": {"data.mixing"}, "geometry/13_frequency_selector": {"data.mixing"},
    "losses/22_token_relations": {"models.taps"}, "losses/34_logit_trajectory": {"models.taps"},
    "models/38_last_layers": {"models.students"}}
NUMBERED = sorted(p for p in ROOT.glob("nbs/**/[0-9][0-9]_*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def name(path): return str(path.relative_to(ROOT/"nbs").with_suffix(""))


def module(path): return re.sub(r"(^|/)\d\d_", r"\1", name(path)).replace("/", ".")


def number(path): return int(re.match(r"\d\d", path.name)[0])


PAGE = {module(p): p for p in NUMBERED}


def cells(path):
    "(code, whether it is exported) of each cell that is run"
    for c in json.loads(path.read_text())["cells"]:
        s = "".join(c["source"])
        if c["cell_type"] == "code" and "eval: false" not in s:
            lines = ("" if l.startswith(("%", "!")) else l for l in s.splitlines())
            yield "\n".join(lines), re.search(r"^#\|\s*export", s, re.M) is not None


def imported(code, deep):
    "Modules of the package that a cell imports, in functions too if `deep`"
    tree = ast.parse(code)
    for node in ast.walk(tree) if deep else tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("basd."):
            m = node.module.removeprefix("basd.")
            yield from [m] if m in PAGE else [f"{m}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("basd.") for a in node.names if a.name.startswith("basd."))


@pytest.mark.parametrize("page", list(map(name, NUMBERED)))
def test_a_page_imports_from_lower_numbers(page):
    path = ROOT/"nbs"/f"{page}.ipynb"
    for code, exported in cells(path):
        for m in imported(code, deep=True):
            if m not in PAGE or PAGE[m] == path or not exported and m in LOOKS_AHEAD.get(page, ()): continue
            assert number(PAGE[m]) < number(path), f"{page} imports {m}"


def test_rooms_import_one_way():
    for file in ROOT.glob("basd/*/*.py"):
        room = file.parent.name
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2 and node.module:
                assert node.module.split(".")[0] in MAY[room], f"{file.name} of {room} imports {node.module}"


def test_no_room_is_most_of_the_house():
    of = lambda pattern: sum(len(f.read_text().splitlines()) for f in ROOT.glob(pattern))
    lines = {room: of(f"basd/{room}.py") + of(f"basd/{room}/*.py") for room in ORDER}
    assert max(lines.values()) <= .15*sum(lines.values()), lines


def test_exceptions_are_needed():
    for page, modules in LOOKS_AHEAD.items():
        found = {m for code, exported in cells(ROOT/"nbs"/f"{page}.ipynb") if not exported for m in imported(code, deep=True)}
        assert modules <= found, f"{page} looks ahead no longer"


def test_the_engine_names_no_technique():
    "The trainer names no technique: a technique extends the loop by its own callback"
    for name in ("trainer", "task"):
        text = (ROOT/"basd"/"training"/f"{name}.py").read_text().lower()
        found = re.findall(r"\b(dot|pocl|vrm|deit|momenta|curriculum|twins|distilled)\b", text)
        assert not found, f"{name}.py: {found}"


def code_of(path):
    "Source of a module, or of the code cells of a page, without shell lines"
    if path.suffix == ".py": return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("" if line[:1] in "%!" else line for c in cells if c["cell_type"] == "code" for line in "".join(c["source"]).split("\n"))


def test_names_are_words_of_the_field():
    "A variable holds a message, outputs or lines; nothing in code says, tells, asks or hears"
    wrong = re.compile(r"_?(said|says?|told|tells?|asks?|asked|heard|hears?|gives?_up|rivals?|lessons?)(_[a-z]+)?")
    texts = [p for folder in ("nbs", "tests", "tools", "experiments") for p in sorted((ROOT/folder).rglob("*"))
             if p.suffix in (".py", ".ipynb") and ".ipynb_checkpoints" not in p.parts]
    found = {}
    for path in texts:
        for n in ast.walk(ast.parse(code_of(path))):
            for x in (getattr(n, k, None) for k in ("id", "arg", "name", "attr")):
                if isinstance(x, str) and wrong.fullmatch(x) and (path.stem, x) != ("58_multi_teacher", "ask"): found[path.stem, x] = 1
    assert len(texts) > 150 and not found, found                # `ask`, a module's name in saved weights


def test_what_one_page_alone_uses_is_private():
    "Names in `__all__` that no other module, page, test or script uses: classes and functions that a reader may import, no more than there are"
    words = lambda text: set(re.findall(r"[A-Za-z_]\w*", text))
    public = {m: ast.literal_eval(re.search(r"^__all__ = (\[.*?\])", (ROOT/"basd"/f"{m.replace('.', '/')}.py").read_text(), re.DOTALL | re.MULTILINE)[1])
              for m in PAGE if (ROOT/"basd"/f"{m.replace('.', '/')}.py").exists()}
    used = {p: words(code_of(p)) for folder in ("nbs", "tests", "tools", "experiments") for p in (ROOT/folder).rglob("*")
            if p.suffix in (".py", ".ipynb") and ".ipynb_checkpoints" not in p.parts}
    alone = [(m, n) for m,names in public.items() for n in names if not any(n in w for p,w in used.items() if p != PAGE[m])]
    assert sum(map(len, public.values())) > 500 and len(alone) <= 135, f"{len(alone)}: begin a helper's name with _ : {alone}"


def test_an_option_of_words_refuses_others():
    "A public class or function with a `Literal` option checks it: where code asks `if form == 'soft'`, a misspelling is the other form"
    open_ones, seen = [], 0
    for path in sorted((ROOT/"basd").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for scope in (tree, *(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef))):
            for f in (n for n in scope.body if isinstance(n, ast.FunctionDef) and (n.name == "__init__" or not n.name.startswith("_"))):
                words = {a.arg for a in [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
                         if a.annotation and ast.unparse(a.annotation).startswith("Literal[")}
                checked = {k.arg for c in ast.walk(f) if isinstance(c, ast.Call) and ast.unparse(c.func) == "check_choices" for k in c.keywords}
                open_ones += [f"{path.stem}.{getattr(scope, 'name', '')}.{f.name}: {a}" for a in sorted(words - checked)]
                seen += len(words)
    assert seen > 35 and not open_ones, open_ones


# names in comments that are another package's, a file's or the environment's
ELSEWHERE = {"VisionTransformer", "WANDB_MODE", "MLFLOW_TRACKING_URI", "selectors_FRAME"}


def test_comments_name_what_exists():
    "A name in backticks in a comment or docstring is the code's; after a renaming it would be the old one"
    names, quoted = set(ELSEWHERE) | {"json"}, {}
    for path in sorted((ROOT/"basd").rglob("*.py")):
        for t in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if t.type == tokenize.NAME: names.add(t.string)
            elif t.type == tokenize.STRING and "`" not in t.string: names |= {*re.findall(r"\w+", t.string)}
            elif t.type in (tokenize.COMMENT, tokenize.STRING):
                quoted |= {w: f"{path.name}:{t.start[0]}" for w in re.findall(r"`([A-Za-z_][\w.]*)`", t.string)}
    gone = {w: at for w,at in quoted.items() if not names.issuperset(w.split("."))}
    assert len(quoted) > 400 and not gone, gone


MINUTES = re.compile(r"\(((?:[a-z]+/)?\w+)\.ipynb\)[^\n]*?(?:\(|\| )(\d+) min")


def minutes(page):
    "Reading time with the code: 100 words of prose and 20 lines of code per minute"
    cells = json.loads(page.read_text())["cells"]
    text = {kind: "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == kind) for kind in ("markdown", "code")}
    return len(text["markdown"].split())/100 + sum(bool(line.strip()) for line in text["code"].splitlines())/20


@pytest.mark.parametrize("page", ["use", "add"])
def test_reading_times(page):
    "Times in a reading order are those of the pages, to within five minutes or a quarter"
    found = MINUTES.findall("\n".join("".join(c["source"]) for c in json.loads((ROOT/f"nbs/{page}.ipynb").read_text())["cells"]))
    far = {p: (int(given), round(m)) for p,given in found if abs(int(given) - (m := minutes(ROOT/f"nbs/{p}.ipynb"))) > max(5, m/4)}
    assert len(found) > 5 and not far, far


def test_the_loop_fits_on_a_screen():
    import inspect

    from basd.training.trainer import Trainer
    for name in ("fit", "run_epoch", "run_step", "emit"):
        assert len(inspect.getsource(getattr(Trainer, name)).splitlines()) <= 30, name


def test_a_label_has_the_number_of_its_page():
    texts = [(ROOT/"_quarto.yml").read_text(), *("".join(c["source"]) for p in ROOT.glob("nbs/*.ipynb") for c in json.loads(p.read_text())["cells"])]
    found = [m for t in texts for pattern in (r'text: "(\d\d) [^"]*", href: [\w/]*?(\d\d)_', r"\[(\d\d) [^\]\n]*\]\((?:[\w./]*/)?(\d\d)_")
             for m in re.findall(pattern, t)]
    assert len(found) > 100 and [m for m in found if m[0] != m[1]] == []


# pages above 70 cells → why they are not two
LONG = {
    "guides/recipe_keys": "a reference: one section for each method, loss and selector",
    "geometry/11_selector": "one module, with the derivation of each of its choices and the planted layers that test them",
    "methods/51_basd": "one method and its options; its parts have pages of their own",
    "runs/61_recipes": "42 definitions of one schema and its errors",
    "models/41_teachers": "one section for each source of weights, with the faults it has",
    "analysis/76_evaluation": "27 definitions, one for each figure of a report",
    "geometry/13_frequency_selector": "a second selector in full: profiles, distances, the module",
    "losses/29_cka": "the measure and the loss that is one minus it",
    "data/46_sources": "40 definitions: six kinds of source behind one interface",
    "data/47_views": "28 definitions: views of an image, and the loader that makes them",
    "analysis/81_curvature": "22 definitions of one measurement: products, Lanczos, trace, slices",
    "losses/23_attention": "21 definitions of one loss, its samples and its published form",
    "runs/63_diagnostics": "one section for each thing that goes wrong",
    "benchmark/85_step_cost": "36 definitions of one benchmark",
    "geometry/09_grassmann": "distances, their gradients, and how a subspace is followed",
    "training/75_build": "a run from recipe to trainer, and the guarantees that are tested on whole runs",
    "analysis/79_attention_distance": "one measurement with the cases whose answer is known",
    "losses/24_spectral": "three forms of one loss and their gradients",
    "geometry/15_alignment": "one module and what it is compared with",
    "studies/96_text": "four published methods on text",
    "losses/30_gram": "three losses on similarity matrices",
    "core/02_numerics": "what all losses share: float32 regions, covariances, directions, decompositions",
    "analysis/78_corruptions": "eight corruptions and the test set of them"}


def test_a_long_page_has_a_reason():
    long = {name(p): n for p in ROOT.glob("nbs/*/*.ipynb") if ".ipynb_checkpoints" not in p.parts
            and (n := len(json.loads(p.read_text())["cells"])) > 70}
    assert long.keys() == LONG.keys(), "shorten it, split it, or say above why it is one page"


@pytest.fixture
def status_of(tmp_path, monkeypatch):
    "Test a page of one cell; its exit status"
    monkeypatch.syspath_prepend(ROOT/"tools")
    from test_pages import test_page
    def run(source, outputs=()):
        page = tmp_path/"page.ipynb"
        cell = dict(cell_type="code", execution_count=None, id="1", metadata={}, outputs=[*outputs], source=[source])
        page.write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
        process = multiprocessing.get_context("fork").Process(target=test_page, args=(page, [], []))
        process.start(); process.join()
        return process.exitcode
    return run


@pytest.mark.parametrize("cell, status", [("import torch; torch.rand(1);", 1), ("import torch; torch.manual_seed(0); torch.rand(1);", 0)])
def test_a_page_seeds_before_it_draws(cell, status, status_of, capfd):
    "Torch's generator starts anywhere, in each process, so a page that does not seed it shows and asserts other numbers each time"
    assert status_of(cell) == status and ("which nothing has seeded" in capfd.readouterr().err) == bool(status)


@pytest.mark.parametrize("saved, status", [("'a word and 1.25'", 0), ("'a word and 7'", 0), ("'a name that is no more, and 1.25'", 1), (None, 1)])
def test_a_page_shows_what_its_code_does(saved, status, status_of, capfd):
    "Words that are saved and not shown are stale; numbers differ from machine to machine"
    outputs = [dict(data={"text/plain": [saved]}, execution_count=None, metadata={}, output_type="execute_result")]*(saved is not None)
    assert status_of("'a word and 1.25'", outputs) == status and ("outputs are not those of the code" in capfd.readouterr().err) == bool(status)
