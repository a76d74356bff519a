"""Results of single texts in the store: an interrupted run resumes, and data sets share texts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor
from tqdm.auto import tqdm

from keeptune.core.processes import by_first, gathered, share
from keeptune.statistics.store import Source, StatStore

_log = logging.getLogger(__name__)
Text = TypeVar("Text")


@dataclass(frozen=True, slots=True)
class TextEntries(Generic[Text]):
    """The entries of texts, one each; the key does not depend on the rest of the data.

    Without a store nothing is kept. Of the model, kind, version of the numbers and options are the key; ``title`` heads
    log messages and the progress bar.
    """

    store: StatStore | None
    source: Source | None
    kind: str
    version: int
    options: Mapping[str, Any]
    title: str

    def recipe(self, text: Text) -> dict[str, Any]:
        """Returns all that determines the entry of a text."""
        assert self.source is not None
        return {
            "class": self.kind,
            "version": self.version,
            "request": dict(self.options),
            "text": text,
            "model": self.source.model,
            "dtype": self.source.dtype,
        }

    def fill(
        self,
        texts: Iterable[Text],
        measure: Callable[[Sequence[Text]], Iterator[Sequence[tuple[Text, Tensor]]]],
        *,
        keep: bool,
    ) -> dict[Text, Tensor]:
        """Measures the texts that have no entry yet, each once, and stores them as soon as they are measured.

        Several processes divide them; without a store each measures all.
        ``measure`` yields the results of the texts it is given, batch by batch.

        Returns:
            The value of each text, stored ones as float32; without ``keep`` none of them is held in memory.
        """
        values: dict[Text, Tensor] = {}
        missing: list[Text] = []
        unique = dict.fromkeys(texts)
        for text in unique:
            value = None if self.store is None else self.store.get(self.recipe(text))
            if value is None:
                missing.append(text)
            elif keep:
                values[text] = value
        if len(missing) < len(unique):
            present = len(unique) - len(missing)
            folder = self.store and self.store.folder
            _log.info("%s: %d of %d texts taken from %s", self.title, present, len(unique), folder)
        own = missing if self.store is None else share(by_first(lambda: missing))
        if own:
            start = time.monotonic()
            with tqdm(total=len(own), desc=self.title, unit="text", delay=2, disable=None, leave=False) as bar:
                for results in measure(own):
                    if not bar.n:
                        seconds = time.monotonic() - start
                        _log.info("%s: %d of %d texts took %.2g s", self.title, len(results), len(own), seconds)
                    for text, value in results:
                        if self.store is not None:
                            self.store.put(self.recipe(text), value.float())
                        if keep:
                            values[text] = value
                    bar.update(len(results))
        for part in gathered({text: values[text] for text in own if keep}):
            values |= part
        return values
