"""Process the notebooks for rendering, check every page and link without Quarto, and write README.md from index.ipynb.

    python tools/docs.py            # pages go to _docs/check

Quarto is pandoc with a theme. This check runs the same processing (nbdev) and the same reader (pandoc), so markup,
formulas, links and the sidebar are tried; themes, callouts and tab sets are not. The pages have the site's styles and
the width of its column (tools/page.html), so tools/check_site.py can measure them.
"""
import base64
import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import pypandoc
import yaml
from nbdev.config import get_config
from nbdev.serve import proc_nbs

config, here = get_config(), Path(__file__).parent
root, out = Path(config.config_path), Path(config.config_path)/"_docs"/"check"


def output_markdown(output, alt, figures, name):
    "One result of a cell as markdown, a picture written to the folder `figures`; '' if there is nothing to show"
    data = output.get("data", {})
    if "image/png" in data:
        figures.mkdir(parents=True, exist_ok=True)
        (figures/name).write_bytes(base64.b64decode("".join(data["image/png"])))
        width = output.get("metadata", {}).get("image/png", {}).get("width")
        size = f" width={width}" if width else ""
        return f"![]({figures.name}/{name}){{alt={json.dumps(alt, ensure_ascii=False)}{size}}}"
    if "text/markdown" in data: return "".join(data["text/markdown"])
    text = "".join(data.get("text/plain", output.get("text", ""))).rstrip()
    fence = "`"*max(3, 1 + max(map(len, re.findall("`+", text)), default=0))        # longer than any in the text, as Quarto's
    return f"{fence}\n{text}\n{fence}" if text else ""


def cell_options(source):
    "Quarto options of a code cell: {option: value}"
    return yaml.safe_load("\n".join(line[2:].strip() for line in source.splitlines() if re.match(r"#\|\s*[\w-]+:", line))) or {}


def cell_markdown(cell, figures, stem, divs):
    "One cell of a processed notebook as markdown; with `divs` results are marked as Quarto marks them"
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown": return source
    if cell["cell_type"] == "raw": return ""
    options = cell_options(source)
    if options.get("include") is False: return ""
    code = "\n".join(line for line in source.splitlines() if not line.startswith("#|")).strip()
    parts = [f"```python\n{code}\n```"] if code and options.get("echo") is not False else []
    alts = options.get("fig-alt", "")
    alts = iter(alts if isinstance(alts, list) else [alts])
    for i, output in enumerate([] if options.get("output") is False else cell.get("outputs", [])):
        alt = next(alts, "") if "image/png" in output.get("data", {}) else ""
        text = output_markdown(output, alt, figures, f"{stem}-{cell.get('id', 'cell')}-{i}.png")
        if text: parts.append(f":::::: {{.cell-output}}\n{text}\n::::::" if divs else text)
    return "\n\n".join(parts)


def page_markdown(path, figures, divs=True):
    "A processed page as markdown, front matter left out"
    if path.suffix == ".qmd": return path.read_text().split("---\n", 2)[2]
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join(cell_markdown(c, figures, path.stem, divs) for c in cells)


def front_matter(path):
    "Front matter of a processed page: title, description, name of the page"
    if path.suffix == ".qmd": front = yaml.safe_load(path.read_text().split("---\n", 2)[1])
    else:
        first = json.loads(path.read_text())["cells"][0]
        front = yaml.safe_load("".join(first["source"]).strip("-\n ")) if first["cell_type"] == "raw" else {}
    return {"output-file": f"{path.stem}.html"} | (front or {})


class Anchors(HTMLParser):
    "Ids and links of a page"
    def __init__(self): super().__init__(); self.ids, self.links = set(), []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs: self.ids.add(attrs["id"])
        if tag == "a" and "href" in attrs: self.links.append(attrs["href"])
        if tag == "img": self.links.append(attrs["src"])


def to_pages(html, path, target):
    "Links to notebooks lead to their pages, as Quarto makes them; `target` maps each notebook to its page"
    def page(found):
        made = target.get((path.parent/found[1]).resolve())
        return f'href="{os.path.relpath(made, target[path].parent)}' if made else found[0]
    return re.sub(r'href="([^":#]+\.(?:ipynb|qmd))', page, html)


def check_links(pages):
    "Links between `pages` ({relative path: Anchors}) that lead nowhere"
    broken, site = [], config.doc_host + config.doc_baseurl
    for page, parsed in pages.items():
        for link in parsed.links:
            link = link.removeprefix(site).lstrip("/") if link.startswith(site) else link
            if re.match(r"[a-z]+:", link): continue
            target, _, anchor = link.partition("#")
            found = ([p for p in (((out/page).parent/target).resolve(), (out/target).resolve()) if p.exists()] if target
                     else [(out/page).resolve()])
            name = str(found[0].relative_to(out.resolve())) if found else None
            if (not found or anchor and name in pages and anchor not in pages[name].ids
                    and anchor.lower() not in pages[name].ids):
                broken.append(f"{page}: {link}")
    return broken


def sidebar_pages(entry):
    "Notebooks that the sidebar names"
    if isinstance(entry, str): return [entry]
    if isinstance(entry, list): return [p for e in entry for p in sidebar_pages(e)]
    return sidebar_pages(entry.get("contents", [])) + ([entry["href"]] if "href" in entry else [])


def write_readme(markdown, front):
    "README.md from the text of index.ipynb; links to pages lead to the notebooks"
    text = pypandoc.convert_text(markdown, "gfm", format="markdown", extra_args=["--wrap=preserve"])
    text = re.sub(r"\]\(images/", "](nbs/images/", text).replace('src="images/', 'src="nbs/images/')
    text = re.sub(r"\]\(((?:\w+/)?\w+\.)(html|ipynb|qmd)", r"](nbs/\1ipynb", text)
    text = re.sub(r"<!-- WARNING.*?-->\n+", "", text)
    note = "<!-- Generated from nbs/index.ipynb by tools/docs.py. Edit the notebook. -->\n\n"
    (root/"README.md").write_text(f"{note}# {front['title']}\n\n> {front['description']}\n\n{text.strip()}\n")


def write_page(path, target, front, quarto):
    "Write a processed page as HTML to `target`; returns pandoc's warnings, '' if none"
    page = target[path]
    page.parent.mkdir(parents=True, exist_ok=True)
    style = "../"*len(page.relative_to(out).parts[1:]) + quarto["format"]["html"]["css"]
    variables = {"title": front.get("title", path.stem), "description": front.get("description", ""), "css": style,
                 "overflow": quarto["format"]["html"].get("code-overflow", "scroll")}
    try:
        html = pypandoc.convert_text(page_markdown(path, page.parent/f"{path.stem}_files"), "html5", format="markdown", extra_args=[
            "-s", "--mathml", "--fail-if-warnings", f"--template={here/'page.html'}",
            *(f"--variable={name}={value}" for name, value in variables.items()), f"--metadata=title:{variables['title']}"])
    except RuntimeError as e: return str(e).splitlines()[0]
    page.write_text(to_pages(html, path, target))
    return ""


def main():
    processed, quarto = proc_nbs(force=True, n_workers=2), yaml.safe_load((root/"_quarto.yml").read_text())
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(processed/"images", out/"images")
    shutil.copy(processed/quarto["format"]["html"]["css"], out)
    processed = processed.resolve()
    paths = sorted([*processed.rglob("*.ipynb"), *processed.rglob("*.qmd")])
    front = {path: front_matter(path) for path in paths}
    target = {path: out/path.relative_to(processed).parent/front[path]["output-file"] for path in paths}
    index = processed/config.readme_nb
    write_readme(page_markdown(index, root/"nbs"/"images", divs=False), front[index])
    with ThreadPoolExecutor(2) as pool:
        wrong = list(pool.map(lambda path: write_page(path, target, front[path], quarto), paths))
    pages, trouble = {}, [f"{path.relative_to(processed)}: {error}" for path, error in zip(paths, wrong) if error]
    for path in [path for path, error in zip(paths, wrong) if not error]:
        pages[str(target[path].relative_to(out))] = parsed = Anchors()
        parsed.feed(target[path].read_text())
    named = set(sidebar_pages(quarto["website"]["sidebar"]["contents"]))
    there = {str(path.relative_to(processed)) for path in paths if path.suffix == ".ipynb"}
    trouble += ([f"_quarto.yml: no page {p}" for p in sorted(named - there)]
                + [f"_quarto.yml: page {p} is not in the sidebar" for p in sorted(there - named)])
    trouble += [f"broken link in {b}" for b in check_links(pages)]
    print(f"{len(pages)} pages, {sum(len(p.links) for p in pages.values())} links, {len(trouble)} in trouble",
          *trouble, sep="\n")
    sys.exit(bool(trouble))


if __name__ == "__main__": main()
