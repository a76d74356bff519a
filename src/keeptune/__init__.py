"""keeptune: fine-tune a language model without destroying what it already knows."""

from typing import Any

import lazy_loader

# Public names are imported when they are first used, so that ``import keeptune`` is cheap.
_lazy, _names, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """Imports a public name: one of ``__init__.pyi``, or the class of a method, a penalty or a loss."""
    if name in __all__:
        return _lazy(name)
    if not name.startswith("_"):
        from keeptune.methods.base import methods
        from keeptune.penalties.base import penalties
        from keeptune.training.losses.base import losses

        for cls in (*methods().values(), *penalties().values(), *losses().values()):
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module keeptune has no attribute {name}")


def __dir__() -> list[str]:
    """The public names of ``__init__.pyi``."""
    return _names()
