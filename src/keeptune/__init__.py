"""keeptune: fine-tune a language model without destroying what it already knows."""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; at run time a name is imported when it is first used
    from keeptune.adapter.install import install as install
    from keeptune.api import export as export
    from keeptune.api import measure as measure
    from keeptune.api import plan as plan
    from keeptune.core.errors import KeeptuneError as KeeptuneError
    from keeptune.core.low_rank import LowRank as LowRank
    from keeptune.core.plan import Plan as Plan
    from keeptune.evaluation.benchmarks import FileBenchmark as FileBenchmark
    from keeptune.evaluation.model_pairs import AdapterPair as AdapterPair
    from keeptune.evaluation.model_pairs import TwoModels as TwoModels
    from keeptune.methods.combined import Combined as Combined
    from keeptune.methods.combined import Part as Part
    from keeptune.posthoc.repair import Repair as Repair
    from keeptune.posthoc.repair import repair as repair
    from keeptune.statistics.layer_effect import LayerEffect as LayerEffect
    from keeptune.studies.trace import trace as trace
    from keeptune.training.attach import attach as attach
    from keeptune.training.guard import Guard as Guard
    from keeptune.training.penalty_engine import Penalties as Penalties

_PACKAGES = ("methods", "penalties")  # every class in their files that has a name is public


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that ``import keeptune`` is cheap."""
    modules = _modules()
    if name not in modules:
        raise AttributeError(f"module keeptune has no attribute {name}")
    globals()[name] = value = getattr(importlib.import_module(modules[name]), name)
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted({*globals(), *_modules()})


@cache  # the files of the package do not change while it runs
def _modules() -> dict[str, str]:
    """Returns the module of each public name, from the imports above and the files of methods and penalties."""
    here = Path(__file__)
    imports = re.findall(r"^    from (\S+) import (\w+) as", here.read_text(encoding="utf-8"), re.M)
    modules = {name: module for module, name in imports}
    for path in (path for package in _PACKAGES for path in here.with_name(package).glob("*.py")):
        classes = re.split(r"^class (?=\w)", path.read_text(encoding="utf-8"), flags=re.M)[1:]
        named = [text for text in classes if re.search(r'^    name(: ClassVar\[str\])? = "', text, re.M)]
        modules |= {re.split(r"\W", text)[0]: f"keeptune.{path.parent.name}.{path.stem}" for text in named}
    return modules
