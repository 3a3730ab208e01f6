"""May this tag be released? One sentence and status 1 if not: the tag, the package, its citation and the changelog name one version.

    python tools/check_tag.py v0.1.0
"""
import re
import sys
from configparser import ConfigParser
from pathlib import Path


def tag_error(tag, repo):
    "What keeps `tag` of the repository in the folder `repo` from being released, or None"
    read = lambda name: (repo/name).read_text(encoding="utf-8")
    config = ConfigParser(delimiters=["="])
    config.read_string(read("settings.ini"))
    version = config["DEFAULT"]["version"]
    if tag != f"v{version}": return f"the tag is {tag} and settings.ini has version {version}; tag v{version}, or set the version"
    for name, pattern in ("CITATION.cff", "^version: (.*)$"), ("basd/__init__.py", '^__version__ = "(.*)"$'):
        found = re.search(pattern, read(name), re.M)
        if found is None or found[1] != version: return f"{name} has version {found and found[1]}, settings.ini {version}; make them equal"
    first = re.search(r"^## (.*)$", read("CHANGELOG.md"), re.M)
    if first is None or first[1] != version: return f"the first section of CHANGELOG.md is {first and first[1]!r}; head it with {version}"


if __name__ == "__main__": sys.exit(tag_error(sys.argv[1], Path(__file__).parents[1]))
