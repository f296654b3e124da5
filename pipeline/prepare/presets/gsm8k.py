"""GSM8K (Cobbe et al. 2021)."""

from typing import Any

from pydantic import Field

from cpo_pipe.data.config import Location
from cpo_pipe.pipeline.prepare.base import Data
from cpo_pipe.pipeline.prepare.pairs import PairColumns, Pairs
from cpo_pipe.pipeline.prepare.source_settings import SplitSource

HUB_NAME = "openai/gsm8k"


def _subset(given: dict[str, Any]) -> str | None:
    """Return the subset of the data set on the hub; a source of the user's own has none."""
    return "main" if given.get("source") == HUB_NAME and not given.get("sources") else None


def _test_source(given: dict[str, Any]) -> SplitSource | None:
    """Return the official test split of the data set on the hub."""
    on_hub = given.get("source") == HUB_NAME and not given.get("sources")
    return SplitSource(source_split="test") if on_hub else None


class GSM8KColumns(PairColumns):
    """The columns of GSM8K."""

    prompt: str = Field("question", description=PairColumns.model_fields["prompt"].description)
    target: str = Field("answer", description=PairColumns.model_fields["target"].description)


class GSM8K(Pairs):
    """Grade-school arithmetic problems with worked answers (openai/gsm8k)."""

    preset: str = Field("gsm8k", description=Data.model_fields["preset"].description)
    source: Location | None = Field(HUB_NAME, description=Data.model_fields["source"].description)
    subset: str | None = Field(default_factory=_subset, description=Data.model_fields["subset"].description)
    test_source: Location | SplitSource | None = Field(
        default_factory=_test_source, description=Data.model_fields["test_source"].description
    )
    columns: GSM8KColumns = Field(default_factory=GSM8KColumns, description="column mapping")
    template: str = Field("Question: {prompt}\nAnswer:\n", description=Pairs.model_fields["template"].description)
