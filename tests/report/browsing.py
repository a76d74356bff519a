"""Pages in headless Chromium: nothing may be requested, nothing may fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, Route

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
)

# What a screen reader or a keyboard would stumble over.
_AUDIT = """() => {
  const wrong = [];
  const name = (e) => (e.getAttribute("aria-label") || e.getAttribute("aria-labelledby")
    || (e.labels && [...e.labels].map((l) => l.textContent).join("")) || e.textContent || "").trim();
  if (!document.documentElement.lang) wrong.push("no language");
  if (!document.title.trim()) wrong.push("no title");
  if (document.querySelectorAll("h1").length !== 1) wrong.push("not one h1");
  if (!document.querySelector("main")) wrong.push("no main");
  let level = 1;
  for (const head of document.querySelectorAll("h1, h2, h3, h4")) {
    const found = Number(head.tagName[1]);
    if (found > level + 1) wrong.push(`heading ${head.textContent} jumps to ${found}`);
    if (!head.textContent.trim()) wrong.push("empty heading");
    level = found;
  }
  for (const control of document.querySelectorAll("button, input, select, summary, a[href]")) {
    if (!control.closest("[hidden]") && !name(control)) wrong.push(`no name: ${control.outerHTML.slice(0, 80)}`);
  }
  for (const image of document.querySelectorAll("[role=img], [role=region], img")) {
    if (!name(image)) wrong.push(`no name: ${image.outerHTML.slice(0, 80)}`);
  }
  for (const scroller of document.querySelectorAll(".scroll")) {
    if (scroller.tabIndex < 0) wrong.push("a scrolling part that no key reaches");
  }
  for (const table of document.querySelectorAll("table")) {
    if (!table.querySelector("th[scope]")) wrong.push("a table without heads");
  }
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  for (const id of ids.filter((id, i) => ids.indexOf(id) !== i)) wrong.push(`id ${id} twice`);
  return wrong;
}"""

# The contrast of texts against the page, as WCAG defines it.
_CONTRAST = """() => {
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92
    : ((v + 0.055) / 1.055) ** 2.4)).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => {
    for (let at = e; at; at = at.parentElement) {
      const found = parse(getComputedStyle(at).backgroundColor);
      if (found.length === 3 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const e of document.querySelectorAll("h1, h2, h3, p, td, th, dt, dd, small, label, button, summary, pre")) {
    if (e.closest("[hidden]") || !e.textContent.trim()) continue;
    const [one, two] = [light(parse(getComputedStyle(e).color)), light(ground(e))];
    const found = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    if (found < 4.5) low.push(`${e.tagName} ${e.textContent.slice(0, 30)}: ${found.toFixed(2)}`);
  }
  return low;
}"""


@dataclass
class Opened:
    """A page that is open, and what went wrong on it."""

    page: Page
    complaints: list[str] = field(default_factory=list)

    def audit(self) -> list[str]:
        """List what a screen reader or a keyboard would stumble over, and texts that are hard to read."""
        return [*self.page.evaluate(_AUDIT), *self.page.evaluate(_CONTRAST)]

    def overflow(self) -> int:
        """Measure by how many pixels the page is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))

    def hover(self, figure: str, trace: str, point: int = 0) -> str:
        """Point the mouse at a point of a figure and read what appears."""
        script = """([figure, trace, point]) => {
          const plot = document.getElementById(figure);
          plot.scrollIntoView({block: "center"});
          const data = plot._fullData.find((one) => one.name === trace);
          const axes = plot._fullLayout;
          const box = plot.getBoundingClientRect();
          return [box.left + axes.xaxis._offset + axes.xaxis.l2p(axes.xaxis.d2l(data.x[point])),
                  box.top + axes.yaxis._offset + axes.yaxis.l2p(axes.yaxis.d2l(data.y[point]))];
        }"""
        x, y = self.page.evaluate(script, [figure, trace, point])
        self.page.mouse.move(x - 40, y - 40)
        self.page.wait_for_timeout(200)  # what is hovered on the way has gone before the point is
        self.page.mouse.move(x, y)
        self.page.wait_for_timeout(400)
        self.page.wait_for_selector(f"#{figure} .hoverlayer .hovertext")
        return str(self.page.text_content(f"#{figure} .hoverlayer"))

    def until(self, script: str, wanted: object) -> None:
        """Wait for a value; the page's policy forbids Playwright's own waiting for functions."""
        for _ in range(200):
            if self.page.evaluate(script) == wanted:
                return
            self.page.wait_for_timeout(25)
        raise AssertionError(f"{script} is {self.page.evaluate(script)!r}, not {wanted!r}")

    def visible(self, figure: str) -> list[str]:
        """List the traces of a figure that are shown."""
        script = "(id) => document.getElementById(id)._fullData.filter((t) => t.visible === true).map((t) => t.name)"
        return list(self.page.evaluate(script, figure))


@contextmanager
def opened(browser: Browser, path: Path, *, width: int = 1280, dark: bool = False) -> Iterator[Opened]:
    """Open a page and wait until all its figures are drawn; requests beyond the file fail and are complaints."""
    small = width < 600
    more: dict[str, Any] = {"has_touch": small, "is_mobile": small}
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", **more
    )
    found = Opened(context.new_page())

    def refuse(route: Route) -> None:
        if route.request.url == path.as_uri():
            route.continue_()
        else:
            found.complaints.append(f"request {route.request.url[:100]}")
            route.abort()

    context.route("**/*", refuse)
    found.page.on("console", lambda message: found.complaints.append(f"console {message.type}: {message.text}"))
    found.page.on("pageerror", lambda error: found.complaints.append(f"error {error}"))
    found.page.on("dialog", lambda dialog: (found.complaints.append("dialog"), dialog.dismiss()))
    try:
        found.page.goto(path.as_uri(), timeout=120_000)
        found.page.wait_for_selector("html[data-ready]", state="attached", timeout=120_000)
        yield found
    finally:
        context.close()
