"""The parts of the examples: each is a source, how its rows are read, and which of them are drawn."""

import heapq
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import Spec, digest
from cpo_pipe.data.models.templates import CHAT
from cpo_pipe.data.sources.locate import locate_source
from cpo_pipe.data.sources.source import Source
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.prepare.base import Data
from cpo_pipe.pipeline.prepare.source_settings import SplitSource

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """A source of examples."""

    config: Data
    """The section as if this were its only source."""
    source: Source
    name: str | None = None
    """Its name in `data.sources`."""
    split: str | None = None
    """The split that all its examples are in; None: the split is drawn."""
    count: int | None = None
    weight: float | None = None

    @property
    def label(self) -> str:
        """What the places of its rows begin with."""
        prefix = self.name or self.split
        return f"{prefix}/" if prefix else ""

    @property
    def where(self) -> str:
        """The source, as messages name it."""
        prefix = self.name or self.split
        return f"{prefix}: {self.source.name}" if prefix else self.source.name

    def spec(self, store: Store) -> Spec:
        """Return what decides the texts of its rows, and which are drawn."""
        spec: Spec = {
            "source": self.source.identity(store.hash_file),
            "reading": self.config.reading(),
            "max_rows": self.config.max_rows,
        }
        given = {"name": self.name, "split": self.split, "count": self.count, "weight": self.weight}
        return {**spec, **{key: value for key, value in given.items() if value is not None}}

    def total(self) -> int:
        """Return the number of rows that are read, before any are drawn."""
        count, limit = self.source.count(self.config.max_rows), self.config.max_rows
        return count if limit is None else min(count, limit)


def open_parts(config: Data) -> list[Part]:
    """Return the parts of a section: those of official splits first, then those whose split is drawn.

    Raises:
        InputError: a source does not exist, or has not the columns of any known format; or its column mapping or
            format is not that of the section's preset.
    """
    parts = list(_official(config))
    parts += [
        _part(config, settings, f"data.sources.{name}", name=name, count=settings.count, weight=settings.weight)
        for name, settings in config.sources.items()
    ] or [Part(config, config.open_source())]
    parts = [replace(part, config=part.config.resolved(part.source)) for part in parts]
    if len({str(part.config.rendering()["template"]) for part in parts}) > 1:  # conversations beside plain texts
        chat = {"template": CHAT}
        parts = [replace(part, config=part.config.model_copy(update=chat).resolved(part.source)) for part in parts]
    return parts


def _official(config: Data) -> Iterator[Part]:
    """Yield the parts of splits that have a source of their own, test first: its rows are in no other split."""
    for split, given in (("test", config.test_source), ("validation", config.validation_source)):
        if given is None:
            continue
        settings = SplitSource(source=given) if isinstance(given, str) else given
        if settings.source in (None, config.source):
            base = {"source": config.source, "subset": config.subset, "revision": config.revision}
            settings = settings.model_copy(update={k: v for k, v in base.items() if getattr(settings, k) is None})
        yield _part(config, settings, f"data.{split}_source", default_split=split, split=split)


def _part(config: Data, settings: SplitSource, key: str, default_split: str = "train", **fields: Any) -> Part:
    """Return the part of one source, whose section is as if this were the only one."""
    assert settings.source is not None
    source = locate_source(
        settings.source, subset=settings.subset, split=settings.source_split, revision=settings.revision,
        key=f"{key}.source", columns_key=f"{key}.columns", default_split=default_split,
    )  # fmt: skip
    columns = {**config.columns.model_dump(exclude_unset=True), **settings.columns}
    try:
        own = type(config.columns).model_validate(columns)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        name = ".".join(map(str, detail["loc"]))
        raise InputError(f"{key}.columns.{name}: not a column of preset {config.preset}; remove it") from error
    update: dict[str, Any] = {"columns": own, "max_rows": settings.max_rows}
    if settings.format is not None:
        if "format" not in type(config).model_fields:
            raise InputError(f"{key}.format: not used by preset {config.preset}; remove it")
        update["format"] = settings.format
    return Part(config.model_copy(update=update), source, **fields)


def drawn_rows(parts: Sequence[Part], seed: int) -> list[NDArray[np.bool_] | None]:
    """Return for each part which rows are drawn; None: all of them.

    Rows are drawn by a hash of seed, name and row number, so that a larger draw contains the smaller ones.
    """
    if not any(part.count or part.weight for part in parts):
        return [None] * len(parts)
    totals = [part.total() for part in parts]
    weighed = [(total, part.weight) for total, part in zip(totals, parts, strict=True) if part.weight]
    scale = min((total / weight for total, weight in weighed), default=0.0)
    masks: list[NDArray[np.bool_] | None] = []
    for part, total in zip(parts, totals, strict=True):
        count = part.count if part.weight is None else int(scale * part.weight + 1e-9)
        if count is None or count >= total:
            if part.count is not None and part.count > total:
                log.warning("data.sources.%s.count is %s, but there are only %s rows", part.name, f"{part.count:,}",
                            f"{total:,}")  # fmt: skip
            masks.append(None)
            continue
        hashes = ((digest([seed, part.name, row]), row) for row in range(total))
        mask = np.zeros(total, np.bool_)
        mask[[row for _, row in heapq.nsmallest(count, hashes)]] = True
        masks.append(mask)
    return masks
