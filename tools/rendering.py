"""How the site shows a page: processors that settings.ini adds to nbdev's own (`procs`; they need `PYTHONPATH=tools`).

What stands above a definition (heading, link to the source, docstring, and the signature where the page hides the source)
is read from the notebook. So nothing runs, and a signature has the author's words: fields, choices and bounds as written.
"""
import ast
import re
from collections import Counter
from pathlib import Path

from execnb.nbio import mk_cell
from fastcore.docments import _ital_first
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup, _lineno, patch_name
from nbdev.process import Processor
from nbdev.processors import _default_exp

kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
by_hand = re.compile(r"^show_doc\(([\w.]+)\)\s*$", re.M)
public = re.compile(r"(.*\.)?(?!_(?!_))\w+")            # no private name; `__call__` is public
in_colab = "'google.colab' in str(get_ipython())"       # checked by the first cell of a page that runs alone


def first_line(node): return min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])])


def signature(source, node):
    "The source of a definition without its body: of a class the fields and the head of `__init__`"
    lines, start = source.splitlines(), first_line(node.body[0])
    if start == node.lineno: return lines[start - 1][:node.body[0].col_offset].rstrip()
    head = lines[first_line(node) - 1:start - 1]
    for part in node.body if isinstance(node, ast.ClassDef) else []:
        if isinstance(part, ast.AnnAssign): head += lines[part.lineno - 1:part.end_lineno]
        if getattr(part, "name", None) == "__init__": head.append(signature(source, part))
    return "\n".join(head).rstrip()


class Definition:
    "Name (of a method `Class.name`), docstring and signature of a definition, and whether the page shows its source"
    def __init__(self, name, source, node, shown):
        self.name, self.doc, self.shown = name, ast.get_docstring(node), shown
        self.signature = signature(source, node)


def defined_in(cell):
    "Definitions at the top of an exported cell, in the order of the source, and those inside its classes"
    top, inside, shown = [], [], "exports" in cell.directives_
    if cell.cell_type != "code" or not {"export", "exports"} & set(cell.directives_): return top, inside
    for node in ast.parse(cell.source).body:
        if not isinstance(node, kinds): continue
        names = patch_name(node)
        for name in names if isinstance(names, list) else [names]:
            top.append(Definition(name, cell.source, node, shown))
            inside += [Definition(f"{name}.{part.name}", cell.source, part, shown)
                       for part in (node.body if isinstance(node, ast.ClassDef) else []) if isinstance(part, kinds)]
    return top, inside


def source_link(module, name):
    "Link to the line of a definition, '' where the package does not have it"
    found = NbdevLookup()[f"{module}.{name}"]
    if not isinstance(found, tuple): return ""
    return f'[source]({found[2]}#L{_lineno(name, found[1])}){{.source-link target="_blank"}}\n'


def entry(module, definition, anchor):
    "The cell that stands above a definition"
    name = definition.name
    heading = name.replace("_", r"\_")
    text = f"### {heading} {{#{anchor} .definition}}\n\n{source_link(module, name)}{_ital_first(definition.doc or '')}".rstrip()
    if not definition.shown: text += f"\n\n```python\n{definition.signature}\n```"
    return mk_cell(text, "markdown")


def anchors(names):
    "{name: anchor} of definitions in their order: in lower case, as nbdev links them; `-1` if two differ only in case"
    seen, made = Counter(), {}
    for name in names:
        made[name] = name.lower() + (f"-{seen[name.lower()]}" if seen[name.lower()] else "")
        seen[name.lower()] += 1
    return made


def module_of(nb):
    "Name of the module that a notebook exports to, or None"
    name = _default_exp(nb)
    return name and f"{get_config().lib_path.name}.{name}"


def apart(text, taken):
    "Headings of the text get another anchor where theirs is that of a definition, `taken`"
    def anchored(found):
        slug = re.sub(r"[^\w\s.-]", "", found[2].lower()).strip().replace(" ", "-")
        return f"{found[0]} {{#about-{slug}}}" if slug in taken else found[0]
    return re.sub(r"^(#+) (.+[^}\s])$", anchored, text, flags=re.M)


class Entries(Processor):
    """Put a heading above each public definition, and where `show_doc(name)` stands one for that name.

    This happens before any processor runs, since nbdev's remove the cells that are exported and not shown."""
    def __init__(self, nb):
        super().__init__(nb)
        module, found = module_of(nb), {id(cell): defined_in(cell) for cell in nb.cells}
        named = {d.name: d for top, inside in found.values() for d in top + inside}
        by_name = {name for cell in nb.cells if cell.cell_type == "code" for name in by_hand.findall(cell.source)}
        cells, headed = [], [name for name in named if public.fullmatch(name)]
        at = anchors(headed)
        above = lambda name: entry(module, named[name], at[name])
        for cell in nb.cells:
            if cell.cell_type == "markdown": cell.source = apart(cell.source, set(at.values()))
            names = by_hand.findall(cell.source) if cell.cell_type == "code" else []
            unknown = [name for name in names if name not in at]
            if unknown: raise ValueError(f"show_doc({unknown[0]}): no exported cell of this page defines it")
            shown = [] if "hide" in cell.directives_ else found[id(cell)][0]
            cells += [above(name) for name in names]
            cells += [above(d.name) for d in shown if d.name in at and d.name not in by_name]
            if not names: cells.append(cell)
        nb.cells = cells


class Names(NbdevLookup):
    "Where the backticked names of a page lead: to its own definition, an imported one, or the only one in the package"
    def __init__(self, nb):
        super().__init__()
        own, package = module_of(nb), get_config().lib_path.name
        modules = {}                                    # {module: {name in it: entry}}
        for name, found in self.syms.items():
            if isinstance(found, tuple) and name.startswith(f"{package}."):
                module = found[1].removesuffix(".py").replace("/", ".")
                modules.setdefault(module, {})[name.removeprefix(f"{module}.")] = found
        for module, names in modules.items():
            at = anchors(sorted(names, key=lambda name: _lineno(name, names[name][1]) or 0))
            modules[module] = {name: (f"{found[0].split('#')[0]}#{at[name]}", *found[1:]) for name, found in names.items()}
        many = Counter(name for names in modules.values() for name in names)
        self.syms = {name: found for name, found in self.syms.items() if many[name] < 2}
        for cell in nb.cells:
            for node in ast.walk(ast.Module(cell.parsed_() or [], [])):
                if not isinstance(node, ast.ImportFrom) or node.module not in modules: continue
                names = {a.name for a in node.names}
                self.syms |= {n: e for n, e in modules[node.module].items() if "*" in names or n in names}
        self.syms |= modules.get(own, {})


class Links(Processor):
    "Link the backticked names in text and in results that are text, never in code; a value stays with its ±"
    def __init__(self, nb): super().__init__(nb); self.names = Names(nb)

    def cell(self, cell):
        if cell.cell_type == "markdown": cell.source = self.names.linkify(cell.source)
        for output in cell.get("outputs", []):
            text = output.get("data", {}).get("text/markdown")
            if text: output["data"]["text/markdown"] = self.names.linkify("".join(text).replace(" ± ", "\u00a0±\u00a0"))


class Doors(Processor):
    "A line at the top of each page with links to its notebook, and to Colab where the page runs alone"
    def __init__(self, nb):
        super().__init__(nb)
        self.alone = any(cell.cell_type == "code" and in_colab in cell.source for cell in nb.cells)

    def end(self):
        config = get_config()
        path = Path(self.nb.path_).resolve().relative_to(config.config_path)
        if path.name == config.readme_nb: return
        file = f"{config.user}/{config.repo}/blob/{config.branch}/{path}"
        links = [f"[Notebook](https://github.com/{file})"]
        if self.alone: links.append(f"[Open in Colab](https://colab.research.google.com/github/{file})")
        self.nb.cells.insert(1, mk_cell(f"::: {{.doors}}\n{' · '.join(links)}\n:::", "markdown"))
