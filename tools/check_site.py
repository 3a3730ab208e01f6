"""Open every built page in headless Chromium at the width of a desktop and of a phone, and fail on what a reader would see.

    python tools/docs.py && python tools/check_site.py       # the pages that pandoc made, in _docs/check
    python tools/check_site.py _docs                         # the site that Quarto made
    python tools/check_site.py --shots FOLDER index.html     # and pictures of the pages named

Trouble is: a block of code, an output or a table cut off at its column, a page wider than a phone, a picture without alternative
text, `](http` inside code, a signature that is but `*args, **kwargs`, a link that leads nowhere, an error in the console.
Needs a Chromium or Chrome (BROWSER names another one); without one it prints that and checks nothing.
"""
import argparse
import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter, defaultdict
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

root = Path(__file__).resolve().parents[1]
site = "https://basd-project.github.io/basd/"           # where links to ourselves lead
browsers = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
desk, phone = (1440, 900), (390, 844)
patience = 60                                           # seconds without a message from the browser
kinds = "cut off", "wide on a phone", "no alternative text", "link in code", "*args, **kwargs", "broken link", "console error"

# what a page holds, measured at the width of a desktop
at_desk = r"""(() => {
  const main = document.querySelector('main') || document.body, start = text => text.trim().split('\n')[0].slice(0, 70);
  const tables = [...main.querySelectorAll('table')].filter(table => table.offsetParent);
  const blocks = [...main.querySelectorAll('pre')].filter(pre => pre.offsetParent);
  const cut = pre => [pre, pre.parentElement, ...pre.querySelectorAll('code')].some(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1)
                     || pre.getBoundingClientRect().right > column + 1;
  const column = main.getBoundingClientRect().right;
  const code = [...main.querySelectorAll('pre, code')].filter(c => !c.querySelector('pre, code'));
  return {
    'cut off': [...blocks, ...tables].filter(cut).map(b => start(b.textContent)),
    'no alternative text': [...main.querySelectorAll('img')].filter(i => !(i.alt || '').trim()).map(i => i.getAttribute('src')),
    'link in code': code.filter(c => c.textContent.includes('](http')).map(c => start(c.textContent)),
    '*args, **kwargs': blocks.filter(b => /^\s*(def|class) \w+\(\s*\*args, \*\*kwargs\s*\)/.test(b.textContent)).map(b => start(b.textContent)),
    blocks: blocks.length, images: main.querySelectorAll('img').length,
    ids: [...document.querySelectorAll('[id]')].map(e => e.id),
    links: [...document.querySelectorAll('a[href], img[src]')].map(e => e.getAttribute('href') || e.getAttribute('src')),
  };
})()"""
# how wide the page is, and the outermost elements that make it so, measured at the width of a phone
at_phone = r"""(() => {
  const width = Math.max(document.documentElement.scrollWidth, window.innerWidth);
  const inside = e => { for (let p = e.parentElement; p; p = p.parentElement)
                          if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX)) return true; };
  const wide = e => e.getBoundingClientRect().right > SCREEN + 1 && !inside(e);
  const found = width <= SCREEN ? [] : [...document.querySelectorAll('body *')].filter(e => wide(e) && !(e.parentElement && wide(e.parentElement)));
  return width <= SCREEN ? [] : [`${width} px: ` + found.slice(0, 3).map(e => e.tagName.toLowerCase() + (e.className ? '.' + e.className : '')
                                 + ' ' + e.textContent.trim().slice(0, 40)).join('; ')];
})()""".replace("SCREEN", str(phone[0]))


def found_browser(): return next(filter(None, map(shutil.which, filter(None, (os.environ.get("BROWSER"), *browsers)))), None)


class Browser:
    "Headless Chromium, controlled by its DevTools protocol over two pipes"
    def __init__(self, binary):
        self.folder = tempfile.mkdtemp()
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        apart = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]      # 3 and 4 are taken in the child
        def wire(): os.dup2(apart[0], 3), os.dup2(apart[1], 4)
        self.process = subprocess.Popen(
            [binary, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--hide-scrollbars", "--no-first-run", f"--user-data-dir={self.folder}"],
            pass_fds=(3, 4), preexec_fn=wire, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for fd in (theirs_in, theirs_out, *apart): os.close(fd)
        self.reader, self.writer = os.fdopen(ours_in, "rb", buffering=0), os.fdopen(ours_out, "wb", buffering=0)
        self.session, self.number, self.rest, self.errors = None, 0, b"", []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"): self.call(f"{domain}.enable")

    def receive(self):
        "The next message of the browser; errors of the page are kept in `errors`"
        while b"\0" not in self.rest:
            if not select.select([self.reader], [], [], patience)[0]: raise RuntimeError(f"the browser sent nothing for {patience} s")
            more = self.reader.read(1 << 20)
            if not more: raise RuntimeError("the browser has gone")
            self.rest += more
        line, self.rest = self.rest.split(b"\0", 1)
        message = json.loads(line)
        what, how = message.get("method"), message.get("params", {})
        if what == "Runtime.exceptionThrown":
            detail = how["exceptionDetails"]
            self.errors.append(detail.get("exception", {}).get("description", detail["text"]).splitlines()[0])
        if what == "Runtime.consoleAPICalled" and how["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(a.get("value", a.get("description", ""))) for a in how["args"]))
        if what == "Log.entryAdded" and how["entry"]["level"] == "error" and not how["entry"].get("url", "").endswith("/favicon.ico"):
            self.errors.append(f"{how['entry']['text']} {how['entry'].get('url', '')}".strip())
        return message

    def call(self, method, **params):
        "Send a command; returns the browser's result"
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session: message["sessionId"] = self.session
        self.writer.write(json.dumps(message).encode() + b"\0")
        while True:
            reply = self.receive()
            if reply.get("id") == self.number: break
        if "error" in reply: raise RuntimeError(f"{method}: {reply['error']['message']}")
        return reply["result"]

    def value(self, script): return self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)["result"].get("value")

    def width(self, size):
        "Show the page on a screen of this size"
        self.call("Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=size is phone)

    def open(self, url):
        "Load a page to its end; returns the errors it wrote"
        self.errors = []
        self.call("Page.navigate", url=url)
        while self.receive().get("method") != "Page.loadEventFired": pass
        self.value("document.fonts.ready.then(() => 1)")
        return self.errors

    def shot(self, path):
        "A picture of the whole page"
        box = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": box["width"], "height": min(box["height"], 16000), "scale": 1}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]))

    def close(self):
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Quiet(SimpleHTTPRequestHandler):
    "Files of a folder under the path that the site has, without a log"
    def log_message(self, *args): pass

    def translate_path(self, path):
        prefix = urlsplit(site).path
        return super().translate_path("/" + path.removeprefix(prefix) if path.startswith(prefix) else path)


def served(folder):
    "A server of `folder` on this machine, and the address of the site in it"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}{urlsplit(site).path}"


def broken_links(folder, page, links, ids):
    "Links of a page to places that the folder does not have; addresses of other sites are not tried"
    bad = []
    for link in dict.fromkeys(links):
        url = urlsplit(urljoin(site + page, link))
        if not url.geturl().startswith(site.rstrip("/")): continue
        path = unquote(url.path)[len(urlsplit(site).path):] or "index.html"
        path, anchor = path + "index.html"*path.endswith("/"), unquote(url.fragment)
        known = ids.get(path)
        if not (folder/path).exists() or anchor and known is not None and anchor not in known and anchor != "top":
            bad.append(link)
    return bad


def look(browser, address, page, shots):
    "Contents of one page and its problems, except links"
    browser.width(desk)
    errors = list(browser.open(address + page))
    found = browser.value(at_desk)
    if shots: browser.shot(shots/f"{page.replace('/', '-').removesuffix('.html')}-{desk[0]}.png")
    browser.width(phone)
    found["wide on a phone"] = browser.value(at_phone)
    if shots: browser.shot(shots/f"{page.replace('/', '-').removesuffix('.html')}-{phone[0]}.png")
    return found | {"console error": errors}


def check(folder, pages, browser, shots=None):
    "{page: what it holds and {kind of trouble: places}}"
    server, address = served(folder)
    try: held = {page: look(browser, address, page, shots) for page in pages}
    finally: server.shutdown()
    ids = {page: set(found["ids"]) for page, found in held.items()}
    for page, found in held.items(): found["broken link"] = broken_links(folder, page, found["links"], ids)
    return held


def table(held):
    "Table of the number of problems of each kind per page, with their sum in the last line"
    rows = [[page, *(len(found[kind]) for kind in kinds)] for page, found in held.items()]
    total = [f"{len(held)} pages", *(sum(column) for column in list(zip(*rows))[1:])]
    lines = [["page", *kinds], *[row for row in rows if any(row[1:])], total]
    wide = [max(len(str(line[i])) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(f"{cell!s:<{w}}" if i == 0 else f"{cell!s:>{w}}" for i, (cell, w) in enumerate(zip(line, wide))) for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=root/"_docs"/"check", help="where the built pages are")
    parser.add_argument("pages", nargs="*", help="only these pages, relative to the folder")
    parser.add_argument("--shots", type=Path, help="also put a picture of each page at both widths into this folder")
    args = parser.parse_args()
    binary = found_browser()
    if not binary: return print("no page was checked: there is no Chromium or Chrome here (BROWSER names one)")
    pages = args.pages or sorted(str(p.relative_to(args.folder)) for p in args.folder.rglob("*.html") if "site_libs" not in p.parts)
    if not pages: sys.exit(f"{args.folder} holds no page: build the docs first (python tools/docs.py)")
    if args.shots: args.shots.mkdir(parents=True, exist_ok=True)
    browser = Browser(binary)
    try: held = check(args.folder, pages, browser, args.shots)
    finally: browser.close()
    for page, found in held.items():
        for kind in kinds:
            for place in found[kind]: print(f"{page}: {kind}: {place}")
    print(table(held))
    sys.exit(any(found[kind] for found in held.values() for kind in kinds))


if __name__ == "__main__": main()
