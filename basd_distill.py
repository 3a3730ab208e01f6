"""The one module that is certainly this project's. Another project on the package index has the distribution, the import
name and the command `basd`: installed into one folder, it and this one overwrite files of each other, and whichever came
last is imported and started. So the commands begin here, and `import basd` asks here.
"""
import os
import sys
from importlib.util import find_spec

REMEDY = "run `pip uninstall -y basd basd-distill`, then install basd-distill alone (or each into an environment of its own)"


def conflict(
    package, # file `__init__.py` of the package that `import basd` finds, None if there is none
):           # a sentence if another project's distribution `basd` is installed in that folder, or was, else None
    "Whether another project's files are mixed with ours or imported in their place"
    if package is None: return f"files of basd-distill are missing, as after an uninstallation of the distribution basd; {REMEDY}"
    folder = os.path.dirname(os.path.dirname(os.path.abspath(package)))
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():     # none in an archive
        if name.startswith("basd-") and name.endswith(".dist-info"):
            version = name.removeprefix("basd-").removesuffix(".dist-info")
            return f"basd {version}, a distribution of another project, shares the folder {folder} with basd-distill; {REMEDY}"


def refuse(package):
    "End the import of `basd` with a sentence if there is a conflict; that of `python -m basd` without a traceback"
    if said := conflict(package):
        if sys.argv[:1] != ["-m"]: raise ImportError(said)
        print("basd:", said, file=sys.stderr)
        sys.exit(2)


def start()->int: # exit status
    "The commands `basd` and `basd-distill`"
    spec = find_spec("basd")
    if said := conflict(spec and spec.origin):
        print("basd:", said, file=sys.stderr)
        return 2
    from basd.__main__ import start
    return start()


def other_command()->int: # exit status
    "What another project's command `basd` is given by our package, if it is found before ours"
    print(f"basd: {sys.argv[0]} is the command of another project; {REMEDY}", file=sys.stderr)
    return 2


if __name__ == "__main__": sys.exit(start())
