"""The data presets by name (`data.preset`): shapes of data, and known data sets with their columns and templates."""

from cpo_pipe.data.registry import Registry
from cpo_pipe.pipeline.prepare.articles import Articles
from cpo_pipe.pipeline.prepare.base import Data
from cpo_pipe.pipeline.prepare.pairs import Pairs
from cpo_pipe.pipeline.prepare.presets.dolly import Dolly
from cpo_pipe.pipeline.prepare.presets.gsm8k import GSM8K
from cpo_pipe.pipeline.prepare.presets.python_docs import PythonDocs

PRESETS: Registry[Data] = Registry(
    "preset",
    "preset",
    Data,  # type: ignore[type-abstract]
    {"pairs": Pairs, "text": Articles, "dolly": Dolly, "gsm8k": GSM8K, "python-docs": PythonDocs},
    default="pairs",
)
