"""Settings of one source among several, or of a split that has a source of its own."""

from pydantic import Field, model_validator

from cpo_pipe.data.config import Location, Positive, Section
from cpo_pipe.pipeline.prepare.formats import FormatName


class SplitSource(Section):
    """The source of an official split."""

    source: Location | None = Field(None, description="as data.source (default: the same source)")
    subset: str | None = Field(None, description="configuration name of a Hugging Face data set")
    source_split: str | None = Field(
        None, description="split of a folder or a Hugging Face data set (default: the name of this split)"
    )
    revision: str | None = Field(None, description="commit or tag of a Hugging Face data set")
    columns: dict[str, str | None] = Field(
        default_factory=dict, description="column mapping, where it differs from data.columns"
    )
    format: FormatName | None = Field(None, description="as data.format (default: by the columns)")
    max_rows: Positive | None = Field(None, description="rows to read at most (default: all)")


class MixedSource(SplitSource):
    """One of several sources of a mixture."""

    source: Location = Field(description="as data.source")
    source_split: str | None = Field(None, description="split of a folder or a Hugging Face data set (default: train)")
    count: Positive | None = Field(None, description="rows to draw, by data.split_seed (default: all)")
    weight: float | None = Field(
        None,
        gt=0,
        description="share of the mixture, relative to the other weights: as many rows are drawn as these shares allow "
        "without repeating a row",
    )

    @model_validator(mode="after")
    def _check_amount(self) -> "MixedSource":
        if self.count is not None and self.weight is not None:
            raise ValueError("give either count or weight")
        return self
