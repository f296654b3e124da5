"""The strategies, by name. Adding one is a module and a line here."""

from cpo_pipe.data.registry import Registry
from cpo_pipe.pipeline.negatives.autoregressive import Autoregressive
from cpo_pipe.pipeline.negatives.batch import BatchTargets
from cpo_pipe.pipeline.negatives.meanfield import MeanField
from cpo_pipe.pipeline.negatives.pool import Pool
from cpo_pipe.pipeline.negatives.prompted import Prompted
from cpo_pipe.pipeline.negatives.rejected import Rejected
from cpo_pipe.pipeline.negatives.strategy import Strategy
from cpo_pipe.pipeline.negatives.truncation import Truncation

STRATEGIES = Registry[Strategy](
    "strategy",
    "strategy",
    Strategy,  # type: ignore[type-abstract]
    {
        "autoregressive": Autoregressive,
        "batch": BatchTargets,
        "meanfield": MeanField,
        "truncation": Truncation,
        "pool": Pool,
        "prompted": Prompted,
        "rejected": Rejected,
    },
)
