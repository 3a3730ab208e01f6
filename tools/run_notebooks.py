"""Run notebooks in a real kernel, all cells in order, and save their outputs.

    python tools/run_notebooks.py nbs/geometry/*.ipynb [--flags "slow data"]
    python tools/run_notebooks.py --all nbs/*/*.ipynb     # as Jupyter's Run All: every cell, nothing is saved

The docs show the outputs saved here; run a page again whenever its code changes. Each page gets a home and a temporary
folder of its own. Status 1 if a page ends in a traceback (its outputs are not saved), 2 if one shows a warning or a
path of this machine, leaves files behind, or has a figure without alternative text; the last lines name them. Figures
are saved with twice the pixels of `basd/page.mplstyle` and shown at its size.
"""
import argparse
import base64
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.process import NBProcessor

root = Path(get_config().config_path)
largest = 100_000   # bytes of a figure
kernel_options = ["--HistoryManager.enabled=False", "--InlineBackend.figure_format=retina", "--IPKernelApp.log_level=40"]


def skipped(cell, flags):
    "Whether `nbdev_test` skips `cell` when it leaves out the cells marked with `flags`"
    directives = getattr(cell, "directives_", None) or {}
    return (cell.cell_type != "code" or "nbdev_export" + "(" in cell.source
            or directives.get("eval:", [""])[0].lower() == "false" or bool(flags & directives.keys()))


def untracked():
    "Files of the repository that git does not track, ignored ones too"
    found = subprocess.run(["git", "status", "--porcelain", "--ignored", "-uall"], cwd=root, capture_output=True, text=True)
    return {line[3:] for line in found.stdout.splitlines()
            if line[:2] in ("??", "!!") and "__pycache__" not in line}


def compact(output):
    "A figure that is too large is given a palette; photographs, for which that is not enough, half the pixels too"
    from PIL import Image
    raw = base64.b64decode(output["data"]["image/png"])
    picture = Image.open(io.BytesIO(raw))
    dpi, full = picture.info.get("dpi", (96, 96)), picture.convert("RGB")
    half = full.resize((full.width//2, full.height//2), Image.Resampling.LANCZOS)
    for pixels, scale, colors in (full, 1, 256), (full, 1, 64), (half, 2, 256), (half, 2, 64):
        if len(raw) <= largest: return
        out = io.BytesIO()
        pixels.quantize(colors).save(out, "PNG", optimize=True, dpi=[d/scale for d in dpi])
        raw = out.getvalue()
        output["data"]["image/png"] = base64.b64encode(raw).decode()


def diary(output):
    "Lines that C++ writes with the time of day; no two runs agree in them"
    return output.get("name") == "stderr" and all(
        re.match(r"\[[IWEF]\d{4} ", line) for line in "".join(output["text"]).strip().splitlines())


def execute(nb, skip, folder):
    "Run the cells of `nb` in `folder` in a fresh kernel but for those that `skip` selects; returns the traceback, if any"
    class Client(nbclient.NotebookClient):
        async def async_execute_cell(self, cell, cell_index, **kwargs):
            if skip(cell_index): return cell
            return await super().async_execute_cell(cell, cell_index, **kwargs)
    try:
        Client(nb, timeout=None, coalesce_streams=True, kernel_name="python3", extra_arguments=kernel_options,
               resources=dict(metadata=dict(path=str(folder)))).execute()
    except nbclient.exceptions.CellExecutionError as e: return str(e)


def faults(nb):
    "Problems in the outputs of `nb`, one sentence each"
    found = []
    for cell in nb["cells"]:
        source, outputs = "".join(cell["source"]), cell.get("outputs", [])
        if "#| fig-alt:" in source and not any("image/png" in o.get("data", {}) for o in outputs):
            found.append(f"{cell['id']}: no figure where there should be one")
        for o in outputs:
            text = "".join(o.get("text", o.get("data", {}).get("text/plain", "")))
            figure = o.get("data", {}).get("image/png")
            if o["output_type"] == "error": found.append(f"{cell['id']}: {o['ename']}: {o['evalue']}")
            if o.get("name") == "stderr": found.append(f"{cell['id']}: {text.strip().splitlines()[-1][:100]}")
            if str(root) in text or "site-packages" in text or re.search(r"/(tmp|root|home)/\w", text):
                found.append(f"{cell['id']}: a path of this machine in its output")
            if figure and "#| fig-alt:" not in source: found.append(f"{cell['id']}: a figure without `#| fig-alt:`")
            if figure and len(base64.b64decode("".join(figure))) > largest:
                found.append(f"{cell['id']}: a figure of more than {largest//1000} kB")
    return found


def run(path, flags, save=True):
    "Run the notebook at `path` in its own folder and write it back with its outputs; returns its traceback and problems"
    nb, cells, before = nbformat.read(path, 4), NBProcessor(path, rm_directives=False).nb.cells, untracked()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as tmp:
        home, own = Path(tmp)/"home", dict(os.environ)
        for folder in (home, Path(tmp)/"tmp"): folder.mkdir()
        os.environ.update(HOME=str(home), TMPDIR=str(Path(tmp)/"tmp"), IPYTHONDIR=f"{tmp}/ipython",
                          PYTHONPATH=os.pathsep.join([str(root), *filter(None, [own.get("PYTHONPATH")])]))
        os.environ.setdefault("MPLCONFIGDIR", str(Path(tempfile.gettempdir())/"matplotlib_of_pages"))
        if save: os.environ["IN_TEST"] = "1"
        try: trouble = execute(nb, lambda i: skipped(cells[i], flags), path.parent)
        finally: os.environ.clear(); os.environ.update(own)
        left = [str(p.relative_to(home)) for p in home.rglob("*") if p.is_file()]
    left += sorted(untracked() - before)
    for cell in (c for c in nb.cells if c.cell_type == "code"):
        quiet = cell.source.rstrip().endswith(";")
        cell.outputs = [o for o in cell.outputs if not diary(o) and not (quiet and o.get("name") == "stdout")]
        for output in cell.outputs:
            if "image/png" in output.get("data", {}): compact(output)
    clean_nb(nb)
    if save and trouble is None: nbformat.write(nb, path)
    return trouble, [*faults(nb), *(f"left behind: {p}" for p in left)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--flags", default="", help="run the cells with these flags too")
    parser.add_argument("--all", action="store_true", help="run every cell, as Jupyter does, and save nothing")
    args = parser.parse_args()
    left_out = set() if args.all else set(get_config().tst_flags.split()) - set(args.flags.split())
    broken, untidy = [], []
    for path in args.notebooks:
        print(path, flush=True)
        trouble, found = run(path.resolve(), left_out, not args.all)
        print(*(f"    {line}" for line in [*found, *filter(None, [trouble])]), sep="\n", end="\n" if trouble or found else "",
              flush=True)
        if trouble: broken.append(path)
        elif found: untidy.append(path)
    print(f"{len(args.notebooks)} pages: {len(broken)} end in a traceback, {len(untidy)} show what they should not",
          *broken, *untidy, sep="\n    ")
    sys.exit(1 if broken else 2 if untidy else 0)
