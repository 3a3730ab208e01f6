"""Process the notebooks for rendering, check every page and link without Quarto, and write README.md from index.ipynb.

    python tools/docs.py            # pages go to _docs/check

Quarto is pandoc with a theme. This check runs the same processing (nbdev) and the same reader (pandoc), so markup,
formulas, links and the sidebar are tried; themes, callouts and tab sets are not.
"""
import base64
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pypandoc
import yaml
from nbdev.config import get_config
from nbdev.serve import proc_nbs

config = get_config()
root, out = Path(config.config_path), Path(config.config_path)/"_docs"/"check"


def cell_markdown(cell, figures, stem):
    "One cell of a processed notebook as markdown, its pictures written to `figures`"
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown": return source
    if cell["cell_type"] == "raw": return ""
    options = dict(re.findall(r"^#\|\s*([\w-]+):\s*(.*\S)", source, re.M))
    if options.get("include") == "false": return ""
    code = "\n".join(line for line in source.splitlines() if not line.startswith("#|")).strip()
    parts = [f"```python\n{code}\n```"] if code and options.get("echo") != "false" else []
    for i, output in enumerate([] if options.get("output") == "false" else cell.get("outputs", [])):
        data = output.get("data", {})
        if "image/png" in data:
            name = f"{stem}-{cell.get('id', 'cell')}-{i}.png"
            figures.mkdir(parents=True, exist_ok=True)
            (figures/name).write_bytes(base64.b64decode("".join(data["image/png"])))
            size = output.get("metadata", {}).get("image/png", {}).get("width")
            parts.append(f"![]({figures.name}/{name}){{alt={options.get('fig-alt', json.dumps(''))}"
                         + (f" width={size}" if size else "") + "}")
        elif "text/markdown" in data: parts.append("".join(data["text/markdown"]))
        else:
            text = "".join(data.get("text/plain", output.get("text", ""))).rstrip()
            if text: parts.append(f"```\n{text}\n```")
    return "\n\n".join(parts)


def page_markdown(path, figures):
    "A processed notebook as markdown, front matter left out"
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join(cell_markdown(c, figures, path.stem) for c in cells)


def front_matter(path):
    "What nbdev wrote at the head of a processed notebook: title, description, name of the page"
    first = json.loads(path.read_text())["cells"][0]
    said = yaml.safe_load("".join(first["source"]).strip("-\n ")) if first["cell_type"] == "raw" else {}
    return {"output-file": f"{path.stem}.html"} | (said or {})


class Anchors(HTMLParser):
    "Ids and links of a page"
    def __init__(self): super().__init__(); self.ids, self.links = set(), []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs: self.ids.add(attrs["id"])
        if tag == "a" and "href" in attrs: self.links.append(attrs["href"])
        if tag == "img": self.links.append(attrs["src"])


def check_links(pages, made):
    "Links between `pages` ({relative path: Anchors}) that lead nowhere; `made` says which page a notebook became"
    broken, site = [], config.doc_host + config.doc_baseurl
    for page, parsed in pages.items():
        for link in parsed.links:
            link = link.removeprefix(site).lstrip("/") if link.startswith(site) else link
            if re.match(r"[a-z]+:", link): continue
            target, _, anchor = link.partition("#")
            here = (out/page).parent
            notebook = (here/target).resolve()
            if notebook in made: target = str(made[notebook])
            found = ([p for p in ((here/target).resolve(), (out/target).resolve()) if p.exists()] if target
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
    text = re.sub(r"\]\(((?:\w+/\d\d_)?\w+\.)(html|ipynb|qmd)", r"](nbs/\1ipynb", text)
    text = re.sub(r"<!-- WARNING.*?-->\n+", "", text)
    note = "<!-- Generated from nbs/index.ipynb by tools/docs.py. Edit the notebook. -->\n\n"
    (root/"README.md").write_text(f"{note}# {front['title']}\n\n> {front['description']}\n\n{text.strip()}\n")


def main():
    processed = proc_nbs(force=True, n_workers=2)
    pages, made, trouble = {}, {}, []
    shutil.copytree(processed/"images", out/"images", dirs_exist_ok=True)
    for path in sorted(processed.rglob("*.ipynb")):
        rel = path.relative_to(processed)
        target = out/rel.parent/front_matter(path)["output-file"]
        made[(out/rel).resolve()] = target.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        markdown = page_markdown(path, target.parent/f"{path.stem}_files")
        if str(rel) == "index.ipynb": write_readme(page_markdown(path, root/"nbs"/"images"), front_matter(path))
        try:
            html = pypandoc.convert_text(markdown, "html5", format="markdown", extra_args=[
                "-s", "--mathml", "--fail-if-warnings", f"--metadata=title:{path.stem}"])
        except RuntimeError as e: trouble.append(f"{rel}: {str(e).splitlines()[0]}"); continue
        target.write_text(html)
        pages[str(target.relative_to(out))] = parsed = Anchors()
        parsed.feed(html)
    named = set(sidebar_pages(yaml.safe_load((root/"_quarto.yml").read_text())["website"]["sidebar"]["contents"]))
    there = {str(p.relative_to(processed)) for p in processed.rglob("*.ipynb")}
    trouble += ([f"_quarto.yml: no page {p}" for p in sorted(named - there)]
                + [f"_quarto.yml: page {p} is not in the sidebar" for p in sorted(there - named)])
    trouble += [f"broken link in {b}" for b in check_links(pages, made)]
    print(f"{len(pages)} pages, {sum(len(p.links) for p in pages.values())} links, {len(trouble)} in trouble",
          *trouble, sep="\n")
    sys.exit(bool(trouble))


if __name__ == "__main__": main()
