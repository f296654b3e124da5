"""The model card of a checkpoint: README.md, as the Hugging Face hub wants it.

Written with the weights, for a checkpoint is complete or absent: what is added later is in no manifest, and is neither
verified nor uploaded. Figures of an evaluation belong to a run, and many runs may use one checkpoint.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoConfig

from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models.model import Model, ScratchModel, own_attention
from cpo_pipe.data.text import fenced, visible
from cpo_pipe.trainer.objectives import OBJECTIVES
from cpo_pipe.trainer.objectives.base import Training

if TYPE_CHECKING:
    from cpo_pipe.trainer.resume import Metrics

CARD_FILE = "README.md"

_TEXT = """
# {name}

A causal language model trained by cpo-pipe with the objective `{objective}`.
{description}{citation}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this-folder"{attention})
tokenizer = AutoTokenizer.from_pretrained("this-folder")
```

- groups trained on: {groups}
- steps: {steps}
- loss of the last step: {loss_at_end:.4g}
- weights: float32; arithmetic while training: {dtype}

The settings that decide the weights; `spec.json` has them with the hashes of data and initial model:

{settings}

No licence is named: it follows from those of the initial model and of the data.
"""


def write_card(
    folder: Path,
    name: str,
    config: Training,
    init: Model | ScratchModel,
    settings: Spec,
    groups: int,
    metrics: "Metrics",
) -> None:
    """Write the card of a training's checkpoint.

    Args:
        folder: where the checkpoint is being made.
        name: the training, as the recipe calls it.
        config: its settings.
        init: what it started from.
        settings: those that decide the weights.
        groups: how many it was trained on.
        metrics: of all its steps.
    """
    facts = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["cpo-pipe", config.objective, *(["lora"] if config.lora is not None else [])],
        base_model=_base_model(init),
    )
    losses = [row["loss"] for row in metrics if "loss" in row]
    attention = own_attention(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    text = _TEXT.format(
        name=name,
        attention="" if attention is None else f', attn_implementation="{attention}"',
        objective=config.objective,
        description=OBJECTIVES.description(config.objective),
        citation=f" {config.citation}." if config.citation else "",
        groups=groups,
        steps=_steps(config, losses),
        loss_at_end=losses[-1],
        dtype=config.dtype,
        settings=fenced(yaml.safe_dump(settings, sort_keys=False), "yaml"),
    )
    (folder / CARD_FILE).write_text(f"---\n{visible(facts.to_yaml())}\n---\n{text}", encoding="utf-8")


def _steps(config: Training, losses: Sequence[float]) -> str:
    early = f" of {config.max_steps}; a monitor of `stop_on` ended it" if len(losses) < config.max_steps else ""
    return f"{len(losses)}{early}"


def _base_model(init: Model | ScratchModel) -> str | None:
    """Return the hub model that the weights come from, also through other trainings; None if it is unknown."""
    if isinstance(init, ScratchModel) or Path(init.name).is_dir():
        return None
    if not (init.path / "manifest.json").exists():
        return init.name
    card = init.path / CARD_FILE
    if not card.exists():  # of a version that wrote none
        return None
    base: str | None = ModelCard.load(card).data.base_model
    return base
