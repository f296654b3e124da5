"""Summarize an artifact in one line: the fields of its spec that tell it from others."""

import json
import re
from collections.abc import Iterator
from textwrap import shorten
from typing import Any

from cpo_pipe.data.fingerprint import Spec, content_hash
from cpo_pipe.data.store.differences import ABSENT
from cpo_pipe.data.store.folder import ArtifactFolder
from cpo_pipe.data.store.inventory import Inventory
from cpo_pipe.data.text import one_line

SHORT = 8
"""Digits of a hash that are shown."""
LONGEST = 60
"""Characters that are shown of a text in a spec, such as an instruction's template."""

_SAMPLING = tuple(f"sampling.{name}" for name in ("temperature", "beams", "top_k", "top_p", "max_new_tokens"))

FIELDS: dict[str, tuple[str, ...]] = {
    "examples": (
        "sources.source.kind", "sources.source.sha256", "sources.source.commit", "sources.source.docs",
        "rendering.template", "rendering.tokenizer",
        "split.train", "split.validation", "split.test",
    ),
    "tokenizers": ("algorithm", "vocab_size", "corpus.sources.source.kind"),
    "negatives": ("strategy", "generator", *_SAMPLING, "*"),
    "groups": (
        "candidates.count", "candidates.label", "candidates.negatives.strategy", "scorer.scorer", "scorer.embedder",
        "drop_duplicates", "drop_correct.by",
    ),
    "rejected": ("of",),
    "checkpoints": (
        "settings.objective", "settings.mle_weight", "settings.beta", "settings.learning_rate", "settings.max_steps",
        "settings.batch_size", "init.model", "settings.lora", "settings.seed", "merge", "base", "adapter",
    ),
    "generations": ("model", *_SAMPLING, "seed"),
    "ratings": ("api.model", "*"),
    "verdicts": ("judge", "*"),
    "metrics": ("baseline", "systems", "judges.judge"),
}  # fmt: skip
"""Paths of the fields that are shown, by kind; `*` means all other plain fields.

Where no path fits, all plain fields are shown."""


class Summaries:
    """Show specs as text. A model that is a checkpoint of the store is shown by the checkpoint's hash."""

    def __init__(self, inventory: Inventory):
        checkpoints = (inventory.root / "checkpoints").is_dir()
        self._models = {
            artifact.manifest.get("fingerprint"): artifact.path.name
            for artifact in (inventory.artifacts("checkpoints") if checkpoints else ())
        }

    def summary(self, artifact: ArtifactFolder) -> str:
        """Return one line that says what an artifact is."""
        if artifact.spec is None:
            return "its spec.json is gone or unreadable"
        fields = list(self._fields(artifact.spec, FIELDS.get(artifact.kind, ())))
        return one_line(", ".join(fields or self._fields(artifact.spec, ("*",))))

    def value(self, value: Any) -> str:
        """Return a value of a spec as text, with hashes cut."""
        if value is ABSENT:
            return "absent"
        if isinstance(value, str):
            if value in self._models:
                return f"checkpoint {self._models[value][:SHORT]}"
            return value[:SHORT] if re.fullmatch(r"[0-9a-f]{16,64}", value) else value
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key}: {self.value(part)}" for key, part in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(self.value, value)) + "]"
        return json.dumps(value)

    def _fields(self, spec: Spec, paths: tuple[str, ...]) -> Iterator[str]:
        shown = {path.partition(".")[0] for path in paths}
        for path in paths:
            if path == "*":
                others = {key: value for key, value in spec.items() if key not in shown}
                yield from (self._field(key, [value]) for key, value in others.items() if _is_plain(value))
            elif path == "of" and isinstance(spec.get("of"), dict):
                yield f"of {content_hash(spec['of'])[:SHORT]}"
            elif values := [value for value in _at(spec, path.split(".")) if value is not None]:
                yield self._field(path.rpartition(".")[2], values)

    def _field(self, name: str, values: list[Any]) -> str:
        texts = (shorten(self.value(value), LONGEST, placeholder="…") for value in values)
        return f"{name.replace('_', ' ')} {' + '.join(texts)}"


def _at(value: Any, path: list[str]) -> Iterator[Any]:
    """Yield the values at a path; a list on the way contributes each of its items."""
    if path and isinstance(value, list):
        for part in value:
            yield from _at(part, path)
    elif not path:
        yield value
    elif isinstance(value, dict) and path[0] in value:
        yield from _at(value[path[0]], path[1:])


def _is_plain(value: Any) -> bool:
    return value is not None and not isinstance(value, dict | list)
