"""The recipe: one YAML file that drives a run. Typed, every key documented, unknown keys refused.

The section models live here, below the stages that use them, because a recipe names all stages and no stage may know
the others.
"""

import difflib
import graphlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from itertools import islice
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from urllib.parse import urlsplit

import regex
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.recipe_yaml import MAX_BYTES, MAX_DEPTH, MAX_VALUES, read_yaml
from cpo_pipe.data.remote_code import kernel_fault

LONGEST_NAME = 100
"""Names are parts of the names of files, which have at most 255 bytes."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=LONGEST_NAME)]
Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Share = Annotated[float, Field(ge=0, le=1)]


def _location(text: str) -> str:
    """Return a path with ~ as the home folder, or a name as it is; refuse what no file can be called."""
    if not text:
        raise ValueError("an empty path means the current folder; name it `.`, or name another")
    text = os.path.expanduser(text)
    parts = os.fsencode(text).split(b"/")
    if "\0" in text or max(map(len, parts)) > 255 or len(os.fsencode(text)) > 4095:
        raise ValueError("not a valid path: a name has at most 255 bytes, a path 4,095, and neither a NUL")
    return text


Location = Annotated[str, AfterValidator(_location)]
"""A file, a folder, a name on the hub, or a name in the recipe."""

GROUND_TRUTH = "ground-truth"
"""The name of the targets themselves among the systems that evaluation compares."""


class Section(BaseModel):
    """What all parts of a recipe share: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Columns(Section):
    """Which column of the source holds what."""

    prompt: str = Field("prompt", description="column with the prompt")
    target: str = Field("target", description="column with the ground-truth continuation")
    context: str | None = Field(None, description="column with extra input, for templates that have a place for it")
    category: str | None = Field(None, description="column with a category, kept for reports")


class TrainedTokenizer(Section):
    """A byte-level BPE tokenizer made from the data."""

    vocab_size: int = Field(gt=256, description="entries in the vocabulary")


class Data(Section):
    """Where the ground-truth pairs come from and how they become token ids."""

    preset: Literal["dolly", "gsm8k", "text", "python-docs"] | None = Field(
        None,
        description="a known data set: its columns, template and split; `text` cuts plain articles; "
        "`python-docs` is the documentation of the running Python",
    )
    source: Location | None = Field(
        None, description="a .jsonl, .csv, .parquet or .txt file, or a Hugging Face data set (name or folder)"
    )
    subset: str | None = Field(None, description="configuration name of a Hugging Face data set")
    source_split: str = Field("train", description="split of a Hugging Face data set to read")
    revision: str | None = Field(None, description="commit or tag of a Hugging Face data set")
    columns: Columns = Field(default_factory=Columns, description="column mapping")
    tokenizer: Location | TrainedTokenizer = Field(
        description="a folder or hub name, or {vocab_size: N} to make one from the data"
    )
    template: str = Field(
        "plain",
        description="`plain` (the prompt as it is), `dolly`, `chat` (the tokenizer's own), or a text with {prompt}",
    )
    max_rows: Positive | None = Field(None, description="rows to read at most (default: all)")
    train: Positive | None = Field(None, description="training examples (default: what is left)")
    validation: int = Field(0, ge=0, description="validation examples")
    test: Positive | None = Field(None, description="test examples (default: what is left)")
    split_seed: Seed = Field(0, description="seed of the split; it orders rows by hash(split_seed, prompt)")
    max_prompt_tokens: Positive = Field(512, description="longest prompt, in tokens; longer rows are rejected")
    max_target_tokens: Positive = Field(512, description="longest target, in tokens; longer rows are rejected")
    piece_tokens: int = Field(512, ge=2, description="`text` and `python-docs`: tokens of one piece, prompt and target")
    prompt_share: Share = Field(
        0.15, description="`text` and `python-docs`: leading share of a piece that is the prompt"
    )
    max_rejected: Share = Field(0.1, description="largest share of rows that may be rejected before it is an error")

    @model_validator(mode="after")
    def _check(self) -> "Data":
        if self.source is None and self.preset in (None, "text"):
            raise ValueError("source is missing: name a file or a Hugging Face data set")
        if self.source is not None and self.preset == "python-docs":
            raise ValueError("source has no meaning for the preset python-docs: leave it out")
        if self.template not in ("plain", "dolly", "chat") and "{prompt}" not in self.template:
            raise ValueError(f"template {self.template!r} is not plain, dolly, chat or a text with {{prompt}}")
        if self.train is None and self.test is None and self.preset != "dolly":
            raise ValueError("train or test must be given: they say where the split is")
        return self


class ScratchModel(Section):
    """A model made on the spot with random weights, of any causal architecture in transformers."""

    architecture: str = Field(description="model type in transformers, such as llama or gpt2")
    config: dict[str, Any] = Field(
        default_factory=dict, description="that architecture's config; the vocabulary and special tokens are filled in"
    )
    seed: Seed = Field(0, description="seed of the random weights")

    @field_validator("config")
    @classmethod
    def _check_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        if fault := kernel_fault(config):
            raise ValueError(fault)
        return config


Objective = Literal["mle", "cpo", "cpo-ranked", "dpo", "slic", "apo-zero", "apo-down", "pss"]
_ON_NEGATIVES = {"mle_weight", "length_normalize", "negatives", "pairs"}
_BY_REWARD = {*_ON_NEGATIVES, "reference", "beta"}
_LEARNT_BY: dict[Objective, set[str]] = {
    "mle": set(),
    "cpo": _BY_REWARD,
    "cpo-ranked": _BY_REWARD,
    "dpo": {*_BY_REWARD, "label_smoothing"},
    "slic": {*_ON_NEGATIVES, "margin"},
    "apo-zero": _BY_REWARD,
    "apo-down": _BY_REWARD,
    "pss": {"sequences", "replace"},
}
"""The settings that an objective has and not all have."""
_OBJECTIVES_OWN = set().union(*_LEARNT_BY.values())


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021), through peft."""

    rank: Positive = Field(16, description="rank of the adapters")
    alpha: Positive = Field(32, description="their output is scaled by alpha / rank")
    targets: Literal["all-linear"] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] = Field(
        "all-linear", description="names of the layers that get one; all-linear: all but the output embedding"
    )


class Curriculum(Section):
    """Groups from easy to hard."""

    by: Literal["strength", "similarity", "margin", "likelihood", "length"] = Field(
        description="what is hard: `strength` (a small gap between the sources of a pair), `similarity` (negatives "
        "near the target), `margin` (negatives as likely to the reference as the target, per token); for mle and pss "
        "`likelihood` (targets unlikely to the initial model, per token), `length` (long targets)"
    )
    order: Literal["staged", "continuous"] = Field(
        "staged", description="`staged`: part by part; `continuous`: from a share of the easiest that grows to all"
    )
    stages: int = Field(2, ge=2, description="staged: parts, of equal size and equally many steps")
    start: float = Field(0.2, gt=0, le=1, description="continuous: the share at the first step")

    @model_validator(mode="after")
    def _check(self) -> "Curriculum":
        idle = "start" if self.order == "staged" else "stages"
        if idle in self.model_fields_set:
            raise ValueError(f"{idle} has no meaning for the order {self.order}: leave it out")
        return self


class Training(Section):
    """One named training. The defaults are the paper's settings."""

    init: Location | ScratchModel = Field(
        description="where it starts: a training's name, a folder, a hub name, or a scratch model"
    )
    objective: Objective = Field(
        description="`mle`; `cpo` (eq. 1, softmax); `cpo-ranked` (eq. 2, Plackett–Luce); on each pair of target and "
        "negative `dpo`, `slic` (hinge on log-probs), `apo-zero`, `apo-down`; `pss` (parallel scheduled sampling)"
    )
    reference: Location | None = Field(
        None, description="the frozen model of all but mle, slic and pss: a training's name, folder or hub name"
    )
    negatives: dict[str, Positive] | None = Field(
        None,
        min_length=1,
        description="negatives per prompt of this training's own groups, by strategy, `pool:NAME` or `instructed:NAME` "
        "(default: all that the section `negatives` asks for)",
    )
    pairs: list[tuple[str, str]] | None = Field(
        None,
        min_length=1,
        description="train on these pairs of each group's candidates instead of on the whole, each [CHOSEN, REJECTED]: "
        "`target`, a strategy, `pool:NAME` or `instructed:NAME`",
    )
    curriculum: Curriculum | None = Field(None, description="easy groups first (default: shuffled)")
    steps: Positive = Field(1000, description="optimizer steps")
    batch_size: Positive = Field(64, description="groups (for mle and pss: examples) per optimizer step")
    lr: float = Field(1e-5, gt=0, description="peak learning rate")
    beta: float = Field(5.0, gt=0, description="β of the reward β·(log π_θ − log π_ref)")
    mle_weight: float = Field(0.0, ge=0, description="weight of the MLE loss beside another objective")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="dpo: the chance that a pair is the wrong way round")
    margin: float = Field(1.0, gt=0, description="slic: δ, by which the target's log-prob is to lead, in nats")
    length_normalize: bool = Field(False, description="mean log-probs over a continuation's tokens instead of sums")
    sequences: Positive = Field(3, description="pss: mixed sequences per target and step")
    replace: float = Field(0.5, ge=0, le=1, description="pss: the chance that a token of these is the policy's own")
    weight_decay: float = Field(0.05, ge=0, description="AdamW's decoupled weight decay")
    decay_biases_and_norms: bool = Field(
        False, description="apply weight_decay to biases and norms, too (transformers' Trainer and TRL do not)"
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay rate")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second decay rate")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's ε")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="learning rate after the warm-up")
    warmup_steps: int = Field(
        0, ge=0, description="steps of linear warm-up from 0, as in transformers: the learning rate of the first is 0"
    )
    max_grad_norm: float | None = Field(None, gt=0, description="clip gradients to this norm (default: no clipping)")
    seed: Seed = Field(0, description="seed of the data order")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="precision of the arithmetic; bfloat16 is autocast, and the weights stay float32"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute each layer twice instead of keeping it for the backward pass; changes no value"
    )
    lora: Lora | None = Field(None, description="train low-rank adapters, merged into the weights at the end")
    held_out: int = Field(
        0,
        ge=0,
        description="groups (for mle and pss: examples) that are not trained on, and measured every eval_every steps",
    )
    eval_every: Positive = Field(
        100,
        description="steps between two measurements of held-out groups and of sampled text's repetition; the first is "
        "before any step, the last after all",
    )
    keep: Literal["last", "best"] = Field(
        "last",
        description="`last`: the weights after the last step; `best`: of all that are measured, the initial ones too, "
        "those with the lowest held-out loss",
    )
    attention: Literal["auto", "cascade", "split", "flex", "dense", "packed", "padded"] = Field(
        "auto",
        description="how a group's shared tokens are computed once (mle: how sequences are packed): auto takes the "
        "first way that a self-check finds exact; does not change the result",
    )
    micro_batch_tokens: Positive = Field(
        8192, description="tokens per forward pass where several groups fit into one; does not change the result"
    )
    logits_mb: Positive = Field(
        1024,
        description="MiB of logits kept between forward and backward pass; more are computed twice; does not change "
        "the result",
    )
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        default_factory=list, description="also log the metrics of each step there, through accelerate"
    )

    @model_validator(mode="after")
    def _check(self) -> "Training":
        for field in sorted(self.without_meaning() & self.model_fields_set):
            if getattr(self, field):
                raise ValueError(f"{field} has no meaning for the objective {self.objective}: leave it out")
        if not self.contrasts:
            if self.attention not in ("auto", "flex", "packed", "padded"):
                raise ValueError(
                    f"attention is {self.attention}, but a group of {self.objective} has nothing to share: leave it out"
                )
        elif self.reference is None and "reference" in _LEARNT_BY[self.objective]:
            raise ValueError(f"reference is missing: {self.objective} needs a frozen reference model")
        self._check_pairs()
        if self.curriculum is not None:
            self._check_curriculum(self.curriculum)
        if self.keep == "best" and not self.held_out:
            raise ValueError("keep is best, but held_out is 0: nothing would tell which weights are the best")
        return self

    def _check_pairs(self) -> None:
        seen: set[tuple[str, str]] = set()
        for chosen, rejected in self.pairs or ():
            shown = f"pairs [{chosen}, {rejected}]"
            if chosen == rejected:
                raise ValueError(f"{shown}: are of one kind, of which none is the better: name two")
            if (chosen, rejected) in seen or (rejected, chosen) in seen:
                raise ValueError(f"{shown}: stands there twice, or also the other way round: leave one out")
            seen.add((chosen, rejected))

    def _check_curriculum(self, curriculum: Curriculum) -> None:
        if (curriculum.by in ("likelihood", "length")) == self.contrasts:
            kinds = "strength, similarity or margin" if self.contrasts else "likelihood or length"
            raise ValueError(f"curriculum.by is {curriculum.by}: for the objective {self.objective} it must be {kinds}")
        if curriculum.order == "staged" and self.steps < curriculum.stages:
            raise ValueError(f"steps is {self.steps}, but curriculum.stages is {curriculum.stages}: the hardest would "
                             "never be trained on; raise steps, or lower stages")  # fmt: skip
        if curriculum.by == "margin" and self.reference is None:
            raise ValueError(
                f"curriculum.by is margin, but {self.objective} has no reference: take strength or similarity"
            )
        if curriculum.by == "likelihood" and not isinstance(self.init, str):
            raise ValueError("curriculum.by is likelihood, but init is a model with random weights: take length")

    @property
    def contrasts(self) -> bool:
        """Whether it learns from groups with negatives, and not from targets alone."""
        return self.objective not in ("mle", "pss")

    @property
    def sees_ranks(self) -> bool:
        """Whether the order of a group's negatives decides its loss; a pair is in order as it is."""
        return self.objective == "cpo-ranked" and self.pairs is None

    def without_meaning(self) -> set[str]:
        """Settings that other objectives have and this one has not."""
        return _OBJECTIVES_OWN - _LEARNT_BY[self.objective]

    def upstream(self) -> list[str]:
        """Names of the models it needs: trainings, folders or hub names."""
        names = [self.init] if isinstance(self.init, str) else []
        return [*names, *([self.reference] if self.reference else [])]


class Api(Section):
    """A model behind an OpenAI-compatible server."""

    url: str = Field(
        description="base URL of the server, such as https://api.openai.com/v1; without a key or password, which stay "
        "in the environment"
    )
    model: str = Field(description="the model's name there")
    revision: str | None = Field(
        None, description="your name for what stands behind that name today; another one makes all of its outputs anew"
    )
    key: str = Field(
        "OPENAI_API_KEY",
        description="environment variable that holds the key, which stays there; a server of your own needs none",
    )
    server: Literal["openai", "vllm"] = Field(
        "openai",
        description="`vllm`: also takes top-k and, as completions, gives and takes token ids; it must then serve a "
        "model with the tokenizer of the examples",
    )
    endpoint: Literal["chat", "completions"] = Field(
        "chat", description="`chat`: the prompt as a user's message; `completions`: as rendered by data.template"
    )
    system: str | None = Field(None, description="system message before the user's; chat only")
    concurrency: Positive = Field(16, description="requests under way at a time")
    timeout: float = Field(120, gt=0, description="seconds that a request may take")
    attempts: Positive = Field(
        6, description="times that a request is sent before it counts as failed; being told to slow down is not counted"
    )
    input_price: float | None = Field(None, ge=0, description="US dollars for a million prompt tokens")
    output_price: float | None = Field(None, ge=0, description="US dollars for a million tokens written")
    max_usd: float | None = Field(
        None, gt=0, description="stop a command before it spends more US dollars here; each command counts anew"
    )
    max_tokens: Positive | None = Field(
        None, description="stop a command before it uses more tokens here, read and written"
    )

    # Errors show neither value, since either may contain a key. The URL is also stored with the artifacts.

    @field_validator("url", mode="before")
    @classmethod
    def _check_url(cls, url: Any) -> Any:
        try:
            parts = urlsplit(url) if isinstance(url, str) else urlsplit("")
            valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:  # such as a [ without its ]
            valid = False
        if not valid:
            raise ValueError("must be a URL that begins with http:// or https://, such as https://api.openai.com/v1")
        if "@" in parts.netloc:
            raise ValueError("contains a user name or password; remove it and set `key` to the environment variable "
                             "that holds the key")  # fmt: skip
        if "?" in url or "#" in url:
            raise ValueError("contains a query string or fragment, in which a key would be stored; give the base URL "
                             "alone and set `key` to the environment variable that holds the key")  # fmt: skip
        return url

    @field_validator("key", mode="before")
    @classmethod
    def _check_key(cls, name: Any) -> Any:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
            raise ValueError("must be the name of an environment variable, in capitals; never the key itself")
        return name

    @model_validator(mode="after")
    def _check(self) -> "Api":
        if self.max_usd is not None and (self.input_price is None or self.output_price is None):
            raise ValueError("max_usd needs input_price and output_price: without them nothing says what a token costs")
        if self.system is not None and self.endpoint != "chat":
            raise ValueError("system has no meaning for the endpoint completions: leave it out")
        return self


class Counts(Section):
    """How many negatives of each strategy a group gets."""

    autoregressive: int = Field(0, ge=0, lt=1 << 16, description="sampled from the model given the prompt (AN)")
    batch: int = Field(0, ge=0, lt=1 << 16, description="targets of other training prompts (BN)")
    meanfield: int = Field(
        0,
        ge=0,
        lt=1 << 16,
        description="the target with some tokens drawn again, given those before (MN)",
    )
    truncation: int = Field(0, ge=0, lt=1 << 16, description="the target cut at a random place, with an end token (TN)")


class PoolColumns(Section):
    """Which column of a pool's file holds what."""

    prompt: str = Field(
        "prompt",
        description="column with the prompt, as data.source has it, or one message of the user; a file with a column "
        "example_id is matched by that",
    )
    context: str | None = Field(None, description="column with the prompt's context, where it is not in the prompt")
    text: str = Field("text", description="column with a continuation, a list of them, or one message of the assistant")


class Pool(Section):
    """Continuations from another model: a file of them, an API, or a model that runs here."""

    model: Location | None = Field(None, description="an API of `apis`, a training's name, a folder or a hub name")
    file: Location | None = Field(
        None,
        description="a .jsonl or .parquet file with continuations that are there already, a .json file with a list, "
        "or a folder of .parquet files, such as `cpo-pipe export` writes",
    )
    columns: PoolColumns = Field(default_factory=PoolColumns, description="column mapping of the file")
    count: int = Field(1, gt=0, lt=1 << 16, description="negatives per prompt")
    strength: float = Field(description="how good this source is; compared with the other pools' only")

    @model_validator(mode="after")
    def _check(self) -> "Pool":
        if (self.model is None) == (self.file is None):
            raise ValueError("give either model or file")
        if self.file is None and "columns" in self.model_fields_set:
            raise ValueError("columns has no meaning without a file: leave it out")
        return self


class Instruction(Section):
    """Continuations that an API model is asked for, given the prompt and the target."""

    model: str = Field(description="an API of `apis`")
    template: str = Field(
        description="`unhelpful` (the paper's, for DPO), `minimal-edit` (the target, made worse by as few changes as "
        "possible; after CLAIR), or a text with {prompt} and {target}"
    )
    count: int = Field(1, gt=0, lt=1 << 16, description="negatives per prompt")

    @model_validator(mode="after")
    def _check(self) -> "Instruction":
        if self.template not in ("unhelpful", "minimal-edit") and "{prompt}" not in self.template:
            raise ValueError(
                f"template {self.template!r} is not unhelpful, minimal-edit or a text with {{prompt}} and {{target}}"
            )
        return self


class Negatives(Section):
    """How negatives are made. The defaults are the paper's settings."""

    model: Location | None = Field(
        None,
        description="the generator of autoregressive and meanfield: a training's name, a folder or a hub name; for "
        "autoregressive also an API of `apis`",
    )
    counts: Counts = Field(
        default_factory=lambda: Counts(autoregressive=11),
        description="negatives per prompt, by strategy; several make a mixture",
    )
    pools: dict[Name, Pool] = Field(default_factory=dict, description="more of them, from other models, by name")
    target_strength: float | None = Field(
        None, description="how good the targets are, as the pools' strength; for a curriculum by strength"
    )
    instructed: dict[Name, Instruction] = Field(
        default_factory=dict, description="more of them, that an API model is asked for, by name"
    )
    hardest: int = Field(
        0,
        ge=0,
        description="batch: take the targets nearest to the own one by embedding, of this many drawn (0: as drawn)",
    )
    embedder: Location = Field("minilm", description="sentence-transformers model of `hardest`")
    meanfield_share: float = Field(0.15, gt=0, le=1, description="meanfield: share of the target's tokens drawn again")
    top_k: int = Field(50, ge=0, description="sample among the k likeliest tokens (0: all)")
    temperature: float = Field(1.0, gt=0, description="softmax temperature")
    max_new_tokens: Positive | None = Field(
        None, description="longest negative, in tokens (default: data.max_target_tokens)"
    )
    seed: Seed = Field(0, description="seed of all samples")
    engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="`auto`: vllm where it is installed and supports the model"
    )
    batch_size: Positive = Field(256, description="prompts per engine call; does not change the distribution")
    max_examples: Positive | None = Field(
        None, description="make groups for the first N training examples only (default: all)"
    )

    @model_validator(mode="after")
    def _check(self) -> "Negatives":
        counts = self.counts
        if not any(counts.model_dump().values()) and not self.pools and not self.instructed:
            raise ValueError("counts are all 0: ask for at least 1 negative a prompt")
        if self.hardest and not counts.batch:
            raise ValueError(f"hardest is {self.hardest}, but counts.batch is 0: leave one out, or give the other")
        if self.hardest and self.hardest < counts.batch:
            raise ValueError(f"hardest is {self.hardest}, too few to take counts.batch: {counts.batch} of: raise it")
        if self.model is None and (counts.autoregressive or counts.meanfield):
            hint = "; or set counts: {} to take from pools and instructed only" if self.pools or self.instructed else ""
            raise ValueError(f"model is missing: autoregressive and meanfield negatives come from one{hint}")
        return self

    def labels(self) -> list[str]:
        """What a group's candidates are of, as the GROUPS schema calls it."""
        strategies = [name for name, count in self.counts.model_dump().items() if count]
        return ["target", *strategies, *(f"pool:{name}" for name in self.pools),
                *(f"instructed:{name}" for name in self.instructed)]  # fmt: skip

    def only(self, wanted: Mapping[str, int]) -> "Negatives":
        """The same with so many negatives of each label per prompt, and no others.

        What only negatives that are left out have a meaning for is left out, too.
        """
        named = {kind: {label.partition(":")[2]: count for label, count in wanted.items() if label.startswith(kind)}
                 for kind in ("pool:", "instructed:")}  # fmt: skip
        counts = {label: count for label, count in wanted.items() if ":" not in label}
        return self.model_copy(
            update={
                "counts": Counts.model_construct(None, **{name: counts.get(name, 0) for name in Counts.model_fields}),
                "hardest": self.hardest if "batch" in counts else 0,
                "pools": {name: self.pools[name].model_copy(update={"count": count})
                          for name, count in named["pool:"].items()},
                "instructed": {name: self.instructed[name].model_copy(update={"count": count})
                               for name, count in named["instructed:"].items()},
            }
        )  # fmt: skip

    def strengths(self) -> dict[str, float]:
        """How good what is of a label is, where the recipe says so."""
        targets = {"target": self.target_strength} if self.target_strength is not None else {}
        return targets | {f"pool:{name}": pool.strength for name, pool in self.pools.items()}

    def upstream(self) -> list[str]:
        """Names of the models it needs: trainings, APIs, folders or hub names."""
        sampled = self.counts.autoregressive or self.counts.meanfield
        models = [self.model if sampled else None, *(pool.model for pool in self.pools.values())]
        return [name for name in models if name is not None]


class Rank(Section):
    """How negatives are put in order, and which are dropped."""

    model: Location = Field(
        "minilm", description="sentence-transformers model: `minilm` (packaged, offline), a folder or a hub name"
    )
    drop_duplicates: bool = Field(
        True, description="drop negatives equal to the target or to each other, after tokenization"
    )
    batch_size: Positive = Field(64, description="groups embedded at a time; does not change the order")


JudgeKind = Literal["exact", "similarity", "longer", "likelihood", "openai", "local"]
_JUDGED_BY: dict[JudgeKind, tuple[str, ...]] = {
    "exact": ("pattern",),
    "similarity": (),
    "longer": (),
    "likelihood": ("model",),
    "openai": ("api", "template", "both_orders", "max_tokens", "temperature"),
    "local": ("model", "template", "both_orders", "engine"),
}
"""The settings that each kind of judge has."""


class Judge(Section):
    """Something that says which of two outputs for one prompt is the better."""

    kind: JudgeKind = Field(
        description="`exact` (the target's answer), `similarity` (nearer to the target), `longer` (more characters), "
        "`likelihood` (likelier under a model), `openai` (an API is asked), `local` (a model here is asked) (default: "
        "the judge's name)"
    )
    pattern: str | None = Field(
        None,
        max_length=1000,
        description="exact: regular expression whose first group is the answer, numbers by value (default: whole text)",
    )
    model: Location | None = Field(
        None, description="likelihood, local: a training's name, a folder or a hub name; it has a tokenizer of its own"
    )
    api: str | None = Field(None, description="openai: an API of `apis`")
    template: str = Field(
        "strict",
        description="openai, local: what is asked; `dolly` and `wiki` (the paper's), `strict` (ours), or a text with "
        "{prompt}, {output_a} and {output_b}",
    )
    both_orders: bool = Field(
        True, description="openai, local: ask twice, with each output first; else the order is as good as by chance"
    )
    max_tokens: Positive = Field(
        16, description="openai: the longest answer, in tokens; a model that thinks before it answers needs thousands"
    )
    temperature: float | None = Field(
        0.0, ge=0, description="openai: softmax temperature; null: none is sent, for models that refuse any"
    )
    engine: Literal["auto", "vllm", "transformers"] = Field("auto", description="local: as in negatives")

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, pattern: str | None) -> str | None:
        try:
            groups = regex.compile(pattern).groups if pattern is not None else 1
        except (regex.error, RecursionError) as error:  # the latter: groups within hundreds of groups
            raise ValueError(f"{pattern!r} is not a regular expression ({error})") from error
        if not groups:
            raise ValueError(
                f"{pattern!r} has no group, and its first group is the answer; put the answer's part in parentheses"
            )
        return pattern

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str) -> str:
        places = ("{prompt}", "{output_a}", "{output_b}")
        if template not in ("dolly", "wiki", "strict") and not all(place in template for place in places):
            raise ValueError(f"{template!r} is not dolly, wiki, strict or a text with {', '.join(places)}")
        return template

    @model_validator(mode="after")
    def _check(self) -> "Judge":
        known = _JUDGED_BY[self.kind]
        for field in sorted(self.model_fields_set - {"kind", *known}):
            raise ValueError(f"{field} has no meaning for the kind {self.kind}: leave it out")
        for field in ("model", "api"):
            if field in known and getattr(self, field) is None:
                raise ValueError(f"{field} is missing: the kind {self.kind} needs one")
        return self


class Decoding(Section):
    """How a system writes: greedy, by beam search, or sampled by temperature, then top-k, then top-p."""

    beams: Positive = Field(1, description="beams of beam search, as transformers does it (1: none)")
    top_k: int = Field(0, ge=0, description="sample among the k likeliest tokens (0: all)")
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample among the fewest tokens whose probability together reaches p (1: all)"
    )
    temperature: float = Field(
        default_factory=lambda given: 1.0 if given.get("beams", 1) == 1 else 0.0,
        ge=0,
        description="softmax temperature; 0 is greedy (default: 1; with beams 0)",
    )
    samples: int = Field(
        1, gt=0, lt=1 << 16, description="outputs per prompt: all but the first only show how various they are"
    )

    @model_validator(mode="after")
    def _check(self) -> "Decoding":
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples is {self.samples}, but nothing is drawn here, so all would be alike: leave it "
                             "out, or set a temperature")  # fmt: skip
        if self.beams > 1:
            for name, off in {"top_k": 0, "top_p": 1, "temperature": 0}.items():
                if (value := getattr(self, name)) != off:
                    raise ValueError(f"{name} is {value:g}, but beams is {self.beams}: beam search draws nothing; "
                                     f"leave out {name}, or beams")  # fmt: skip
        return self


class System(Section):
    """A model that evaluation compares: one model, or a weight-space ensemble of several."""

    model: Location | None = Field(
        None,
        description="a training's name, a folder or a hub name (of a model or a LoRA adapter), or an API of `apis`",
    )
    merge: dict[Location, float] | None = Field(None, description="weights of an ensemble, by model; they sum to 1")

    @model_validator(mode="after")
    def _check(self) -> "System":
        if (self.model is None) == (self.merge is None):
            raise ValueError("give either model or merge")
        if self.merge is not None and abs(sum(self.merge.values()) - 1) > 1e-6:
            raise ValueError(f"merge weights sum to {sum(self.merge.values()):g}, not to 1")
        return self


def ensemble_system(ensemble: str, alpha: float) -> str:
    """The name of the system that an ensemble is at α; no system of the user's can have it."""
    return f"{ensemble}@{alpha:g}"


class Ensemble(Section):
    """Two models merged by weight, θ = α θ_first + (1 − α) θ_second (Feng et al. 2025, §4): a system for each α."""

    of: list[Location] = Field(
        min_length=2, max_length=2, description="the two models, each a training's name, a folder or a hub name"
    )
    alphas: list[Share] = Field(
        min_length=1,
        description="weights α of the first; each makes a system NAME@α, which at 0 and 1 is one of the models itself",
    )

    @model_validator(mode="after")
    def _check(self) -> "Ensemble":
        if self.of[0] == self.of[1]:
            raise ValueError(f"of names {self.of[0]} twice: an ensemble needs two models")
        times = Counter(ensemble_system("", alpha) for alpha in self.alphas)
        if twice := next((name for name, count in times.items() if count > 1), None):
            raise ValueError(f"alphas has {twice[1:]} twice: leave one out")
        return self

    def system(self, alpha: float) -> System:
        """What it is at α."""
        first, second = self.of
        if alpha in (0, 1):
            return System(model=first if alpha else second)
        return System(merge={first: alpha, second: round(1 - alpha, 12)})  # 1 − 0.9 is the 0.1 that a user writes


class Evaluate(Section):
    """Which systems are compared, on what, and how."""

    systems: dict[Name, System] = Field(description="the models to compare, by name")
    ensembles: dict[Name, Ensemble] = Field(
        default_factory=dict, description="more of them, merged from two models by a list of weights, by name"
    )
    baseline: str = Field(
        description=f"the system that the others are compared with; `{GROUND_TRUTH}`: the targets themselves"
    )
    compare: list[tuple[str, str]] = Field(
        default_factory=list, description="more comparisons, each [SYSTEM, SYSTEM], of the first against the second"
    )
    split: Literal["validation", "test"] = Field("test", description="held-out split to evaluate on")
    examples: Positive | None = Field(None, description="evaluate on N examples of the split (default: all)")
    sample_seed: Seed | None = Field(None, description="draw the N examples by this seed (default: the first N)")
    decodings: dict[Name, Decoding] = Field(
        default_factory=lambda: {"greedy": Decoding(temperature=0)},
        min_length=1,
        description="decoding configurations, by name",
    )
    max_new_tokens: Positive | None = Field(
        None, description="longest output, in tokens (default: data.max_target_tokens)"
    )
    judges: dict[Name, Judge] = Field(
        default_factory=lambda: {"similarity": Judge(kind="similarity")},
        description="pairwise judges, by name; a list of kinds is short for those without settings",
    )
    labels: Location | None = Field(
        None,
        description="a .jsonl, .csv or .parquet file of what people prefer, with the columns prompt, output_a, "
        "output_b and winner (a, b or tie); how far judges agree with them is reported",
    )
    embedder: Location = Field("minilm", description="sentence-transformers model of the similarity judge and of MAUVE")
    mauve_seeds: int = Field(3, ge=0, description="k-means seeds that MAUVE is averaged over (0: no MAUVE)")
    mauve_model: Location | None = Field(
        None,
        description="causal model whose last hidden states MAUVE is measured on, as in its paper: a training's name, a "
        "folder or a hub name, with a tokenizer of its own (default: the embedder's vectors)",
    )
    bootstrap: Positive = Field(2000, description="resamples of the bootstrap intervals")
    seed: Seed = Field(0, description="seed of sampling and of the bootstrap")
    engine: Literal["auto", "vllm", "transformers"] = Field("auto", description="as in negatives")
    batch_size: Positive = Field(256, description="prompts per engine call")

    @model_validator(mode="after")
    def _check(self) -> "Evaluate":
        for field in ("systems", "ensembles"):
            if GROUND_TRUTH in getattr(self, field):
                raise ValueError(f"{field}: the name {GROUND_TRUTH} is taken by the targets themselves")
        systems = self.all_systems()
        if not systems:
            raise ValueError("systems is empty: name at least one model to evaluate")
        compared = [("compare", name) for pair in self.compare for name in pair]
        for place, name in [("baseline", self.baseline), *compared]:
            if name not in systems and name != GROUND_TRUTH:
                hint = nearest(name, [*systems, GROUND_TRUTH]) or "name one of them"
                raise ValueError(f"{place} {name!r} is not among the systems ({listed(systems)}); {hint}")
        for first, second in self.compare:
            if first in (second, GROUND_TRUTH):
                raise ValueError(f"compare [{first}, {second}]: must be a system, and another one or {GROUND_TRUTH}")
            if second == self.baseline:
                raise ValueError(f"compare [{first}, {second}]: {second} is the baseline of all already: leave it out")
        return self

    @field_validator("judges", mode="before")
    @classmethod
    def _name_judges(cls, judges: Any) -> Any:
        """A list of kinds as a mapping; the kind of a judge that is called like one."""
        if isinstance(judges, list):
            if not all(isinstance(kind, str) for kind in judges):
                raise ValueError("a list names kinds only: for settings give a mapping, such as {exact: {pattern: …}}")
            judges = {kind: {"kind": kind} for kind in judges}
        if not isinstance(judges, dict):
            return judges
        kinds = get_args(JudgeKind)
        return {
            name: {"kind": name, **settings} if isinstance(settings, dict) and name in kinds else settings
            for name, settings in judges.items()
        }

    @field_validator("judges")
    @classmethod
    def _check_judges(cls, judges: dict[str, Judge]) -> dict[str, Judge]:
        """Of `similarity` there is one: it has no settings, and its score is one metric whatever it is called."""
        if len(alike := [name for name, judge in judges.items() if judge.kind == "similarity"]) > 1:
            raise ValueError(f"{alike[0]} and {alike[1]} are both of the kind similarity, which has no settings: "
                             "leave one out")  # fmt: skip
        return judges

    @model_validator(mode="after")
    def _check_decodings(self) -> "Evaluate":
        if self.sample_seed is not None and self.examples is None:
            raise ValueError(f"sample_seed is {self.sample_seed}, but examples is not given: say how many to draw, or "
                             "leave out sample_seed")  # fmt: skip
        if self.mauve_model is not None and not self.mauve_seeds:
            raise ValueError(f"mauve_model is {self.mauve_model}, but mauve_seeds is 0, which means no MAUVE: leave "
                             "out one of them")  # fmt: skip
        searching = [name for name, decoding in self.decodings.items() if decoding.beams > 1]
        if searching and self.engine == "vllm":
            raise ValueError(f"engine is vllm, but decodings.{searching[0]} is beam search, which is that of "
                             "transformers: set engine to auto or transformers")  # fmt: skip
        return self

    def all_systems(self) -> dict[str, System]:
        """The systems by name, those of the ensembles last."""
        return self.systems | {
            ensemble_system(name, alpha): ensemble.system(alpha)
            for name, ensemble in self.ensembles.items()
            for alpha in ensemble.alphas
        }


class Published(Section):
    """Figures of a publication."""

    source: str = Field(description="where they stand")
    metric: str = Field(description="the metric of evaluation that they are compared with, such as `gpt win rate`")
    decoding: str = Field("greedy", description="the decoding of evaluation")
    values: dict[str, float] = Field(min_length=1, description="the figures, by system")


class Recipe(Section):
    """A whole run."""

    name: Name = Field("recipe", description="names the run's folder (default: the file's name)")
    note: str | None = Field(None, description="what else there is to know of it; the report has it, too")
    data: Data = Field(description="ground-truth pairs")
    apis: dict[Name, Api] = Field(default_factory=dict, description="models behind OpenAI-compatible servers, by name")
    train: dict[Name, Training] = Field(description="named trainings")
    negatives: Negatives | None = Field(None, description="synthetic negatives")
    rank: Rank | Literal["none"] = Field(default_factory=Rank, description="order of the negatives, or `none`")
    rounds: int = Field(
        1,
        gt=0,
        le=100,
        description="rounds of self-play: each training on negatives is repeated, `cpo` as `cpo@2` and so on, from the "
        "model of the round before, which is its reference and the generator of its negatives, too",
    )
    evaluate: Evaluate | None = Field(None, description="comparison of the results")
    published: list[Published] = Field(
        default_factory=list, description="figures that others published, shown beside those of the run"
    )
    scales: dict[Name, dict[str, Any]] = Field(
        default_factory=dict,
        description="smaller versions of the run, by name, for `--scale NAME`: keys as for `--set`, with their values; "
        "a * stands for every name",
    )

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if twice := sorted(self.apis.keys() & self.train.keys()):
            raise ValueError(f"apis: {twice[0]} is also the name of a training; call one of them otherwise")
        if self.negatives is not None:
            self._check_apis(self.negatives)
        for name, judge in self.evaluate.judges.items() if self.evaluate is not None else ():
            if judge.api is not None:
                self._check_api(f"evaluate.judges.{name}.api", judge.api)
        self._check_local()
        for name, training in self.train.items():
            self._check_sources(name, training)
            if training.contrasts and self.negatives is None:
                raise ValueError(f"negatives is missing: train.{name} has the objective {training.objective}")
            if training.sees_ranks and self.rank == "none":
                raise ValueError(f"rank is none, but train.{name} has the objective cpo-ranked: use cpo, or rank")
        self.training_order()
        self._check_rounds()
        return self

    def _check_rounds(self) -> None:
        """Refuse rounds of nothing, and models that are called like a round that there is not."""
        if self.rounds > 1 and not any(training.contrasts for training in self.train.values()):
            raise ValueError(f"rounds is {self.rounds}, but no training learns from negatives: leave it out")
        named = self._local_models()
        if self.negatives is not None:
            named["negatives"] = self.negatives.upstream()
        if self.evaluate is not None:
            named |= {f"evaluate.systems.{name}": [system.model]
                      for name, system in self.evaluate.systems.items() if system.model is not None}  # fmt: skip
        trainings = self.trainings()
        for place, model in ((place, model) for place, models in named.items() for model in models):
            base, separator, number = model.rpartition("@")
            if separator and number.isdecimal() and base in self.train and model not in trainings:
                there = [name for name in trainings if name.partition("@")[0] == base]
                raise ValueError(
                    f"{place} names {model}, but rounds is {self.rounds} and of the training {base} there is "
                    f"{listed(there)}: name what there is, or raise rounds"
                )

    def _check_sources(self, name: str, training: Training) -> None:
        """Refuse negatives and pairs of what there is not, and a curriculum by what nobody measured."""
        if self.negatives is not None and training.contrasts:
            self._check_own_negatives(name, training, self.negatives)
        if training.pairs and self.negatives is not None:
            known = (self.negatives_of(name) or self.negatives).labels()
            for label in (label for pair in training.pairs for label in pair):
                if label not in known:
                    hint = nearest(label, known) or f"there are {listed(known)}"
                    raise ValueError(f"train.{name}.pairs: no candidate is of {label!r}; {hint}")
        by = training.curriculum.by if training.curriculum is not None else None
        if by == "similarity" and self.rank == "none":
            raise ValueError(f"rank is none, but train.{name}.curriculum.by is similarity: rank, or take another")
        if by == "strength":
            strengths = self.strengths_of(name)
            if unknown := [label for label in self._compared(name) if label not in strengths]:
                raise ValueError(
                    f"train.{name}.curriculum.by is strength, but none is known of {unknown[0]}: give "
                    "negatives.target_strength for the target; of the others only pools have one"
                )

    def _check_own_negatives(self, name: str, training: Training, negatives: Negatives) -> None:
        known = [*Counts.model_fields, *(label for label in negatives.labels() if ":" in label)]
        for label in training.negatives or ():
            if label not in known:
                hint = nearest(label, known) or f"there are {listed(known)}"
                raise ValueError(f"train.{name}.negatives: {label!r} is none; {hint}")
        if training.negatives is None:
            return
        try:
            chosen = negatives.only(training.negatives)
            chosen = Negatives.model_validate(chosen.model_dump(exclude_unset=True))
            self._check_apis(chosen)
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in detail["loc"])
            message = detail["msg"].removeprefix("Value error, ")
            raise ValueError(f"train.{name}.negatives: {where}{': ' if where else ''}{message}") from error
        except ValueError as error:
            raise ValueError(f"train.{name}.negatives: {error}") from error

    def _check_local(self) -> None:
        """Refuse APIs where weights are needed, before any of them is paid."""
        for place, models in self._local_models().items():
            for model in models:
                if model in self.apis:
                    raise ValueError(
                        f"{place} names {model}, which is an API: only a model with its weights here will do"
                    )

    def _local_models(self) -> dict[str, list[str]]:
        """Names of the models whose weights are needed, by where the recipe names them."""
        needed = {f"train.{name}": training.upstream() for name, training in self.train.items()}
        if self.evaluate is not None:
            needed |= {f"evaluate.systems.{name}": [*(system.merge or ())]
                       for name, system in self.evaluate.systems.items()}  # fmt: skip
            needed |= {f"evaluate.ensembles.{name}": ensemble.of for name, ensemble in self.evaluate.ensembles.items()}
            needed |= {f"evaluate.judges.{name}": [judge.model]
                       for name, judge in self.evaluate.judges.items() if judge.model is not None}  # fmt: skip
            needed["evaluate.mauve_model"] = [self.evaluate.mauve_model] if self.evaluate.mauve_model else []
        return needed

    def _check_apis(self, negatives: Negatives) -> None:
        if negatives.model in self.apis and negatives.counts.meanfield:
            raise ValueError(
                f"negatives.model {negatives.model} is an API, which gives no distributions: set counts.meanfield to 0"
            )
        for name, instruction in negatives.instructed.items():
            model = instruction.model
            self._check_api(f"negatives.instructed.{name}.model", model)
            if self.apis[model].endpoint != "chat":
                raise ValueError(f"negatives.instructed.{name}.model {model} must be an API with the endpoint chat")

    def _check_api(self, place: str, name: str) -> None:
        if name not in self.apis:
            hint = nearest(name, self.apis) or f"there are {listed(self.apis)}"
            raise ValueError(f"{place} {name!r} is not among `apis`; {hint}")

    def trainings(self) -> dict[str, Training]:
        """The trainings by name, the later rounds last.

        Round 2 of `cpo` is `cpo@2`: no name in `train` has an @, and α in an ensemble's NAME@α is at most 1.
        """
        trainings = dict(self.train)
        for number in range(2, self.rounds + 1):
            for name, training in self.train.items():
                if training.contrasts:
                    before = name if number == 2 else f"{name}@{number - 1}"
                    frozen = {"reference": before} if training.reference is not None else {}
                    trainings[f"{name}@{number}"] = training.model_copy(update={"init": before, **frozen})
        return trainings

    def strengths_of(self, name: str) -> dict[str, float]:
        """How good what a training compares is, by label, where the recipe says so."""
        negatives = self.negatives_of(name)
        known = negatives.strengths() if negatives is not None else {}
        return {label: known[label] for label in self._compared(name) if label in known}

    def _compared(self, name: str) -> list[str]:
        """The labels of what a training learns from: those of its pairs, or else all of its groups'."""
        training = self._training(name)
        if training.pairs is not None:
            return list(dict.fromkeys(label for pair in training.pairs for label in pair))
        negatives = self._negatives_of(name, training)
        return negatives.labels() if negatives is not None else []

    def negatives_of(self, name: str) -> Negatives | None:
        """The negatives that a training learns from: its own choice, in a later round made by the round before."""
        return self._negatives_of(name, self._training(name))

    def _training(self, name: str) -> Training:
        return self.train[name] if name in self.train else self.trainings()[name]

    def _negatives_of(self, name: str, training: Training) -> Negatives | None:
        if self.negatives is None:
            return None
        chosen = self.negatives if training.negatives is None else self.negatives.only(training.negatives)
        return chosen if name in self.train else chosen.model_copy(update={"model": training.init})

    def training_order(self) -> list[str]:
        """Names of the trainings, each after those it needs; of all rounds."""
        trainings = self.trainings()
        graph = {
            name: [model for model in self._models_before(name, training) if model in trainings]
            for name, training in trainings.items()
        }
        try:
            return list(graphlib.TopologicalSorter(graph).static_order())
        except graphlib.CycleError as error:
            raise ValueError(f"train has a cycle: {' needs '.join(reversed(error.args[1]))}") from error

    def _models_before(self, name: str, training: Training) -> list[str]:
        negatives = self._negatives_of(name, training) if training.contrasts else None
        return training.upstream() + (negatives.upstream() if negatives is not None else [])


def builtin_recipes() -> dict[str, Path]:
    """The packaged recipes, by name."""
    folder = Path(str(files("cpo_pipe.pipeline"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(source: str, overrides: list[str] | None = None, scale: str | None = None) -> Recipe:
    """Read a recipe from a path or a built-in name, at one of its scales, with `section.key=value` overrides applied.

    Raises:
        InputError: the file is missing, is not YAML, or breaks a rule; the message is one line.
    """
    builtin = builtin_recipes()
    path = Path(os.path.expanduser(source))
    try:
        if not path.is_file() and source in builtin:
            path = builtin[source]
        if not path.is_file():
            near = nearest(source, builtin, "the built-in ")
            hint = near or f"built-in recipes: {', '.join(builtin)}"
            raise InputError(f"recipe {source}: no such file; {hint}")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"recipe {source}: has {path.stat().st_size:,} bytes; at most {MAX_BYTES:,} are read")
        content = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"recipe {source}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"recipe {source}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except ValueError as error:
        raise InputError(f"recipe {source}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(
            f"recipe {source}: is {_shown(content)}: must be a mapping with the sections "
            f"{', '.join(Recipe.model_fields)}"
        )
    content = _copied(content)
    content.setdefault("name", path.stem)
    if scale is not None:
        _scale(content, scale, source)
    for override in overrides or []:
        _override(content, override)
    return parse_recipe(content, source)


def parse_recipe(content: dict[str, Any], source: str) -> Recipe:
    """Validate a recipe's content; `source` is only named in messages.

    Raises:
        InputError: a rule is broken; the message names the field, its value, the rule and the fix.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(f"recipe {source}: {_explain(error)}") from error


def nearest(name: str, known: Iterable[str], kind: str = "") -> str:
    """`did you mean X?` for the known name that is most like this one; empty where none is."""
    if len(name) > LONGEST_NAME:  # the comparison takes time that grows with the square of the lengths
        return ""
    near = difflib.get_close_matches(name, [other for other in known if len(other) <= LONGEST_NAME], n=1)
    return f"did you mean {kind}{near[0]}?" if near else ""


def _scale(content: dict[str, Any], scale: str, source: str) -> None:
    """Put what a scale of the recipe names in its place, and the scale's name behind the recipe's."""
    scales = content.get("scales")
    scales = scales if isinstance(scales, dict) else {}
    if not isinstance(scales.get(scale), dict):
        hint = nearest(scale, scales) or f"there are {listed(scales)}"
        raise InputError(f"--scale {_cut(scale)}: the recipe {source} has no such scale; {hint}")
    written = 0
    for pattern, value in list(scales[scale].items()):
        where = f"recipe {source}: scales.{scale}.{_cut(pattern)}"
        for path in _matching(content, _keys(pattern, where)):
            written += _values(value)
            if written > MAX_VALUES:
                raise InputError(f"{where}: the scale writes more than {MAX_VALUES:,} values; write fewer")
            _put(content, path, value, where)
    content["name"] = f"{content['name']}-{scale}"


def _keys(path: str, where: str) -> list[str]:
    keys = path.split(".")
    if len(keys) > MAX_DEPTH:
        raise InputError(f"{where}: nested more than {MAX_DEPTH} levels deep")
    return keys


def _matching(node: Any, pattern: Sequence[str]) -> list[list[str]]:
    """The paths that a path with * means."""
    if not pattern:
        return [[]]
    first, rest = pattern[0], pattern[1:]
    keys = [first]
    if first == "*":
        keys = list(node) if isinstance(node, dict) else []
    below = {key: node.get(key) if isinstance(node, dict) else None for key in keys}
    return [[key, *path] for key in keys for path in _matching(below[key], rest)]


def _override(content: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    where = f"--set {_cut(override)}"
    if not separator or not path:
        raise InputError(f"{where}: must be section.key=value")
    try:
        value = read_yaml(text)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error
    where = f"--set {_cut(path)}"  # without the value, which may be a secret that belongs elsewhere
    _put(content, _keys(path, where), value, where)


def _values(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + sum(1 + _values(item) for item in value.values())
    return 1 + sum(map(_values, value)) if isinstance(value, list) else 1


def _copied(value: Any) -> Any:
    """A copy in which nothing is shared: what a YAML anchor or a * puts in several places is changed in one."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _put(content: dict[str, Any], path: Sequence[str], value: Any, where: str) -> None:
    """Set a key to a copy of a value; `where` is who asks for it, for messages."""
    *parents, last = path
    node: Any = content
    for depth, key in enumerate(parents):
        if isinstance(node, dict) and node and key not in node and _names_are_free(parents[:depth]):
            above = _dotted(parents[:depth])
            hint = nearest(key, node) or f"there are {listed(node)}"
            raise InputError(f"{where}: {_cut(key)} is not in {above}; {hint}")
        node = node.setdefault(key, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise InputError(f"{where}: {_dotted(parents)} is not a section")
    node[last] = _copied(value)


def _names_are_free(path: Sequence[str]) -> bool:
    """Whether a path leads to a mapping whose keys are the user's own, such as `train`."""
    return get_origin(_follow(path)[1]) is dict


_NOT_A_SECTION = ("model_type", "dict_type")


def _explain(error: ValidationError) -> str:
    """The first broken rule, as one line."""
    # An unknown key explains what is missing beside it. Else, of a union's branches the one that was followed
    # furthest is the one that was meant.
    details = error.errors(include_url=False)
    not_sections = [_follow(detail["loc"])[0] for detail in details if detail["type"] in _NOT_A_SECTION]
    detail = max(
        details,
        key=lambda detail: (
            detail["type"] == "extra_forbidden", len(detail["loc"]), detail["type"] not in _NOT_A_SECTION
        ),
    )  # fmt: skip
    path, _ = _follow(detail["loc"])
    where = _dotted(path)
    if detail["type"] == "extra_forbidden":
        known = list(_follow(detail["loc"][:-1])[1].model_fields)
        hint = nearest(path[-1], known) or f"known are {', '.join(known)}"
        return f"{where} is not a known key; {hint}"
    if detail["type"] == "missing":
        return f"{where} is missing"
    if detail["type"] in _NOT_A_SECTION:
        return f"{where} is {_shown(detail['input'])}: must be a section, that is keys with values"
    message = _cut(detail["msg"].removeprefix("Value error, "), 1000)
    if detail["type"] == "value_error":
        return f"{where}: {message}" if where else message
    other = " or a section" if path in not_sections else ""
    return f"{where} is {_shown(detail['input'])}: {message[0].lower()}{message[1:]}{other}"


def _shown(value: Any) -> str:
    return "empty" if value is None else _cut(repr(value))


def _cut(text: str, length: int = 80) -> str:
    """Return the start of a text, on one line."""
    text = " ".join(text.splitlines())
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _dotted(path: Sequence[str]) -> str:
    return ".".join(map(_cut, path))


def listed(names: Iterable[str]) -> str:
    """Return the first names, for messages."""
    first = [_cut(name) for name in islice(names, 21)]
    return ", ".join(first[:20] + ["…"] * (len(first) > 20)) or "none"


def _follow(location: Sequence[int | str]) -> tuple[list[str], Any]:
    """What a location in pydantic's sense leads to: the path as the user wrote it, and the type there.

    Pydantic puts the branch of a union (a class name, `str`, `literal[...]`) into a location.
    """
    path: list[str] = []
    kind: Any = Recipe
    for part in map(str, location):
        branches = _branches(kind)
        if len(branches) > 1:
            kind = next((branch for branch in branches if getattr(branch, "__name__", "") == part), None)
            continue
        if part != "[key]":
            path.append(part)
        kind = branches[0]
        if isinstance(kind, type) and issubclass(kind, Section):
            field = kind.model_fields.get(part)
            kind = field.annotation if field else None
        else:
            kind = next(reversed(get_args(kind)), None)  # of a mapping or a list: what is in it
    branches = _branches(kind)
    return path, branches[0] if len(branches) == 1 else kind


def _branches(kind: Any) -> list[Any]:
    """The members of a union but for None; a type that is no union is its only branch."""
    if get_origin(kind) in (Union, UnionType):
        return [branch for branch in get_args(kind) if branch is not NoneType]
    return [kind]
