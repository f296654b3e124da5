"""Training objectives, by the name that a recipe gives as `objective`. To add one, write a module and an entry here."""

from cpo_pipe.data.registry import Registry
from cpo_pipe.trainer.objectives.apo import APODown, APOZero
from cpo_pipe.trainer.objectives.base import Training
from cpo_pipe.trainer.objectives.cpo import CPO, RankedCPO
from cpo_pipe.trainer.objectives.dpo import DPO
from cpo_pipe.trainer.objectives.mle import MLE
from cpo_pipe.trainer.objectives.pss import PSS
from cpo_pipe.trainer.objectives.slic import SLiC

OBJECTIVES: Registry[Training] = Registry(
    "objective",
    "objective",
    Training,  # type: ignore[type-abstract]
    {
        "mle": MLE,
        "cpo": CPO,
        "cpo-ranked": RankedCPO,
        "dpo": DPO,
        "slic": SLiC,
        "apo-zero": APOZero,
        "apo-down": APODown,
        "pss": PSS,
    },
    others={"sft": "mle", "ce": "mle", "cross-entropy": "mle", "sigmoid": "dpo", "hinge": "slic"},
)
