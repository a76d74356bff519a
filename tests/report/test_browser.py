"""A run's page in Chromium: it shows, explores and searches, and what a model generated stays text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser
from tests.report.browsing import Opened, opened
from tests.report.conftest import full_report
from tests.report.test_run_charts import with_everything

from keeptune.report.pages.item_rows import lost_and_gained
from keeptune.report.pages.page import repeat
from keeptune.report.pages.run_page import write_html

HOSTILE = (
    "</script><script>alert(1)</script>",
    '<img src="x" onerror="alert(2)">',
    "line\u2028end \u2029 <!-- <script>",
    "{{ 7 * 7 }} %{x} $x$",
)


def items() -> dict[str, Any]:
    def item(index: int, before: float, after: float, said: str) -> dict[str, Any]:
        texts = {"prompt": f"Which capital has country {index}?", "answers": [said], "text_before": "Rome"}
        return {"index": index, "group": said, "before": before, "after": after, "text_after": said, **texts}

    lost = [item(index, 1, 0, HOSTILE[index % len(HOSTILE)]) for index in range(90)]
    gained = [item(index, 0, 1, "Vienna") for index in range(5)]
    head = {"seed": 0, "role": "knowledge", "metric": "exact_match"}
    return lost_and_gained(
        [
            head | {"label": HOSTILE[0], "benchmark": "facts", "items": lost},
            head | {"label": "milora", "benchmark": "sums", "items": gained},
        ]
    )


def hostile_report() -> dict[str, Any]:
    """A report in which every text that a user or a model can set holds markup."""
    report = with_everything(full_report())
    for run in report["methods"][:2]:
        run |= {"name": HOSTILE[0], "options": {HOSTILE[1]: HOSTILE[0], HOSTILE[2]: HOSTILE[3]}, "notes": [HOSTILE[1]]}
        groups = run["benchmarks"][0]["groups"]
        groups[HOSTILE[1]] = groups["relation 0"]
    for run, score in zip(report["methods"][-2:], (0.7, 0.98), strict=True):
        run["benchmarks"][-1]["after"] = score  # seeds so far apart that each can be hovered
    report["base"] = HOSTILE[1]
    return report


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, with_plotly: None) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    again = repeat([("Run it", HOSTILE[0])], [(HOSTILE[1], {"model": HOSTILE[0]})])
    write_html(hostile_report(), path, {"items": items(), "repeat": again})
    return path


@pytest.fixture(scope="module")
def laptop(browser: Browser, written: Path) -> Iterator[Opened]:
    with opened(browser, written) as found:
        yield found


def test_nothing_fails_nothing_is_requested_and_nothing_runs(laptop: Opened) -> None:
    assert laptop.complaints == []
    assert laptop.page.locator("main img, main script").count() == 0
    assert laptop.page.locator(".plot .main-svg").count() >= laptop.page.locator(".plot").count() > 3
    assert laptop.audit() == []
    assert laptop.overflow() == 0


def test_hovering_a_point_shows_its_setting(laptop: Opened) -> None:
    told = laptop.hover("tradeoff", "milora")
    for words in ("milora", "seeds: 0, 1", "learning rate: 0.0002", "rank: 8", "learned: 0.840", "K: 0.801"):
        assert words in told
    assert "seed 1" in laptop.hover("tradeoff", "milora, seeds", 1)


def test_hostile_names_are_shown_as_they_are(laptop: Opened) -> None:
    told = laptop.hover("tradeoff", HOSTILE[0].replace("<", "&lt;").replace(">", "&gt;"))
    assert HOSTILE[0] in told
    assert "onerror" in told
    assert HOSTILE[1][:27] in str(laptop.page.text_content("#relations0 .yaxislayer-above"))
    assert laptop.complaints == []


def test_one_method_can_be_shown_alone(laptop: Opened) -> None:
    everything = laptop.visible("tradeoff")
    laptop.page.select_option("select[data-isolates=tradeoff]", "milora")
    assert laptop.visible("tradeoff") == ["milora, seeds", "milora", "base model"]
    laptop.page.select_option("select[data-isolates=tradeoff]", "")
    assert laptop.visible("tradeoff") == everything
    laptop.hover("tradeoff", "milora")
    laptop.page.mouse.down()
    laptop.page.mouse.up()
    laptop.until("document.querySelector('select[data-isolates=tradeoff]').value", "milora")
    assert laptop.visible("tradeoff") == ["milora, seeds", "milora", "base model"]
    laptop.page.select_option("select[data-isolates=tradeoff]", "")


def test_items_are_searched_and_filtered(laptop: Opened) -> None:
    page = laptop.page
    assert page.inner_text("#items-count") == "95 of 95 items found, 12 shown"
    page.fill("#items-search", "COUNTRY 77?")
    assert page.inner_text("#items-count") == "1 of 95 items found, 1 shown"
    assert HOSTILE[77 % 4] in page.inner_text("#items-list")
    page.fill("#items-search", "vienna")
    page.select_option("#items-kind", "gained")
    assert page.inner_text("#items-count") == "5 of 95 items found, 5 shown"
    assert page.locator(".item.gained").count() == 5
    page.select_option("#items-benchmark", "facts")
    assert page.inner_text("#items-count") == "0 of 95 items found, 0 shown"
    page.fill("#items-search", "")
    page.select_option("#items-kind", "")
    page.select_option("#items-label", HOSTILE[0])
    assert page.inner_text("#items-count") == "90 of 95 items found, 12 shown"
    page.click("#items-more")
    assert page.locator(".item").count() == 72
    page.click("#items-more")
    assert page.locator(".item").count() == 90
    assert page.is_hidden("#items-more")
    assert page.locator("#items-list img, #items-list script").count() == 0
    for key in ("benchmark", "label"):
        page.select_option(f"#items-{key}", "")
    assert laptop.complaints == []


def test_keys_reach_the_search_and_enter_stays(laptop: Opened) -> None:
    page = laptop.page
    page.focus("#items-search")
    page.keyboard.type("vienna")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "items-kind"
    assert page.inner_text("#items-count") == "5 of 95 items found, 5 shown"
    page.fill("#items-search", "")


def test_the_recipe_unfolds_and_is_copied(laptop: Opened) -> None:
    page = laptop.page
    assert page.is_hidden("#recipe-1")
    page.click("summary")
    assert HOSTILE[0] in page.inner_text("#recipe-1")
    page.click("[data-copies=recipe-1]")
    laptop.until("['Copied', 'Selected'].includes(document.querySelector('[data-copies=recipe-1]').textContent)", True)


def test_a_phone_in_the_dark(browser: Browser, written: Path) -> None:
    with opened(browser, written, width=390, dark=True) as phone:
        assert phone.complaints == []
        assert phone.overflow() == 0
        assert phone.audit() == []
        shown = phone.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert shown == "rgb(21, 24, 28)"
        fill = "document.getElementById('tradeoff')._fullLayout.font.color"
        assert phone.page.evaluate(fill) == "#e6e9ec"
        assert phone.page.evaluate("document.getElementById('tradeoff')._fullData[0].marker.color") == "#4aa8e0"
        phone.page.emulate_media(color_scheme="light")
        phone.until(fill, "#22262b")
        widths = phone.page.evaluate("[...document.querySelectorAll('.plot')].map((p) => p.scrollWidth)")
        assert max(widths) <= 390
        assert phone.complaints == []


def test_a_missing_script_would_be_noticed(browser: Browser, written: Path, tmp_path: Path) -> None:
    """A negative control: what the policy does not allow is refused, and the test sees it."""
    broken = tmp_path / "broken.html"
    broken.write_text(written.read_text("utf-8").replace("<main>", "<main><script>alert(3)</script>", 1), "utf-8")
    with opened(browser, broken) as found:
        assert any("Content Security Policy" in words for words in found.complaints)
        assert "dialog" not in found.complaints
