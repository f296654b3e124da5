"""The documentation of the running Python: articles that need no download."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, model_validator

from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.sources import python_docs
from cpo_pipe.data.sources.rows import TEXT_COLUMN, ColumnRequest, Row, Stream
from cpo_pipe.data.sources.source import Source
from cpo_pipe.pipeline.prepare.articles import Articles
from cpo_pipe.pipeline.prepare.base import Data

NAME = "python-docs"


@dataclass(frozen=True)
class PythonDocsSource(Source):
    """The articles of `python_docs.collect` as rows."""

    def identity(self, hash_file: Callable[[Path], str]) -> Spec:
        """Return the hash of the documentation."""
        return {"kind": NAME, "docs": python_docs.identity()}

    def rows(self, request: ColumnRequest, limit: int | None) -> Stream:
        """Yield one row for each article."""
        request.require([TEXT_COLUMN])
        for number, article in enumerate(python_docs.collect(), 1):
            yield Row(f"{self.name}:{number}", {TEXT_COLUMN: article})


class PythonDocs(Articles):
    """The docstrings and help topics of the running Python, cut into chunks."""

    preset: str = Field(NAME, description=Data.model_fields["preset"].description)

    @model_validator(mode="after")
    def _check_source(self) -> "PythonDocs":
        for key in ("source", "sources", "subset", "source_split", "revision", "test_source", "validation_source"):
            if getattr(self, key):
                raise ValueError(f"{key} is not used by the preset {NAME}; remove it")
        return self

    def open_source(self) -> Source:
        """Return the documentation."""
        return PythonDocsSource(name=NAME)
