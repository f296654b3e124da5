"""The files of a training's checkpoint: written once before the first step, to try, and once after the last."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from cpo_pipe.data.errors import InputError, cause
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models.model import Model, ScratchModel
from cpo_pipe.data.models.tokenizer import TokenizerFiles, copy_tokenizer
from cpo_pipe.data.store import Artifact, atomic
from cpo_pipe.trainer.objectives.base import Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cpo_pipe.trainer.resume import Metrics

METRICS_FILE = "training-metrics.parquet"


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a training's checkpoint."""

    name: str
    config: Training
    init: Model | ScratchModel
    tokenizer: TokenizerFiles
    settings: Spec
    """Those that decide the weights."""
    groups: int
    """How many groups it is trained on."""

    def write(self, folder: Path, model: "PreTrainedModel", metrics: "Metrics") -> None:
        """Write weights, configs, tokenizer, metrics and model card."""
        from cpo_pipe.trainer.model_card import write_card
        from cpo_pipe.trainer.resume import metrics_table

        model.save_pretrained(folder)
        copy_tokenizer(self.tokenizer.path, folder)
        pq.write_table(metrics_table(metrics), folder / METRICS_FILE)
        write_card(folder, self.name, self.config, self.init, self.settings, self.groups, metrics)

    def rehearse(self, artifact: Artifact, model: "PreTrainedModel") -> None:
        """Write all of it once and remove it, so that what cannot be written is found before the first step.

        Raises:
            InputError: transformers, or what writes the card, refuses it.
        """
        from safetensors import SafetensorError

        folder = atomic.temporary(artifact.path)
        try:
            folder.mkdir(parents=True)
            self.write(folder, model, [{"step": 0, "loss": math.nan}])
        except (OSError, SafetensorError, InputError):  # a full disk is no fault of the model's
            raise
        except Exception as error:  # the libraries' refusals have no common type
            raise InputError(
                f"train.{self.name}: its checkpoint could not be written after the last step ({cause(error)}); nothing "
                "was trained; correct the files of the initial model, or start from another one"
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
