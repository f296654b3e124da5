"""The data card of an export: README.md, as the Hugging Face hub expects it."""

import json
from collections import Counter

from cpo_pipe.data.text import fenced, markdown, visible
from cpo_pipe.pipeline.export.pairs import Pair, PairCounts
from cpo_pipe.pipeline.export.writer import JSON_MESSAGES, PairWriter
from cpo_pipe.pipeline.negatives.config import Negatives

_CARD = """
# {name}: preference pairs

{pairs:,} pairs of {groups:,} prompts, written by cpo-pipe for Contrastive Preference Optimization (Feng et al. 2025,
*Sequence-level Large Language Model Training with Contrastive Preference Optimization*). A `target` is the ground
truth. The others are negatives; but for rejected answers of the data, no human judged that they are worse.

```python
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

pairs = load_dataset("this-folder", split="train")
tokenizer = AutoTokenizer.from_pretrained({tokenizer})
{chat_template}args = DPOConfig(max_length=None)
DPOTrainer("model", args=args, train_dataset=pairs, processing_class=tokenizer).train()
```

{labels}

- `example_id`: identifies the prompt with its ground truth. `similarity`: similarity of the rejected text to the ground
  truth, empty where negatives were not ranked.
- {ends} {endless:,} pairs with a text that does not end (cut at a
  token limit) are omitted: they would teach the model to stop there. {equal:,} pairs whose texts differ only in their
  token ids are omitted, too.
- {prompts}
  {other_ids:,} of {texts:,} texts get other token ids from TRL than they had in cpo-pipe.

The recipe, with the source of prompts and ground truth:

{recipe}

No licence is named: it follows from those of the prompts and the ground truth, and of the models that wrote negatives.
"""

_PLAIN = (
    "Texts have no EOS token; TRL appends it to both.",
    "`prompt` is the text that the model is given, as the recipe's template renders it. TRL tokenizes it together\n"
    "  with the completion.",
)
_CONVERSATIONAL = (
    "Texts have no token that ends them; the tokenizer's chat template writes it.",
    "`prompt` is the prompt before any template, as messages. TRL renders it with the completion by the chat template\n"
    "  of the tokenizer above, and reads `tools` and `chat_template_kwargs` where there are such columns.",
)
CHAT_TEMPLATE = "chat_template.jinja"
"""The file with the chat template that stops at the end of the last turn."""
_SET_TEMPLATE = (
    "# Without what the tokenizer's own template writes after the end of a turn, on which TRL would train:\n"
    f'tokenizer.chat_template = open("this-folder/{CHAT_TEMPLATE}", encoding="utf-8").read()\n'
)
_JSON = "\n  The type `Json` of messages needs `datasets` 4.7 or later."


def data_card(
    name: str,
    recipe: str,
    tokenizer_name: str | None,
    negatives: Negatives,
    writer: PairWriter,
    counts: PairCounts,
    conversational: bool,
    has_chat_template: bool,
) -> str:
    """Return the data card of what a writer has written."""
    from datasets import DatasetInfo, Features, SplitDict
    from huggingface_hub import DatasetCardData

    split = {"name": "train", "num_bytes": writer.num_bytes, "num_examples": writer.rows}
    info = DatasetInfo(
        features=Features.from_arrow_schema(writer.schema),
        splits=SplitDict.from_split_dict([split]),
        download_size=sum(file.stat().st_size for file in writer.files),
        dataset_size=writer.num_bytes,
    )
    facts = DatasetCardData(
        pretty_name=name,
        task_categories=["text-generation"],
        tags=["cpo-pipe", "trl", "dpo", "preference"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
        dataset_info=info._to_yaml_dict(),
    )
    ends, prompts = _CONVERSATIONAL if conversational else _PLAIN
    text = _CARD.format(
        name=name,
        pairs=writer.rows,
        groups=counts.groups,
        labels=_labels(negatives, counts.pairs),
        endless=counts.endless,
        equal=counts.equal,
        texts=counts.texts,
        other_ids=counts.other_ids,
        chat_template=_SET_TEMPLATE if has_chat_template else "",
        tokenizer=json.dumps(tokenizer_name or "model"),
        ends=ends,
        prompts=prompts + (_JSON if writer.schema.field("prompt").type == JSON_MESSAGES else ""),
        recipe=fenced(recipe, "yaml"),
    )
    return f"---\n{visible(facts.to_yaml())}\n---\n{text}"


def _labels(negatives: Negatives, pairs: Counter[Pair]) -> str:
    """Return a table of the labels of pairs, and where the texts of each label are from."""
    origins = {"target": "The ground truth"} | {name: source.origin for name, source in negatives.sources.items()}
    labels = dict.fromkeys(label for pair in pairs for label in pair)
    lines = ["| chosen | rejected | pairs |", "| --- | --- | ---: |"]
    lines += [f"| {' | '.join(map(markdown, pair))} | {count:,} |" for pair, count in sorted(pairs.items())]
    return "\n".join([*lines, "", *(f"- `{label}`: {markdown(origins[label])}" for label in labels)])
