"""cpo-pipe: Contrastive Preference Optimization from ground-truth pairs alone (Feng et al. 2025).

The public names load their modules when they are first used, so that importing the package is fast.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_MODULES = {
    "Run": "cpo_pipe.run",
    "load_recipe": "cpo_pipe.recipe.load",
    "parse_recipe": "cpo_pipe.recipe.load",
    "Store": "cpo_pipe.data.store.store",
    "Scorer": "cpo_pipe.pipeline.scorers.scorer",
    "Judge": "cpo_pipe.eval.judges.base",
    "JudgeConfig": "cpo_pipe.eval.judges.base",
    "ScoreJudge": "cpo_pipe.eval.judges.base",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
