"""The interface of Axolotl's plugins: the hooks of BasePlugin, axolotl 0.19.0, src/axolotl/integrations/base.py."""

from __future__ import annotations

from typing import Any


class BasePlugin:
    """Hooks that Axolotl calls on every plugin, in the order of a training."""

    def register(self, cfg: dict[str, Any]) -> None: ...

    def get_input_args(self) -> str | None: ...

    def get_training_args_mixin(self) -> str | None: ...

    def pre_model_load(self, cfg: Any) -> None: ...

    def post_model_load(self, cfg: Any, model: Any) -> None: ...

    def get_trainer_cls(self, cfg: Any) -> type[Any] | None: ...

    def get_training_args(self, cfg: Any) -> Any: ...

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        return []

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None: ...

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return []

    def post_train(self, cfg: Any, model: Any) -> None: ...

    def post_train_unload(self, cfg: Any) -> None: ...
