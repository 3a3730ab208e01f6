"""Give each page that runs alone a hidden first cell that installs the package where the page is opened in Colab.

    python tools/colab.py

A page runs alone if no cell reads a file of the repository: a recorded result, another page, a module by its path.
`tools/rendering.py` links pages that have the cell to Colab; `tests/test_site.py` fails where a page should get or lose it.
"""
import hashlib
import json
import re

from nbdev.config import get_config

from rendering import in_colab

needs_files = re.compile(r"experiments/|cwd\(\)\.parents|\.ipynb'|\*\.ipynb|'\.\./\.\./\w|'tests/")
of_guides = re.compile(r"from (lightning_fabric|transformers) import")     # the extra `guides` of setup.py


def first_cell(name, extra=False):
    "The cell of a page; nbdev neither runs nor shows it. `extra`: with the packages that only guides import"
    package = f"git+{get_config().git_url}"
    if extra: package = f'"{get_config().lib_name}[guides] @ {package}"'
    source = f"""#| hide
#| eval: false
if {in_colab}:
    get_ipython().run_line_magic(
        'pip', 'install -q {package}')"""
    return {"cell_type": "code", "execution_count": None, "id": hashlib.sha1(name.encode()).hexdigest()[:8], "metadata": {},
            "outputs": [], "source": source.splitlines(True)}


def with_cell(nb, name):
    "The notebook with the cell behind its title if it runs alone, without it if not"
    cells = [cell for cell in nb["cells"] if in_colab not in "".join(cell["source"]) or cell["cell_type"] != "code"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    alone = code and not any(needs_files.search(source) for source in code)
    extra = any(of_guides.search(source) for source in code)
    return nb | {"cells": cells[:1] + [first_cell(name, extra)]*bool(alone) + cells[1:]}


def main():
    for path in sorted(get_config().nbs_path.glob("*/*.ipynb")):
        nb = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(with_cell(nb, path.stem), indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__": main()
