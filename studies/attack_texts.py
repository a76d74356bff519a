"""Attacks by texts: YAML that grows or runs code, HTML in names and data, chat templates that loop or reach out."""

from __future__ import annotations

import json
import random
import resource
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import markdown

from studies.attack_kills import Found
from studies.attack_runs import ASSETS, Limits, command, fresh, recipe, told, verb, written

_MOST = 10**9  # bytes that a refusal may take beside what this process has already
_SECONDS = 10  # of CPU that a refusal may take
_LIMITS = Limits(cpu=_SECONDS + 1, memory=3 * _MOST)


def _bombs() -> list[str]:
    """Return YAML that stands for more than it is."""
    names = "abcdefghi"
    aliases = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    aliases += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip(names, names[1:], strict=False)]
    merged = ["a: &a {x: 1, y: 2}"]
    merged += [f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}" for a, b in zip(names, names[1:], strict=False)]
    return ["\n".join(aliases), "\n".join(merged), "a: &a [*a]", "a: &a {b: *a}", "&a [*a, *a]"]


HOSTILE_YAML: tuple[str, ...] = (
    *_bombs(),
    "model: !!python/object/apply:os.system ['touch code-ran']",
    "model: !!python/object/new:subprocess.Popen [[touch, code-ran]]",
    "model: !!python/name:os.system",
    "model: !!python/module:os",
    "!!python/object/apply:builtins.exec [\"open('code-ran', 'w')\"]",
    "model: !!binary aGVsbG8=",
    "model: !!set {a, b}",
    "model: !!timestamp 2026-01-01",
    "model: !foo bar",
    "model: " + "[" * 3_000,
    "model: " + "[" * 100_000 + "]" * 100_000,
    "model: " + "{a: " * 5_000 + "}" * 5_000,
    "- " * 50_000 + "a",
    "\n".join(" " * n + "a:" for n in range(2_000)),
    "model: " + "9" * 5_000,
    "model: 0x" + "f" * 5_000,
    "train: {learning_rate: 1e400}",
    "train: {learning_rate: .nan}",
    "train: {seed: 1180591620717411303424}",
    "model: " + "a" * 5_000_000,
    "a" * 100_000 + ": 1",
    "model: a\nmodel: b",
    "? [a, b]\n: c",
    "? {a: b}\n: c",
    "1: a\nnull: b",
    "model: \"\\0\"",
    "model: \"\\ud800\"",
    "\ufeffmodel: a",
    "%YAML 9.9\n---\nmodel: a",
    "---\nmodel: a\n---\nmodel: b",
    "model: 'a",
    "\tmodel: a",
    "model: a\x07",
    "model: /dev/zero",
    "model: ../../../../../../etc/passwd",
    "model: file:///etc/passwd",
    "model: {a: 1}",
    "model: [1, 2]",
    "null",
    "",
    "[]",
    "42",
    "model: {assets}\nmethod: __import__\ntask: {train: x, prompt: y, completion: z}",
    "model: {assets}\nmethod: {name: keep, __class__: x}",
    "output: /proc/self/mem\nmodel: {assets}",
    "include: recipe.yaml\n<<: recipe.yaml",
)  # fmt: skip


def yaml(number: int, seed: int, work: Path) -> Found:
    """Give hostile YAML for a recipe, or a recipe with up to 40 bytes changed: one message, little time and memory."""
    drawn = random.Random(f"{seed} yaml {number}")
    here = fresh(work)
    path = written(recipe("loki", here), here)
    if number < len(HOSTILE_YAML):
        text = HOSTILE_YAML[number].replace("{assets}", str(ASSETS / "models/stories260K"))
        path.write_bytes(text.encode("utf-8"))
    else:
        data = bytearray(path.read_bytes())
        for _ in range(drawn.randint(1, 40)):
            place = drawn.randrange(len(data))
            data[place : place + drawn.randint(0, 2)] = drawn.choice(
                (drawn.randbytes(1), drawn.choice("[]{}:,&*!|>'\"%@`#\n\t -?0").encode(), b"")
            )
        path.write_bytes(data)
    ended = command("run", path, "--dry-run", folder=here, limits=_LIMITS)
    taken = ended.taken - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    problems = told(ended) if ended.code else []
    problems += [f"{ended.cpu:.0f} s"] * (ended.cpu > _SECONDS) + [f"{taken / 1e9:.1f} GB"] * (taken > _MOST)
    problems += ["the code ran"] * any(here.rglob("code-ran"))
    problems += ["something was written"] * (here / "out").exists()
    return problems, {"text": path.read_bytes()[:60].decode("utf-8", "replace"), "code": ended.code}


MARK = "attack4711"
PAYLOADS = (
    f"<script>{MARK}()</script>",
    f"</script><script>{MARK}()</script>",
    f"\"><img src=x onerror={MARK}()>",
    f"' onmouseover='{MARK}()' x='",
    f"<!--<script>{MARK}()//-->",
    f"</textarea></pre></td><svg onload={MARK}()>",
    f"[a](javascript:{MARK}())",
    f"{{{{ {MARK}.__class__ }}}}{{% for a in b %}}",
    f"\u2028</SCRIPT\t><ScRiPt>{MARK}()</sCrIpT>",
    f"&lt;script&gt;{MARK}()&lt;/script&gt;<math><a xlink:href=javascript:{MARK}()>x",
)  # fmt: skip


class _Elements(HTMLParser):
    """What a page has of an attacker's: elements, attributes with code, and scripts that are not data."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        for name, value in attrs:
            if MARK in (value or "") and (name.startswith("on") or "javascript:" in (value or "")):
                self.found.append(f"<{tag} {name}={value!r}>")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script" and data.lstrip().startswith(MARK):
            self.found.append(f"a script {data[:60]!r}")


def injected(page: str) -> list[str]:
    """Return what of an attacker's a browser would run of a page."""
    parser = _Elements()
    parser.feed(page)
    return parser.found


def html(number: int, seed: int, work: Path) -> Found:
    """Put HTML into every name and text that pages and cards show; no element, attribute or script comes of it."""
    payload = PAYLOADS[number % len(PAYLOADS)]
    kind = ("run", "compare", "stages")[number // len(PAYLOADS) % 3]
    here = fresh(work)
    model = here / ("<img src=x onerror=" + MARK + "()>" if "/" in payload else payload)
    model.symlink_to(ASSETS / "models/stories260K")
    given = recipe(kind, here) | {"model": str(model)}
    problems_of_arithmetic = here / "rows.jsonl"
    rows = [{"question": f"{payload} {n}", "answer": f"{n} {payload}"} for n in range(20)]
    problems_of_arithmetic.write_text("".join(json.dumps(row) + "\n" for row in rows[:16]), encoding="utf-8")
    (here / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[16:]), encoding="utf-8")
    tasks = given["stages"] if kind == "stages" else [given]
    for one in tasks:
        one["task"] = one["task"] | {"train": str(problems_of_arithmetic)}
    given["evaluate"][1] |= {"file": str(here / "items.jsonl"), "text": payload.replace("{", "(") + " {question}"}
    if kind == "compare":
        for label, entry in enumerate(given["compare"]["methods"]):
            entry["label"] = f"{payload} {label}"
    ended = command(verb(kind), written(given, here), folder=here)
    found = told(ended) if ended.code else []
    for page in (*here.rglob("*.html"), *here.rglob("README.md")):
        raw = page.read_text(encoding="utf-8")
        if page.suffix == ".md":  # its head is YAML, which nobody shows
            text = raw.removeprefix("---").partition("\n---\n")[2] or raw
            raw = markdown.markdown(text, extensions=["fenced_code", "tables"])
        found += [f"{page.relative_to(here)}: {text}" for text in injected(raw)]
    return found, {"kind": kind, "payload": payload, "code": ended.code}


_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{{ c }}"
TEMPLATES = (
    _LOOP + "{% endfor %}{% endfor %}{% endfor %}",
    _LOOP.replace("{{ c }}", "") + "{% endfor %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10000000000 }}",
    "{% set x = 'a' * 1000000 %}{% for a in range(90000) %}{{ x }}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ 'a'.center(9999999999) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch {mark}').read() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].system('touch {mark}') }}",
    "{% set _ = messages.append({'role': 'user', 'content': 'x'}) %}{{ messages }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch {mark}') }}",
    "{{ raise_exception('no') }}",
    "{% for",
    "{{ undefined.attribute }}",
    "{% for m in messages %}{{ m }}{% endfor %}",
    "nothing of the messages",
    "{{ messages | tojson | list | map('int') | list }}",
    "{{ range(10**12) | list }}",
    "{{ messages | map(attribute='__class__') | list }}",
)  # fmt: skip


def templates(number: int, seed: int, work: Path) -> Found:
    """Bring a hostile chat template, in the tokenizer or the recipe: one message, little time and memory, no code."""
    here, mark = fresh(work), work / "code-ran"
    mark.unlink(missing_ok=True)
    text = TEMPLATES[number % len(TEMPLATES)].replace("{mark}", str(mark))
    chats = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n} it is."}]}
        for n in range(16)
    ]
    (here / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats), encoding="utf-8")
    given: dict[str, Any] = recipe("loki", here) | {"task": {"train": str(here / "chats.jsonl")}}
    given["evaluate"] = given["evaluate"][:1]
    (here / "hostile.jinja").write_text(text, encoding="utf-8")
    if number // len(TEMPLATES) % 2:
        given["task"]["chat_template"] = str(here / "hostile.jinja")
    else:
        model = here / "model"
        model.mkdir()
        for file in (ASSETS / "models/stories260K").iterdir():
            (model / file.name).symlink_to(file)
        (here / "hostile.jinja").rename(model / "chat_template.jinja")
        given["model"] = str(model)
    ended = command("run", written(given, here), folder=here, limits=_LIMITS)
    taken = ended.taken - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    problems = ["the code ran"] * mark.exists() + (told(ended) if ended.code else [])
    problems += [f"{ended.cpu:.0f} s"] * (ended.cpu > _SECONDS) + [f"{taken / 1e9:.1f} GB"] * (taken > _MOST)
    return problems, {"template": text[:80], "code": ended.code}
