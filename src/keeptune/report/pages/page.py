"""The page around every report: one HTML file that holds its styles, its scripts, its figures and its data."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps

from keeptune.core.versions import versions
from keeptune.report.numbers import count, duration, gap, listing, number, option_text, set_options, signed

if TYPE_CHECKING:
    from keeptune.report.pages.charts import Chart

# plotly.js adds styles of its own.
_POLICY = "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"


@cache
def environment(autoescape: bool = True) -> Environment:
    """Returns Jinja with the templates of the pages and of the card."""
    given: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    made = Environment(loader=PackageLoader(__package__, "templates"), autoescape=autoescape, **given)
    made.filters |= {"number": number, "parameters": count, "duration": duration, "gap": gap, "set": set_options}
    made.filters |= {"option": option_text, "listing": listing, "signed": signed}
    return made


def plotly_source() -> str:
    """Returns plotly.js; of the pages alone, as a card needs none of it."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def render(template: str, charts: Sequence[Chart | None], base: object, changed: Any = None, **values: Any) -> str:
    """Returns a page; the same values always give the same text.

    A template extends ``base.html.j2``, prints the values, all escaped, and places the charts, each with a name of its
    own (None is left out). ``changed`` are the items to search, as from
    :func:`keeptune.report.pages.item_rows.lost_and_gained`.
    """
    from plotly.utils import PlotlyJSONEncoder

    figures = {chart.name: chart.figure.to_plotly_json() for chart in charts if chart is not None}
    data = {"figures": figures} | ({"items": changed["rows"]} if changed else {})
    scripts, path = [plotly_source(), _source("page.js")], Path(str(base))
    # The page's own scripts, by their hashes, and no request anywhere.
    hashes = [f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'" for text in scripts]
    return (
        environment()
        .get_template(template)
        .render(
            scripts=scripts,
            style=_source("page.css"),
            policy=f"default-src 'none'; script-src {' '.join(hashes)}; {_POLICY}",
            island=htmlsafe_json_dumps(data, cls=PlotlyJSONEncoder, separators=(",", ":")),
            base=base,
            base_name=(path.parent.name if path.name == "model" else path.name) or base,  # as in atlas
            changed=changed,
            **values,
        )
    )


def _source(name: str) -> str:
    return files("keeptune.report.pages").joinpath("templates", name).read_text("utf-8")


def repeat(commands: Sequence[tuple[str, str]], recipes: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Returns ``commands``, ``recipes`` and ``versions``: how to repeat a run.

    Commands come with what they do, recipes as mappings or as YAML.
    """
    told = [(name, recipe_text(recipe)) for name, recipe in recipes]
    return {"commands": commands, "recipes": told, "versions": versions()}


def recipe_text(recipe: Mapping[str, Any] | str) -> str:
    """Returns a recipe as YAML that ends with a line feed; a text is taken as it is."""
    if isinstance(recipe, str):
        return recipe if recipe.endswith("\n") else f"{recipe}\n"
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100)
