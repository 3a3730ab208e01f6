"""Run notebooks and save their outputs, skipping the cells that `nbdev_test` skips.

    python tools/run_notebooks.py nbs/geometry/*.ipynb [--flags "slow data"]

The docs show the outputs saved here; run a page again whenever its code changes.
"""
import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("IN_TEST", "1")
from execnb.nbio import write_nb
from execnb.shell import CaptureShell
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.process import NBProcessor


def skipped(cell, flags):
    "Does `nbdev_test` skip `cell` when it leaves out the cells marked with `flags`?"
    directives = getattr(cell, "directives_", None) or {}
    return (cell.cell_type != "code" or "nbdev_export" + "(" in cell.source
            or directives.get("eval:", [""])[0].lower() == "false" or bool(flags & directives.keys()))


def of_this_machine(output):
    "A warning that names files of the machine on which the page was run"
    return output.output_type == "stream" and output.name == "stderr" and (
        "site-packages" in "".join(output.text) or str(get_config().config_path) in "".join(output.text))


def run(path, flags):
    "Run the notebook at `path` in its own folder and write it back, cleaned, with its outputs"
    nb, shell = NBProcessor(path, rm_directives=False).nb, CaptureShell(path, mpl_format='png')
    os.chdir(path.parent)
    try:
        shell.run_all(nb, exc_stop=True, preproc=lambda cell: skipped(cell, flags))
    except BaseException:
        sys.exit(shell.prettytb(fname=path))
    for cell in nb.cells:
        if cell.cell_type == "code": cell.outputs = [o for o in cell.outputs if not of_this_machine(o)]
    clean_nb(nb)
    write_nb(nb, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--flags", default="", help="run the cells with these flags too")
    args = parser.parse_args()
    config, here = get_config(), Path.cwd()
    sys.path.insert(0, str(config.config_path))
    for path in args.notebooks:
        os.chdir(here)
        print(path, flush=True)
        run(path.resolve(), set(config.tst_flags.split()) - set(args.flags.split()))
