"""A comparison's page in Chromium: settings, fronts, the table of all cells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser
from tests.report.browsing import Opened, opened
from tests.report.comparing import made_up

from keeptune.report.pages.comparison_page import write_comparison

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">\u2028'


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, with_plotly: None) -> Path:
    path = tmp_path_factory.mktemp("comparison") / "report.html"
    write_comparison(*made_up(names=["lora", HOSTILE]), path)
    return path


@pytest.fixture(scope="module")
def laptop(browser: Browser, written: Path) -> Iterator[Opened]:
    with opened(browser, written) as found:
        yield found


def test_nothing_fails_nothing_is_requested_and_nothing_runs(laptop: Opened) -> None:
    assert laptop.complaints == []
    assert laptop.page.locator("main img, main script").count() == 0
    assert laptop.audit() == []
    assert laptop.overflow() == 0


def test_hovering_a_setting_tells_it(laptop: Opened) -> None:
    point = next(p for p in made_up()[1]["points"] if p["name"] == "keep-lr0.002-x0.3")
    index = [p["name"] for p in made_up()[1]["points"] if p["label"] == "keep"].index(point["name"])
    told = laptop.hover("tradeoff", "keep", index)
    words = ("keep-lr0.002-x0.3", "learning rate: 0.002", "strength: × 0.3", "method.nats: 0.001", "seeds: 0, 1, 2")
    assert all(word in told for word in words), told
    scaled = laptop.hover("tradeoff", "lora, scaled", 0)
    assert "scale: 0." in scaled and "variant of: lora" in scaled


def test_a_label_is_isolated_with_its_front(laptop: Opened) -> None:
    laptop.page.select_option("select[data-isolates=tradeoff]", "keep")
    shown = laptop.visible("tradeoff")
    assert set(shown) == {"front over all", "keep, front", "keep, seeds", "keep", "base model"}
    laptop.page.select_option("select[data-isolates=tradeoff]", "")
    laptop.page.locator("#tradeoff .legendtoggle").nth(4).click()
    laptop.until("document.getElementById('tradeoff')._fullData.filter((t) => t.visible === true).length < 8", True)
    laptop.page.select_option("select[data-isolates=tradeoff]", "keep")
    laptop.page.select_option("select[data-isolates=tradeoff]", "")


def test_the_table_is_searched_and_sorted_by_keys_too(laptop: Opened) -> None:
    page = laptop.page
    assert page.inner_text("[data-counts=runs]") == "90 of 90 rows"
    page.fill("[data-filters=runs]", "keep lr0.001-x3")
    assert page.inner_text("[data-counts=runs]") == "3 of 90 rows"
    page.fill("[data-filters=runs]", "outofmemory")
    assert page.locator("#runs tbody tr:visible").count() == 1
    page.fill("[data-filters=runs]", "")
    head = page.locator("#runs th button", has_text="forgotten")
    for direction, sign in (("ascending", 1), ("descending", -1)):
        head.focus()
        page.keyboard.press("Enter")
        script = "[...document.querySelectorAll('#runs tbody tr')].map((row) => row.cells[7].dataset.key)"
        keys = [float(key) for key in page.evaluate(script) if key is not None]
        assert page.get_attribute("#runs th[aria-sort]", "aria-sort") == direction
        assert keys == sorted(keys, key=lambda key: sign * key)
        assert len(keys) == 88


def test_a_phone_in_the_dark(browser: Browser, written: Path) -> None:
    with opened(browser, written, width=390, dark=True) as phone:
        assert phone.complaints == []
        assert phone.overflow() == 0
        assert phone.audit() == []
