"""Databricks Dolly 15k, as Feng et al. 2025 use it."""

from pydantic import Field

from cpo_pipe.data.config import Location
from cpo_pipe.data.models import templates
from cpo_pipe.pipeline.prepare.base import Data
from cpo_pipe.pipeline.prepare.pairs import PairColumns, Pairs

PAPER_SPLIT = (7505, 7506)
"""Training and test examples of the paper."""


class DollyColumns(PairColumns):
    """The columns of Dolly."""

    prompt: str = Field("instruction", description=PairColumns.model_fields["prompt"].description)
    target: str = Field("response", description=PairColumns.model_fields["target"].description)
    context: str | None = Field("context", description=PairColumns.model_fields["context"].description)
    category: str | None = Field("category", description=PairColumns.model_fields["category"].description)


class Dolly(Pairs):
    """Instructions with answers of people (databricks-dolly-15k), in the template and with the split of the paper."""

    preset: str = Field("dolly", description=Data.model_fields["preset"].description)
    source: Location | None = Field(
        "databricks/databricks-dolly-15k", description=Data.model_fields["source"].description
    )
    columns: DollyColumns = Field(default_factory=DollyColumns, description="column mapping")
    template: str = Field(templates.DOLLY, description=Pairs.model_fields["template"].description)

    def split_sizes(self) -> tuple[int | None, int, int | None]:
        """Return the paper's split, where the recipe sets neither `train` nor `test`."""
        if self.train is None and self.test is None:
            return PAPER_SPLIT[0], self.validation, PAPER_SPLIT[1]
        return super().split_sizes()
