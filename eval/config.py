"""Which systems are compared, on what, and how."""

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cpo_pipe.data.config import Location, Name, Positive, Section, Seed, Share
from cpo_pipe.data.text import listed, nearest
from cpo_pipe.eval.judges.base import JudgeConfig
from cpo_pipe.eval.judges.registry import JUDGES
from cpo_pipe.eval.output_file import OutputColumns
from cpo_pipe.pipeline.engines.base import SamplingDtype
from cpo_pipe.pipeline.engines.registry import AUTO, ENGINES, EngineName

GROUND_TRUTH = "ground-truth"
"""The name of the targets among the systems."""


class Decoding(Section):
    """How a system generates: greedy, by beam search, or sampled by temperature, then top-k, then top-p."""

    beams: Positive = Field(1, description="beams of beam search, by transformers (1: none)")
    top_k: int = Field(0, ge=0, description="sample among the k most probable tokens (0: all)")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="sample among the smallest set of tokens whose total probability reaches p (1: all)",
    )
    temperature: float = Field(
        default_factory=lambda given: 1.0 if given.get("beams", 1) == 1 else 0.0,
        ge=0,
        description="softmax temperature; 0 is greedy (default: 1; with beams 0)",
    )
    samples: int = Field(
        1, gt=0, lt=1 << 16, description="outputs per prompt; the first is evaluated, all of them measure diversity"
    )

    @model_validator(mode="after")
    def _check(self) -> "Decoding":
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples is {self.samples}, but without sampling all would be equal; remove it, or "
                             "set a temperature")  # fmt: skip
        if self.beams > 1:
            for name, off in {"top_k": 0, "top_p": 1, "temperature": 0}.items():
                if (value := getattr(self, name)) != off:
                    raise ValueError(f"{name} is {value:g}, but beams is {self.beams}, and beam search does not "
                                     f"sample; remove {name} or beams")  # fmt: skip
        return self


class System(Section):
    """What evaluation compares: a model, a weight-space ensemble of several, or outputs that exist already."""

    model: Location | None = Field(
        None,
        description="a training's name, a folder or a hub name (of a model or a LoRA adapter), or an API of `apis`",
    )
    merge: dict[Location, float] | None = Field(None, description="weights of an ensemble, by model; they sum to 1")
    file: Location | None = Field(
        None,
        description="a file with an output for each prompt, in AlpacaEval's format or with the columns below; it is "
        "compared under every decoding",
    )
    columns: OutputColumns = Field(default_factory=OutputColumns, description="column mapping of the file")

    @model_validator(mode="after")
    def _check(self) -> "System":
        if [self.model, self.merge, self.file].count(None) != 2:
            raise ValueError("give either model, merge or file")
        if self.file is None and "columns" in self.model_fields_set:
            raise ValueError("columns: not used without file; remove it")
        if self.merge is not None and abs(sum(self.merge.values()) - 1) > 1e-6:
            raise ValueError(f"merge weights sum to {sum(self.merge.values()):g}, not to 1")
        return self


def ensemble_system(ensemble: str, alpha: float) -> str:
    """Return the name of an ensemble's system at α. Names of other systems cannot contain @."""
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
            raise ValueError(f"of names {self.of[0]} twice; an ensemble needs two models")
        times = Counter(ensemble_system("", alpha) for alpha in self.alphas)
        if twice := next((name for name, count in times.items() if count > 1), None):
            raise ValueError(f"alphas has {twice[1:]} twice; remove one")
        return self

    def system(self, alpha: float) -> System:
        """Return the system at α."""
        first, second = self.of
        if alpha in (0, 1):
            return System(model=first if alpha else second)
        return System(merge={first: alpha, second: round(1 - alpha, 12)})  # 1 − 0.9 is the 0.1 that a user writes


DIVERSITY = ("distinct-1", "distinct-2", "distinct-3")
"""Metrics of all outputs together, in which a system is better that is nearer to the ground truth."""


class Headline(Section):
    """The metric and the decoding by which systems are ranked."""

    metric: str = Field(
        description="`JUDGE win rate`, the metric of a judge's scores or chrF (higher is better), or distinct-1, "
        "distinct-2 or distinct-3 (nearer to the ground truth's is better)"
    )
    decoding: Name | None = Field(None, description="name in `decodings` (default: the first)")


def _or_kinds(schema: dict[str, Any]) -> None:
    """Let the JSON Schema of `judges` take a list of kinds, too."""
    mapping = {key: schema.pop(key) for key in ("type", "additionalProperties", "propertyNames") if key in schema}
    schema["anyOf"] = [{"type": "array", "items": {"enum": [*JUDGES]}}, mapping]


class Evaluate(Section):
    """Which systems are compared, on what, and how."""

    systems: dict[Name, System] = Field(description="the models to compare, by name")
    ensembles: dict[Name, Ensemble] = Field(
        default_factory=dict, description="more systems, each merged from two models by a list of weights, by name"
    )
    baseline: str = Field(description=f"the system that the others are compared with; `{GROUND_TRUTH}`: the targets")
    headline: Headline | None = Field(
        None, description="what the report ranks systems by (default: the first judge's win rate, the first decoding)"
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
    judges: dict[Name, Annotated[JudgeConfig, JUDGES]] = Field(
        json_schema_extra=_or_kinds,
        default_factory=lambda: {"similarity": JUDGES.parse({"kind": "similarity"})},
        description="pairwise judges, by name, or a list of kinds for judges without settings: "
        + "; ".join(f"`{name}`: {JUDGES.description(name).rstrip('.')}" for name in JUDGES),
    )
    annotations: Location | None = Field(
        None,
        description="human annotations, a file as for data.source with the columns prompt, output_a, output_b "
        "and winner (a, b or tie); the judges' agreement with them is reported",
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
    engine: EngineName = AUTO
    dtype: SamplingDtype = "auto"
    batch_size: Positive = Field(256, description="prompts per engine call")

    @model_validator(mode="after")
    def _check(self) -> "Evaluate":
        for field in ("systems", "ensembles"):
            if GROUND_TRUTH in getattr(self, field):
                raise ValueError(f"{field}: {GROUND_TRUTH} is the name of the targets; rename it")
        systems = self.all_systems()
        if not systems:
            raise ValueError("systems is empty; name at least one model to evaluate")
        compared = [("compare", name) for pair in self.compare for name in pair]
        for place, name in [("baseline", self.baseline), *compared]:
            if name not in systems and name != GROUND_TRUTH:
                hint = nearest(name, [*systems, GROUND_TRUTH]) or "name one of them"
                raise ValueError(f"{place} {name!r} is not among the systems ({listed(systems)}); {hint}")
        for first, second in self.compare:
            if first in (second, GROUND_TRUTH):
                raise ValueError(f"compare [{first}, {second}]: must be a system and another system or {GROUND_TRUTH}")
            if second == self.baseline:
                raise ValueError(f"compare [{first}, {second}]: {second} is already the baseline; remove the pair")
        return self

    @field_validator("judges", mode="before")
    @classmethod
    def _name_judges(cls, judges: Any) -> Any:
        """Return a list of kinds as a mapping, and the default kind of a judge with the name of one."""
        if isinstance(judges, list):
            if not all(isinstance(kind, str) for kind in judges):
                raise ValueError("a list only names kinds; for settings give a mapping, such as {exact: {pattern: …}}")
            judges = {kind: {"kind": kind} for kind in judges}
        if not isinstance(judges, dict):
            return judges
        return {
            name: {"kind": name, **settings}
            if isinstance(settings, dict) and (name in JUDGES or ("kind" not in settings and nearest(name, JUDGES)))
            else settings
            for name, settings in judges.items()
        }

    @field_validator("judges")
    @classmethod
    def _check_judges(cls, judges: dict[str, JudgeConfig]) -> dict[str, JudgeConfig]:
        """Refuse judges whose scores would be one metric."""
        names: dict[str, str] = {}
        for name, judge in judges.items():
            metric = judge.score_metric(name)
            if metric is not None and (other := names.setdefault(metric.name, name)) != name:
                raise ValueError(f'{other} and {name} have the same metric "{metric.name}"; remove one')
        return judges

    @model_validator(mode="after")
    def _check_decodings(self) -> "Evaluate":
        if self.sample_seed is not None and self.examples is None:
            raise ValueError(f"sample_seed is {self.sample_seed}, but examples is missing; set the number to draw, or "
                             "remove sample_seed")  # fmt: skip
        if self.mauve_model is not None and not self.mauve_seeds:
            raise ValueError(f"mauve_model is {self.mauve_model}, but mauve_seeds is 0, which means no MAUVE; remove "
                             "one of them")  # fmt: skip
        searching = [name for name, decoding in self.decodings.items() if decoding.beams > 1]
        if searching and self.engine != AUTO and not ENGINES[self.engine].beam_search:
            able = listed(name for name in ENGINES if ENGINES[name].beam_search)
            raise ValueError(f"engine is {self.engine}, but decodings.{searching[0]} is beam search, which it does not "
                             f"support; set engine to auto or {able}")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _check_headline(self) -> "Evaluate":
        if self.headline is None:
            return self
        known = [f"{name} win rate" for name in self.judges]
        known += [metric.name for name, judge in self.judges.items() if (metric := judge.score_metric(name))]
        for field, value, choices in (
            ("metric", self.headline.metric, [*known, "chrF", *DIVERSITY]),
            ("decoding", self.headline.decoding, [*self.decodings]),
        ):
            if value is not None and value not in choices:
                hint = nearest(value, choices) or f"choose from {listed(choices)}"
                raise ValueError(f"headline.{field} {value!r}: not measured; {hint}")
        return self

    def ranked_by(self) -> tuple[str, str]:
        """Return the metric and the decoding by which systems are ranked."""
        first = f"{next(iter(self.judges))} win rate" if self.judges else "chrF"
        decoding = next(iter(self.decodings))
        if self.headline is None:
            return first, decoding
        return self.headline.metric, self.headline.decoding or decoding

    def all_systems(self) -> dict[str, System]:
        """Return the systems by name, those of the ensembles last."""
        return self.systems | {
            ensemble_system(name, alpha): ensemble.system(alpha)
            for name, ensemble in self.ensembles.items()
            for alpha in ensemble.alphas
        }


class Published(Section):
    """Published results."""

    source: str = Field(description="the publication")
    metric: str = Field(description="metric that they are compared with, such as `gpt win rate`")
    decoding: str = Field("greedy", description="the decoding of evaluation")
    values: dict[str, float] = Field(min_length=1, description="the values, by system")
