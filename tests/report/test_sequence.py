"""The page of a sequence holds the numbers of its record."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser
from tests.report.browsing import opened
from tests.report.sequencing import made_up
from tests.report.test_html import headings, island, parsed

from keeptune.core.errors import ArtefactError
from keeptune.experiments.sequence.sequence_record import measures
from keeptune.report.grids import Cell
from keeptune.report.pages.sequence_charts import course, lines, losses, matrices
from keeptune.report.pages.sequence_page import (
    knowledge,
    render_sequence,
    write_sequence,
)

HOSTILE = '</script><img src=x onerror="alert(1)">\u2028'


def test_the_page_is_whole() -> None:
    text = render_sequence(made_up())
    parsed(text)
    assert headings(text) == [
        "Stage by benchmark",
        "Over the stages",
        "What the knowledge lost",
        "Training loss",
        "Stages",
        "Repeat this",
        "How to read this",
    ]
    names = {"matrix0", "matrix1", "lines0", "lines1", "course", "losses"}
    assert set(island(text)["figures"]) == names
    for words in ("vllm serve /models/tiny", "Recipe of stage cities"):
        assert words in text


def test_the_made_up_measures_are_those_of_the_code_that_makes_records() -> None:
    record = made_up()
    found = measures([stage["name"] for stage in record["stages"]], record["benchmarks"], record["scores"])
    for key in ("average_accuracy", "backward_transfer", "forward_transfer", "forgetting"):
        assert record[key] == pytest.approx(found[key])


def sentences(record: dict[str, Any]) -> list[str]:
    page = render_sequence(record)
    return re.findall(r"<p>(.*?)</p>", page[page.index('<section class="verdict">') : page.index("</section>")])


def test_sentences_tell_the_measures() -> None:
    assert sentences(made_up()) == [
        "3 stages, one after the other: sums, cities, formats.",
        "At the end the tasks have an average accuracy of 0.783.",
        "Of what each earlier task had reached at its best, 12.5 points were lost on average (forgetting 0.125).",
        "Backward transfer −0.075 and forward transfer +0.125; negative is worse.",
    ]
    nothing = dict.fromkeys(("average_accuracy", "backward_transfer", "forward_transfer", "forgetting"))
    told = sentences(made_up() | nothing | {"why": "no benchmark in shares belongs to stage x"})
    assert told[1:] == ["Not every measure could be taken: no benchmark in shares belongs to stage x."]
    assert "0.0 points were lost" in sentences(made_up() | {"forgetting": 0.0})[2]


def test_the_matrix_is_annotated_and_a_frame_marks_each_own_stage() -> None:
    shares, nats = matrices(made_up())
    trace = shares.figure.to_plotly_json()["data"][0]
    assert trace["z"][3][1:] == [0.6, 0.75, 1.0]
    assert trace["text"][3] == ["0.650", "0.600", "0.750", "1.000"]
    assert (trace["zmin"], trace["zmax"]) == (0.0, 1.0)
    frames = [(f["x0"] + 0.49, f["y0"] + 0.48) for f in shares.figure.to_plotly_json()["layout"]["shapes"]]
    assert frames == [pytest.approx(corner) for corner in ((1, 1), (2, 2), (3, 3))]
    assert nats.figure.to_plotly_json()["data"][0]["z"] == [[pytest.approx(2.4 + 0.05 * row)] for row in range(4)]
    assert nats.figure.layout.shapes == ()


def test_lines_have_the_interval_of_the_change_around_the_score() -> None:
    chart = lines(made_up())[0]
    sums = next(trace for trace in chart.figure.to_plotly_json()["data"] if trace["name"] == "sums test")
    assert sums["y"] == [0.05, 0.8, 0.9, 0.6]
    assert sums["error_y"]["array"] == pytest.approx([0.0, 0.03, 0.03, 0.03])
    assert sums["marker"]["size"] == [8, 15, 8, 8]
    told = sums["hovertext"][2]
    assert all(words in told for words in ("after cities", "score: 0.900", "interval: 0.870 to 0.930", "method: keep"))
    assert "None" not in told


def test_what_is_missing_is_left_out() -> None:
    record = made_up()
    record["scores"][2][0] = record["intervals"][2][0] = None
    record["stages"] = [stage | {"loss": []} for stage in record["stages"]]
    record |= {"course": [], "forgetting_of_each": {}}
    assert losses(record) is None and course(record) is None
    text = render_sequence(record)
    parsed(text)
    assert "Training loss" not in headings(text)
    assert island(text)["figures"]["lines0"]["data"][0]["y"][2] is None
    with pytest.raises(ArtefactError, match="scores"):
        render_sequence({key: value for key, value in record.items() if key != "scores"})


def test_the_knowledge_points_to_the_worse_side_in_both_units() -> None:
    grid = knowledge(made_up())
    assert grid is not None
    told = [
        (name, scores, c.main, c.note, c.bar and c.bar.kind) for name, scores, c in grid.rows if isinstance(c, Cell)
    ]
    assert told[0] == ("facts", "0.950 → 0.650", "−30.0 points", "[−33.0, −27.0]", "loss")
    assert told[1][2:] == ("+0.150 nats/token", "[+0.120, +0.180]", "loss")


def test_stages_and_product_are_told() -> None:
    def row(first: str, *others: str) -> str:
        return f'<tr><th scope="row">{first}</th>{"".join(f"<td>{other}</td>" for other in others)}'

    text = render_sequence(made_up())
    assert row("cities", "keep", "0", "rank 8", "16", "109 k", "21.5 s", "1.0e-06") in text
    assert row("sums", "0.300") in text and "cut to a rank" not in text
    product = render_sequence(made_up() | {"final": [{"name": "facts", "after": 0.6}]})
    assert row("facts", "0.650", "0.600") in product and "cut to a rank" in product


def test_figures_are_saved_and_items_are_found_beside_each_adapter(tmp_path: Path) -> None:
    record = made_up()
    record["stages"][0]["adapter"] = str(tmp_path / "after" / "adapter")
    (tmp_path / "after" / "evaluation").mkdir(parents=True)
    item = {"index": 4, "group": None, "before": 1.0, "after": 0.0, "prompt": "Q?"}
    (tmp_path / "after" / "evaluation" / "facts.items.jsonl").write_text(json.dumps(item) + "\n", "utf-8")
    write_sequence(record, tmp_path / "report.html")
    (row,) = island((tmp_path / "report.html").read_text("utf-8"))["items"]
    assert (row["label"], row["kind"], row["index"]) == ("after sums", "lost", 4)
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    times = [path.stat().st_mtime_ns for path in (*(tmp_path / "figures").iterdir(), tmp_path / "report.html")]
    assert max(times) == times[-1], "where the page is, all is: a run that was killed writes it again"
    drawn = ("matrix0", "matrix1", "lines0", "lines1", "course")
    assert names == {f"{name}.{kind}" for name in drawn for kind in ("png", "svg")}


def test_in_a_browser(browser: Browser, tmp_path: Path, with_plotly: None) -> None:
    path = tmp_path / "report.html"
    record: dict[str, Any] = made_up(("sums", HOSTILE, "formats"))
    write_sequence(record, path)
    with opened(browser, path, width=390, dark=True) as phone:
        assert phone.complaints == []
        assert phone.page.locator("main img, main script").count() == 0
        assert phone.audit() == []
        assert phone.overflow() == 0
        assert phone.page.locator("#matrix0 .heatmap-label text").count() == 16
        told = phone.hover("lines0", "sums test", 2)
        assert "score: 0.900" in told and HOSTILE[:9] in told
        assert phone.complaints == []
