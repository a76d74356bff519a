"""The page of a comparison holds the numbers of its records, and its figures are valid."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.report.comparing import made_up
from tests.report.test_html import headings, island, parsed

from keeptune.core.errors import ArtefactError
from keeptune.experiments.choice import choose
from keeptune.report.pages.comparison_charts import Scales, fronts, ranges
from keeptune.report.pages.comparison_page import (
    base_score,
    published,
    render_comparison,
    sentences,
    write_comparison,
)

Record = dict[str, Any]


@pytest.fixture(scope="module")
def records() -> tuple[Record, Record]:
    return made_up()


def test_the_page_is_whole(records: tuple[Record, Record]) -> None:
    text = render_comparison(*records)
    parsed(text)
    assert headings(text) == [
        "Learned against forgotten",
        f"At the same task score, {records[1]['matched']['score']:.3g}",
        "Failed, missing and left out",
        "Every run",
        "Repeat this",
        "How to read this",
    ]
    assert set(island(text)["figures"]) == {"tradeoff"}
    for words in ("5 labels, 30 settings, 3 seeds", "(1 failed, 1 missing)", "keeptune compare recipe.yaml"):
        assert words in text
    assert "OutOfMemoryError: &lt;b&gt;too large&lt;/b&gt;" in text


def test_every_setting_is_at_its_means_and_tells_itself(records: tuple[Record, Record]) -> None:
    cells, front = records
    chart = fronts(cells["runs"], front, 0.05)
    assert chart is not None
    traces = {trace["name"]: trace for trace in chart.figure.to_plotly_json()["data"]}
    for point in front["points"]:
        trace = traces[point["label"]]
        places = list(zip(trace["x"], trace["y"], strict=True))
        index = places.index((point["learned"]["mean"], 100 * point["forgotten"]["mean"]))
        told = trace["hovertext"][index]
        assert f"learning rate: {point['learning_rate']:g}" in told
        assert (f"scale: {(point['variant'] or {}).get('scale')}" in told) == (point["variant"] is not None)
        assert ("-open" in trace["marker"]["symbol"][index]) == (point["variant"] is not None)
        arm = 100 * (point["forgotten"]["high"] - point["forgotten"]["mean"])
        assert trace["error_y"]["array"][index] == pytest.approx(arm)
    assert len(traces["keep"]["x"]) == 9
    assert len(traces["keep, seeds"]["x"]) == 27
    best = traces["front over all"]
    assert len(best["x"]) == len(front["front"]) and best["x"] == sorted(best["x"])
    assert (traces["base model"]["x"], traces["base model"]["y"]) == ([0.05], [0.0])
    assert set(chart.labels) == set(front["fronts"])


def test_with_many_settings_the_bars_of_a_label_wait_until_it_is_alone(records: tuple[Record, Record]) -> None:
    cells, front = records
    more = [point | {"name": f"{point['name']}-b", "on_front": False} for point in front["points"]]
    for points, waiting in ((front["points"], False), (front["points"] + more, True)):
        chart = fronts(cells["runs"], front | {"points": points}, None)
        assert chart is not None
        traces = {trace["name"]: trace for trace in chart.figure.to_plotly_json()["data"]}
        assert traces["keep"]["error_y"]["visible"] == (not waiting)
        assert ("error_y" in traces["front over all"]) == waiting


def test_intervals_of_two_seeds_do_not_press_the_rest_flat(records: tuple[Record, Record]) -> None:
    cells, front = copy.deepcopy(records)
    front["points"][0]["forgotten"] |= {"low": -9.0, "high": 9.0}
    (left, right), (bottom, top) = ranges(cells["runs"], front, 0.05)
    assert bottom < 100 and -10 < top < 0, "less forgotten is above"
    done = [row for row in cells["runs"] if row["status"] == "done"]
    assert left < 0.05 and right > max(row["learned"] for row in done)
    assert bottom > 100 * max(row["forgotten"] for row in done)


def test_the_matched_table_and_its_bars(records: tuple[Record, Record]) -> None:
    text = render_comparison(*records)
    table = text[text.index('aria-label="forgotten at the same task score"') :]
    rows = dict(re.findall(r"</span>([^<]*)</span></th>(.*?)</tr>", table[: table.index("</table>")], re.DOTALL))
    own = next(row for row in records[1]["matched"]["rows"] if row["label"] == "keep")
    assert own["difference"]["high"] < 0
    assert 'rect class="gain"' in rows["keep"] and "<span>−" in rows["keep"]
    assert rows["keep"].startswith(f"<td>{Scales(records[1]).lost(own['forgotten']['mean'])}")
    assert "<svg" not in rows["lora"] and "<span>–</span>" in rows["lora"]


def test_sentences_say_only_what_intervals_support() -> None:
    def row(label: str, mean: float | None, low: float | None = None, high: float | None = None) -> Record:
        forgotten = None if mean is None else {"mean": mean, "low": None, "high": None}
        ends = {"mean": (mean or 0) - 0.2, "low": low, "high": high}
        return {"label": label, "forgotten": forgotten, "difference": ends if label != "lora" else None}

    rows = [row("a", 0.1, -0.2, -0.1), row("b", 0.15, -0.1, 0.1), row("c", 0.5, 0.1, 0.2), row("d", 0.16)]
    matched = {"score": 0.8, "baseline": "lora", "rows": [*rows, row("lora", 0.2), row("e, rank 2", None)]}
    front = {"units": {"learned": "share", "forgotten": "share"}, "matched": matched}
    assert sentences(front) == [
        "Where the task score is 0.800, a forgets least: 10 points.",
        "lora, the baseline, forgets 20 there.",
        "Clearly less than lora (paired over seeds, 95%): a.",
        "Clearly more: c.",
        "No clear difference: b.",
        "No interval, for want of seeds: d.",
        "“e, rank 2” does not reach it with every seed.",
    ]
    nothing = front | {"matched": {"score": 0.9, "baseline": "lora", "rows": [row("e", None)]}}
    assert sentences(nothing) == ["No label reaches the task score 0.900 with every seed."]


def test_nats_are_not_points(records: tuple[Record, Record]) -> None:
    front = records[1] | {"units": {"learned": "nats", "forgotten": "nats"}}
    scales = Scales(front)
    assert (scales.unit, scales.factor, scales.lost(0.1234)) == ("nats/token", 1.0, "0.123")
    assert scales.lost(0.1, signed=True) == "+0.100"
    assert base_score(records[0]["runs"], front) == -0.05


def test_every_run_is_in_the_table_and_failures_have_reasons(records: tuple[Record, Record]) -> None:
    cells, front = records
    left = front | {"excluded": [*front["excluded"], {"run": "z", "why": "a score is not a number"}]}
    text = render_comparison(cells, left)
    table = text[text.index('<table id="runs"') :]
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', table)
    assert [name for name, _ in rows] == [row["name"] for row in cells["runs"]] and len(rows) == 90
    heads = re.findall(r'<th scope="col".*?>(.*?)</th>', table)
    keys = dict(zip(heads[1:], re.findall(r'<td(?: data-key="(.*?)")?', rows[0][1]), strict=True))
    assert float(keys["topics"]) == cells["runs"][0]["benchmarks"][1]["after"]
    told = re.findall(r"<li><b>(.*?)</b> \((.*?)\): (.*?)</li>", text)
    assert told == [
        (cells["runs"][4]["name"], "failed", "OutOfMemoryError: &lt;b&gt;too large&lt;/b&gt;"),
        (cells["runs"][7]["name"], "missing", "no reason is known"),
        ("z", "left out", "a score is not a number"),
    ]


def test_published_numbers_stand_beside_ours(records: tuple[Record, Record]) -> None:
    cells, front = records
    assert published(cells, front) == []
    entry = {"label": "keep", "benchmark": "facts", "score": 0.9, "source": "Table 3"}
    both = cells | {"published": [entry, entry | {"label": "other"}]}
    best = max((p for p in front["points"] if p["label"] == "keep"), key=lambda p: p["learned"]["mean"])
    ours = [c["benchmarks"][0]["after"] for c in cells["runs"] if c["name"] in best["runs"]]
    assert [own for _, own in published(both, front)] == [pytest.approx(sum(ours) / 3), None]
    text = render_comparison(both, front)
    numbers = f"<td>facts</td><td>0.900</td><td>{sum(ours) / 3:.3f}</td>"
    assert f'<tr><th scope="row">keep</th>{numbers}<td class="path">Table 3</td></tr>' in text
    assert "Published beside ours" in text and "<td>0.900</td><td>–</td>" in text


def test_the_choice_is_told_and_ringed(records: tuple[Record, Record]) -> None:
    cells, front = records
    chosen = choose(cells, front, {"facts": 0.2})
    text = render_comparison(cells, front | {"choice": chosen | {"adapter": "best"}})
    told = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text[text.index("<h2>The choice</h2>") :]))
    assert told["may lose"] == "facts 0.200"
    assert told["setting"] == chosen["point"] and told["its run"] == chosen["run"]
    assert told["loses"] == f"facts {chosen['loss']['facts']:.3f}"
    assert (told["task score"], told["adapter"]) == (f"{chosen['learned']:.3f}", "best")
    ring = next(t for t in island(text)["figures"]["tradeoff"]["data"] if t["name"] == "choice")
    assert (ring["x"], ring["y"]) == ([chosen["learned"]], [100 * chosen["forgotten"]])
    assert "<h2>The choice</h2>" not in render_comparison(cells, front)


def test_figures_are_saved_beside_the_page(records: tuple[Record, Record], tmp_path: Path) -> None:
    write_comparison(*records, tmp_path / "report.html")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {f"{name}.{kind}" for name in ("tradeoff",) for kind in ("png", "svg")}
    text = (tmp_path / "figures" / "tradeoff.svg").read_text("utf-8")
    assert all(f">{label}</text>" in text for label in (*records[1]["fronts"], "front over all"))


def test_items_of_settings_on_the_front_are_read_from_their_folders(tmp_path: Path) -> None:
    cells, front = copy.deepcopy(made_up())
    name = next(p["runs"][0] for p in front["points"] if p["on_front"] and not p["variant"])
    row = next(row for row in cells["runs"] if row["name"] == name)
    row["folder"] = str(tmp_path)
    (tmp_path / "evaluation").mkdir()
    item = {"index": 0, "group": None, "before": 1.0, "after": 0.0, "text_after": "a\u2028b</script>"}
    (tmp_path / "evaluation" / "facts.items.jsonl").write_text(json.dumps(item, ensure_ascii=False) + "\n", "utf-8")
    text = render_comparison(cells, front)
    assert "Items lost and gained" in headings(text)
    (found,) = island(text)["items"]
    assert (found["label"], found["said_after"]) == (name, "a\u2028b</script>")
    assert "\u2028" not in text


def test_nothing_finished_and_broken_records(records: tuple[Record, Record]) -> None:
    cells, front = records
    empty = {"points": [], "fronts": {}, "front": [], "units": None, "axes": None, "choice": None,
             "matched": {"score": None, "baseline": None, "rows": []}, "excluded": [], "notes": []}  # fmt: skip
    failed = [row | {"status": "failed", "benchmarks": [], "learned": None, "forgotten": None} for row in cells["runs"]]
    text = render_comparison(cells | {"runs": failed, "benchmarks": []}, empty)
    parsed(text)
    assert "No label has finished runs" in text
    with pytest.raises(ArtefactError, match="points"):
        render_comparison(cells, {key: value for key, value in front.items() if key != "points"})
