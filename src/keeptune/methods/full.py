"""Full fine-tuning, the reference that T (FARSS eq. 37) is relative to: every weight is trained.

There is no adapter: the result is a whole model, exported as ``merged``.
"""

from dataclasses import dataclass
from typing import ClassVar

from keeptune.core.plan import Scope
from keeptune.methods.base import Method


@dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning; it has no options of its own."""

    name = "full"
    paper = "full fine-tuning, the usual reference"
    scope: ClassVar[Scope] = "all"
