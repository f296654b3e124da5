"""The judges of this package. To add one, write its module and name it here."""

from cpo_pipe.data.registry import Registry
from cpo_pipe.eval.judges.base import JudgeConfig
from cpo_pipe.eval.judges.exact import Exact
from cpo_pipe.eval.judges.likelihood import Likelihood
from cpo_pipe.eval.judges.local import Local
from cpo_pipe.eval.judges.longer import Longer
from cpo_pipe.eval.judges.openai import OpenAi
from cpo_pipe.eval.judges.similarity import Similarity

JUDGES: Registry[JudgeConfig] = Registry(
    "judge",
    "kind",
    JudgeConfig,  # type: ignore[type-abstract]
    {
        "exact": Exact,
        "similarity": Similarity,
        "longer": Longer,
        "likelihood": Likelihood,
        "openai": OpenAi,
        "local": Local,
    },
)
