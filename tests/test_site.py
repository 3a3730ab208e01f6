"What the site promises: headings, signatures and links of tools/rendering.py, and settings that name what exists."
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from execnb.nbio import dict2nb, mk_cell
from nbdev.process import NBProcessor
from nbdev.processors import hide_, rm_export

root = Path(__file__).parents[1]
sys.path.insert(0, str(root/"tools"))
rendering = pytest.importorskip("rendering")


def rendered(*cells):
    "Texts and code of a page with these cells (markdown starts with `md:`), as the site gets them"
    made = [mk_cell(c.removeprefix("md:"), "markdown" if c.startswith("md:") else "code") for c in
            ("md:---", "#| default_exp geometry.grassmann", *cells)]
    nb = dict2nb({"cells": made, "metadata": {}})
    nb.path_ = str(root/"nbs"/"geometry"/"09_grassmann.ipynb")
    NBProcessor(nb=nb, procs=[rendering.Entries, rm_export, hide_, rendering.Links, rendering.Doors], process=True)
    return [cell.source for cell in nb.cells[1:]]


named_tuple = '''class Ritz(NamedTuple):
    "Values and weights"
    values:Tensor # ascending, (k,)
    weights:Tensor # sum to one
    def top(self): return self.values[-1]'''
choice = '''@cache
def rows(
    x:Tensor, # of `principal_angles`
    form:Literal['tokens', 'means']='tokens', # which
    weight:Annotated[float, Field(gt=0)]=1.,
)->Tensor: # (n,)
    "Rows of `principal_angles`"
    return x'''
patched = '''@patch
@torch.no_grad()
def step(self:Trainer, n=1):
    "One step"
    return n'''


def test_signature_where_the_source_is_hidden():
    text = "\n".join(rendered("#| export\n" + named_tuple, "#| export\n" + choice, "#| export\n" + patched))
    for line in ("class Ritz(NamedTuple):\n    values:Tensor # ascending, (k,)\n    weights:Tensor # sum to one\n```",
                 "form:Literal['tokens', 'means']='tokens', # which", "weight:Annotated[float, Field(gt=0)]=1.,",
                 ")->Tensor: # (n,)\n```", "def step(self:Trainer, n=1):\n```"):
        assert line in text
    assert "args" not in text and "return" not in text


def test_no_signature_above_shown_source():
    heading, source = rendered("#| exports\n" + choice)[1:]
    assert "```" not in heading and "{#rows .definition}" in heading and source == choice


def test_names_link_in_text_and_not_in_code():
    page = "\n".join(rendered("#| export\n" + choice, "md:```\n`principal_angles`\n```\n\nSee `principal_angles`."))
    assert page.count("](https://basd-project.github.io/basd/geometry/grassmann.html#principal_angles)") == 2
    fenced = re.findall(r"^```.*?^```", page, re.M | re.S)
    assert len(fenced) == 2 and not any("](http" in code for code in fenced)


def test_a_patched_method_keeps_its_class():
    text = rendered("#| exports\n" + patched)[1]
    assert "### Trainer.step {#trainer.step .definition}" in text and "*One step*" in text


def test_shown_by_hand_once():
    cells = rendered("#| export\n" + named_tuple, "show_doc(Ritz)", "show_doc(Ritz.top)")
    assert [c.count("{#ritz .definition}") for c in cells] == [0, 1, 0] and "### Ritz.top" in cells[-1]
    with pytest.raises(ValueError, match=r"show_doc\(nothing\): no exported cell of this page defines it"):
        rendered("show_doc(nothing)")


def test_private_and_hidden_names_have_no_heading():
    assert "###" not in "".join(rendered("#| exports\ndef _inner(): pass", "#| export\n#| hide\ndef f(): pass"))


def test_anchors_are_unique():
    text = "\n".join(rendered("md:## Cka", "#| exports\ndef cka(x): 'a'", "#| exports\nclass CKA: 'b'"))
    assert re.findall(r"\{#([\w-]+)", text) == ["about-cka", "cka", "cka-1"]


def test_a_name_in_two_modules_leads_to_the_page_s_own_or_imported_one():
    link = lambda *cells: re.search(r"\(https://.*?/basd/(.*?)\)", "\n".join(rendered(*cells)[1:]))
    assert link("md:`mean_squared_cca`")[1] == "geometry/grassmann.html#mean_squared_cca"
    assert not link("md:`plot_weights`")
    assert link("from basd.analysis.spectra import plot_weights", "md:`plot_weights`")[1] == "analysis/spectra.html#plot_weights"


def test_colab_where_the_page_runs_alone():
    plain, alone = rendered("md:x")[0], rendered(f"#| hide\nif {rendering.in_colab}: pass", "md:x")[0]
    assert "colab" not in plain and "github.com/basd-project/basd/blob/main/nbs/geometry/09_grassmann.ipynb" in plain
    assert "colab.research.google.com/github/basd-project/basd/blob/main/nbs/geometry/09_grassmann.ipynb" in alone


def test_the_cell_for_colab_is_on_the_pages_that_run_alone():
    colab = pytest.importorskip("colab")
    pages = {path: json.loads(path.read_text(encoding="utf-8")) for path in (root/"nbs").glob("*/*.ipynb")}
    assert [path.stem for path, nb in pages.items() if colab.with_cell(nb, path.stem) != nb] == [], "run python tools/colab.py"
    nb = {"cells": [mk_cell("# Title", "markdown"), mk_cell("Path('../../experiments/results/race.json').read_text()")]}
    assert colab.with_cell(nb, "x") == nb
    nb = {"cells": nb["cells"][:1] + [mk_cell("1 + 1")]}
    assert "git+https://github.com/basd-project/basd" in "".join(colab.with_cell(nb, "x")["cells"][1]["source"])


trouble = """<main><h2 id="here">x</h2><pre style="overflow: auto"><code>{long}</code></pre><img src="a.png" width="600">
<pre><code>see [f](https://example.org)</code></pre><pre>def Plan(\n    *args, **kwargs\n):</pre>
<a href="gone.html">a</a><a href="sound.html#gone">b</a><a href="sound.html#there">c</a><a href="https://example.org">d</a></main>
<script>console.error('no')</script>"""


def test_the_checker_sees_each_kind_of_trouble(tmp_path):
    check_site = pytest.importorskip("check_site")
    if not check_site.found_browser(): pytest.skip("no browser here")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
    (tmp_path/"bad.html").write_text(head + trouble.format(long="x"*400))
    (tmp_path/"sound.html").write_text(head + '<main id="there"><pre>short</pre><img src="a.png" alt="a" width="10"></main>')
    (tmp_path/"a.png").write_bytes(next((root/"nbs"/"images").glob("*.png")).read_bytes())
    browser = check_site.Browser(check_site.found_browser())
    try: held = check_site.check(tmp_path, ["bad.html", "sound.html"], browser)
    finally: browser.close()
    assert [len(held["bad.html"][kind]) for kind in check_site.kinds] == [1, 1, 1, 1, 1, 2, 1]
    assert [len(held["sound.html"][kind]) for kind in check_site.kinds] == [0]*7
    assert check_site.table(held).splitlines()[-1].split() == ["2", "pages", *"1111121"]


def test_settings_name_what_exists():
    site = yaml.safe_load((root/"_quarto.yml").read_text())
    assert (root/"nbs"/site["website"]["image"]).exists() and (root/"nbs"/site["format"]["html"]["css"]).exists()
    assert site["format"]["html"]["code-overflow"] == "wrap" and list(site["format"]) == ["html"]
    assert re.search(r"katex@\d+\.\d+\.\d+/", site["format"]["html"]["html-math-method"]["url"])
