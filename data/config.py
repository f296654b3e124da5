"""What all config classes of a recipe share, and the types of their fields."""

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

LONGEST_NAME = 100
"""Names are parts of the names of files, which have at most 255 bytes."""


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=LONGEST_NAME)]


Positive = Annotated[int, Field(gt=0)]


Seed = Annotated[int, Field(ge=0, lt=1 << 63)]


Share = Annotated[float, Field(ge=0, le=1)]


def _location(text: str) -> str:
    """Return a path with ~ expanded to the home folder, or a name unchanged; refuse invalid file names."""
    if not text:
        raise ValueError("an empty path means the current folder; name it `.`, or name another")
    text = os.path.expanduser(text)
    parts = os.fsencode(text).split(b"/")
    if "\0" in text or max(map(len, parts)) > 255 or len(os.fsencode(text)) > 4095:
        raise ValueError("not a valid path: a name has at most 255 bytes, a path 4,095, and neither a NUL")
    return text


Location = Annotated[str, AfterValidator(_location)]
"""A file, a folder, a name on the hub, or a name in the recipe."""


class Section(BaseModel):
    """What all parts of a recipe share: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
