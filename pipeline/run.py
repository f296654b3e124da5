"""A run: one recipe on one store. Resolves the recipe's names to artifacts and calls the stages in order.

Beside the command line the only module that knows all stages. Nothing heavy is imported until there is work.
"""

import json
import logging
import math
import platform
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from cpo_pipe.data import atomic, processes
from cpo_pipe.data.embedding import locate_embedder
from cpo_pipe.data.end_tokens import end_tokens, write_end_tokens
from cpo_pipe.data.errors import InputError, MissingInput
from cpo_pipe.data.examples import Examples, largest_token_id
from cpo_pipe.data.executor import Executor, LocalExecutor
from cpo_pipe.data.fingerprint import digest, sha256_file
from cpo_pipe.data.models import (
    Model,
    check_vocabulary,
    checkpoint_model,
    copy_tokenizer,
    locate_model,
    logprob_rows,
)
from cpo_pipe.data.recipe import Evaluate, Negatives, Rank, Recipe, System, Training, ensemble_system, nearest
from cpo_pipe.data.recipe_text import recipe_text
from cpo_pipe.data.records import Record, changed_files, run_record, with_checksum
from cpo_pipe.data.store import Rows, Store
from cpo_pipe.data.text import one_line, say
from cpo_pipe.pipeline.engines.openai import ApiModel, Tokens
from cpo_pipe.pipeline.export import check_repo, export, parse_pairs, upload
from cpo_pipe.pipeline.folders import check_new, new_folder
from cpo_pipe.pipeline.generate import Plan, Sources, generate_negatives, plan_negatives
from cpo_pipe.pipeline.prepare import find_examples, prepare, target_tokens
from cpo_pipe.pipeline.quality import Quality, measure_quality
from cpo_pipe.pipeline.rank import plan_groups, rank
from cpo_pipe.trainer.merge import ensemble, merge
from cpo_pipe.trainer.train import METRICS_FILE, Inputs, checkpoint, train, training_spec

if TYPE_CHECKING:
    from cpo_pipe.eval.evaluate import Evaluation
    from cpo_pipe.eval.judges.resolve import Means
    from cpo_pipe.eval.report import StageRecord

log = logging.getLogger(__name__)

REPORTED_GROUPS = 50
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "README.md")
PACKAGES = ("cpo-pipe", "torch", "transformers", "datasets", "sentence-transformers", "pyarrow")


class Run:
    """One recipe on one store."""

    def __init__(
        self,
        recipe: Recipe,
        source: str,
        store: Store,
        run_dir: Path,
        executor: Executor | None = None,
        options: Sequence[str] = (),
    ):
        """`source` and `options` are the recipe and the options as given on the command line; messages repeat them."""
        self.recipe = recipe
        self.trainings = recipe.trainings()
        """By name, those of later rounds too."""
        self.store = store
        self.run_dir = run_dir
        self.executor = executor or LocalExecutor()
        self._source = source
        self._options = options
        self._examples: Examples | None = None
        self._models: dict[str, Model] = {}
        self._makes_models = True
        """Whether models that are named are downloaded and adapters merged."""
        self._apis = {name: ApiModel(name, api) for name, api in recipe.apis.items()}

    # ── what is there ────────────────────────────────────────────────────────────────────────────────────────────

    def examples(self) -> Examples:
        """The prepared examples, or MissingInput."""
        if self._examples is None:
            self._examples = find_examples(self.recipe.data, self.store)
        if self._examples is None:
            raise MissingInput(f"the examples are not prepared: run `{self._command('prepare')}`")
        return self._examples

    def model(self, name: str) -> Model:
        """What a model name in the recipe means: a checkpoint (or MissingInput), a folder or a hub model."""
        if name not in self._models:
            self._models[name] = self._find_model(name)
        return self._models[name]

    def _find_model(self, name: str) -> Model:
        if name not in self.trainings:
            return self._locate_model(name)
        product = checkpoint(self.store, training_spec(self.trainings[name], self._inputs(name)))
        if not product.complete():
            raise MissingInput(f"the training {name} is not done: run `{self._command('train', name)}`")
        return checkpoint_model(name, product)

    def _named(self, name: str) -> Model:
        """The model of a folder or hub name, whatever its tokenizer is."""
        try:
            return locate_model(name, self.store, make=self._makes_models)
        except MissingInput:
            raise
        except InputError as error:
            near = nearest(name, self.trainings, "the training ")
            raise InputError(f"{error}; {near}" if near else str(error)) from error

    def _locate_model(self, name: str) -> Model:
        model = self._named(name)
        known, used = model.vocabulary(), largest_token_id(self.examples())
        if known is not None and used >= known:
            raise InputError(
                f"model {name}: its vocabulary has {known} entries, but the examples have the token id {used}; "
                "set data.tokenizer to the model's own"
            )
        check_vocabulary(model, self.examples().tokenizer, self.store)
        return model

    # Negatives and groups are shared by the trainings that have none of their own; these are given by their name.

    def negatives(self, whose: str | None = None) -> Plan:
        """Which negatives the recipe asks for, made or not."""
        tokens = target_tokens(self.recipe.data)
        return plan_negatives(self._negatives(whose), self.store, self.examples(), self._generator, tokens)

    def sources(self, whose: str | None = None) -> Sources:
        """Where the negatives are that the recipe asks for."""
        return self.negatives(whose).sources

    def _complete_sources(self, whose: str | None) -> Sources:
        """Where the negatives are, or MissingInput."""
        sources = self.sources(whose)
        if missing := sources.missing():
            command = self._command("generate-negatives")
            raise MissingInput(f"{missing} negatives{_of(whose)} are missing: run `{command}`")
        return sources

    def groups(self, whose: str | None = None) -> tuple[Sources, Rows]:
        """The complete groups, or MissingInput."""
        sources = self._complete_sources(whose)
        groups, _, _ = plan_groups(self._rank(), self._ranked(), self.store, sources)
        missing = groups.missing(sources.selection.select(["example_id"])).num_rows
        if missing:
            raise MissingInput(f"{missing} groups{_of(whose)} are missing: run `{self._command('rank')}`")
        return sources, groups

    # ── stages ───────────────────────────────────────────────────────────────────────────────────────────────────

    def prepare(self) -> None:
        """Stage `prepare`."""
        with self._stage("prepare") as record:
            record["artifact"] = prepare(self.recipe.data, self.store, self.run_dir).product.name

    def generate_negatives(self) -> None:
        """Stage `generate-negatives`, of all whose generator is there."""
        self._for_each(self._generate)

    def _generate(self, whose: str | None) -> None:
        plan = self.negatives(whose)
        with self._stage(f"generate-negatives{_of(whose)}") as record:
            generate_negatives(plan, self.executor)
            record["artifact"] = [source.rows.name for source in plan.sources.pools]

    def rank(self) -> None:
        """Stage `rank`, of all whose negatives are there."""
        self._for_each(self._group)

    def _group(self, whose: str | None) -> None:
        sources = self._complete_sources(whose)
        with self._stage(f"rank{_of(whose)}") as record:
            record["artifact"] = rank(self._rank(), self._ranked(), self.store, sources, self.executor).name

    def _for_each(self, make: Callable[[str | None], None]) -> None:
        """Make what can be made now, and say what the rest waits for; MissingInput where that is all."""
        owners, waiting = self._owners(), dict[str | None, MissingInput]()
        for whose in owners:
            try:
                make(whose)
            except MissingInput as missing:
                waiting[whose] = missing
        if len(waiting) == len(owners):
            raise next(iter(waiting.values()))
        for whose, reason in waiting.items():
            log.info("%s is waiting: %s", whose or "what the trainings share", reason)

    def quality(self) -> None:
        """Print figures of the negatives, with what is wrong with them, and write them to quality.parquet."""
        from cpo_pipe.eval.report import print_quality

        sources, groups = self.groups(self._owners()[0])
        with self._stage("quality"):
            measured = self._measure_quality(sources, groups)
            content = pa.BufferOutputStream()
            pq.write_table(measured.table, content)
            atomic.write_bytes(self.run_dir / "quality.parquet", content.getvalue().to_pybytes())
        print_quality(measured.table, measured.notes)

    def train(self, names: Sequence[str] = ()) -> dict[str, str]:
        """Stage `train`: the named trainings; without names all whose inputs are there, in order of dependency.

        Returns:
            The trainings that could not start, with the reason (which names the command that unblocks them).

        Raises:
            InputError: a name is not in the recipe; MissingInput: an input of a named training is missing.
        """
        for name in names:
            if name not in self.trainings:
                hint = nearest(name, self.trainings) or f"there are {', '.join(self.trainings)}"
                raise InputError(f"training {name}: not in the recipe; {hint}")
        blocked = {}
        for name in self.recipe.training_order():
            if names and name not in names:
                continue
            try:
                inputs = self._inputs(name)
            except MissingInput as missing:
                if names:
                    raise
                blocked[name] = str(missing)
                continue
            with self._stage(f"train {name}") as record:
                config = self.trainings[name]
                record["artifact"] = train(name, config, self.store, inputs, self.run_dir, self.executor).name
        return blocked

    def evaluate(self) -> Path:
        """Stage `evaluate`: prints the table and writes report.html and metrics.parquet; returns the report's path."""
        from cpo_pipe.eval.evaluate import evaluate
        from cpo_pipe.eval.report import print_table

        config, examples = self._evaluation(), self.examples()
        with self._stage("evaluate") as record:
            systems = {name: self.system(name, system) for name, system in config.all_systems().items()}
            evaluation = evaluate(
                config,
                self.store,
                examples,
                systems,
                max_new_tokens=config.max_new_tokens or target_tokens(self.recipe.data),
                ranker=self._ranker(),
                target_nll=self._target_logprobs,
                judging=self._judging(),
                executor=self.executor,
            )
            record["artifact"] = evaluation.product.name
        shutil.copyfile(evaluation.product.path / "metrics.parquet", self.run_dir / "metrics.parquet")
        report = self._report(evaluation, systems)
        print_table(evaluation.metrics(), config.baseline, evaluation.shared_metrics, evaluation.notes)
        say(one_line(f"report: {report}"))
        return report

    def evaluation_costs(self) -> None:
        """Print what `evaluate` would still ask of APIs, as systems and as judges; nothing is asked, made or loaded."""
        from cpo_pipe.eval.evaluate import evaluation_costs
        from cpo_pipe.eval.judges.cost import TOKEN_BYTES

        config = self._evaluation()
        self._makes_models = False
        try:
            systems = {name: self._system_there(name, system) for name, system in config.all_systems().items()}
        finally:
            self._makes_models = True
        max_new_tokens = config.max_new_tokens or target_tokens(self.recipe.data)
        costs, missing = evaluation_costs(
            config,
            self.store,
            self.examples(),
            systems,
            max_new_tokens=max_new_tokens,
            judging=self._judging(),
        )
        for what, api, cost in costs:
            price = api.price(cost.tokens)
            dollars = f": about {price:.4g} US dollars" if price is not None else ""
            say(
                f"{what} (apis.{api.name}): {cost.calls:,} calls to be made, about "
                f"{cost.tokens.prompt:,} prompt tokens, at most {cost.tokens.written:,} written{dollars}"
            )
        if not costs:
            say("nothing that this recipe evaluates costs anything")
            return
        say(f"prompt tokens are estimated: one for every {TOKEN_BYTES} bytes of UTF-8")
        for (name, decoding), count in missing.items():
            say(f"{name}, {decoding}: {count:,} outputs are not there yet; to judges each counts as {max_new_tokens} "
                  "tokens, the most that it can have")  # fmt: skip

    def _system_there(self, name: str, system: System) -> Model | ApiModel | None:
        """The model of a system; None where it is not downloaded, trained or merged."""
        try:
            if system.model is not None:
                return self.system("", system)
            assert system.merge is not None
            parts = [(self.model(part), weight) for part, weight in system.merge.items()]
        except MissingInput as missing:
            log.info("system %s is not there yet: %s", name, missing)
            return None
        product = ensemble(self.store, parts, self.examples().tokenizer)
        return checkpoint_model("", product) if product.complete() else None

    def merge(self, name: str, out: Path) -> None:
        """Write the model of a system to a folder of its own, with the tokenizer of the examples.

        Raises:
            InputError: there is no such system, it is an API, or the folder is not empty.
        """
        systems = self._evaluation().all_systems()
        if name not in systems:
            hint = nearest(name, systems) or f"there are {', '.join(systems)}"
            raise InputError(f"system {name}: not among evaluate's; {hint}")
        check_new(out)
        self.store.register_run(self.run_dir)
        model = self.system(name, systems[name])
        if isinstance(model, ApiModel):
            raise InputError(f"system {name}: is an API, whose weights are not here; name another system")
        model.check_weights()
        with new_folder(out) as scratch:
            for pattern in MODEL_FILES:
                for file in model.path.glob(pattern):
                    shutil.copyfile(file, scratch / file.name)
            copy_tokenizer(self.examples().tokenizer.path, scratch)
            write_end_tokens(scratch, end_tokens(scratch, self.examples().tokenizer))
        say(one_line(f"system {name}: written to {out}"))

    def export(
        self,
        out: Path,
        pairs: Sequence[str] = (),
        conversational: bool = False,
        push: str = "",
        public: bool = False,
        training: str = "",
    ) -> None:
        """Write the groups (of a training with negatives of its own) to a folder as preference data, and to the hub.

        Raises:
            InputError: the folder is not empty, or a pair, the training or the hub's name is none; MissingInput: groups
                are missing.
        """
        if training and (training not in self.trainings or not self.trainings[training].contrasts):
            known = [name for name, config in self.trainings.items() if config.contrasts]
            hint = nearest(training, known) or f"there are {', '.join(known)}"
            raise InputError(f"--training {training}: no training on negatives; {hint}")
        whose = self._own(training) if training else self._owners()[0]
        negatives = self._negatives(whose)
        wanted = parse_pairs(pairs, negatives)
        check_new(out)
        if push:
            check_repo(push)
        elif public:
            raise InputError("--public has no meaning without --push: leave it out")
        sources, groups = self.groups(whose)
        tokenizer = self.examples().tokenizer
        export(out, self.recipe, negatives, tokenizer, sources.selection, groups, wanted, conversational)
        if push:
            upload(out, push, public)

    def _report(self, evaluation: "Evaluation", systems: Mapping[str, Model | ApiModel]) -> Path:
        from cpo_pipe.eval.exports import write_exports
        from cpo_pipe.eval.report import ReportData, unmeasured, write_report

        trained = self._finished_trainings()
        sources, groups, notes = self._shown_groups()
        artifacts = {"examples": self.examples().product.name}
        if groups is not None:
            made_by = ", ".join(pool.rows.name for pool in sources.pools)
            first = _of(self._owners()[0])
            artifacts |= {f"negatives{first}": made_by, f"groups{first}": groups.name}
        for whose in self._owners()[1:] if self.recipe.negatives is not None else ():
            with suppress(MissingInput):
                of, its = self.groups(whose)
                made_by = ", ".join(pool.rows.name for pool in of.pools)
                artifacts |= {f"negatives{_of(whose)}": made_by, f"groups{_of(whose)}": its.name}
        artifacts |= {f"training {name}": self._address(model) for name, model in trained.items()}
        artifacts |= {f"system {name}": self._address(model) for name, model in systems.items()}
        artifacts["metrics"] = evaluation.product.name
        path, reference = self.run_dir / "report.html", self._reference_logprobs()
        identity = digest(
            [artifacts, recipe_text(self.recipe), _versions(), notes, reference.num_rows() if reference else 0]
        )
        if self._is_written(identity):  # drawing takes longer than all the rest of a run with nothing to do
            return path
        measured = self._measure_quality(sources, groups) if groups is not None else None
        first = sources.selection.slice(0, REPORTED_GROUPS)
        data = ReportData(
            identity=identity,
            run=self.recipe.name,
            created=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            versions=_versions(),
            recipe=recipe_text(self.recipe),
            artifacts=artifacts,
            baseline=self._evaluation().baseline,
            metrics=evaluation.metrics(),
            comparisons=evaluation.comparisons(),
            agreements=evaluation.agreements(),
            published=self.recipe.published,
            shared_metrics=evaluation.shared_metrics,
            notes=[*([self.recipe.note] if self.recipe.note else []), *evaluation.notes, *notes],
            examples=evaluation.examples,
            outputs=evaluation.outputs(),
            verdicts=evaluation.verdicts(),
            ensembles=self._ensembles(),
            stages=self._stage_records(),
            trainings={name: pq.read_table(model.path / METRICS_FILE) for name, model in trained.items()},
            quality=measured.table if measured else None,
            quality_notes=measured.notes if measured else (),
            group_examples=first if groups is not None else None,
            groups=groups.read(first["example_id"]) if groups is not None else None,
        )
        for figure in unmeasured(data):
            log.warning("published: %s is nothing that this run measures", figure)
        written = [*write_exports(self.run_dir, data), path]
        write_report(path, data)
        files = {str(file.relative_to(self.run_dir)): sha256_file(file) for file in written}
        self._write_record(self._record() | {"report": {"identity": identity, "files": files}})
        return path

    def _is_written(self, identity: str) -> bool:
        """Whether the report of this identity is there, and all files beside it, as they were written."""
        record = self._record()
        if record.get("report", {}).get("identity") != identity:
            return False
        changed = changed_files(self.run_dir, record)
        if changed:
            log.warning("%s: missing or changed; writing it again", ", ".join(changed))
        return not changed

    def _ensembles(self) -> dict[str, list[tuple[float, str]]]:
        """α and system of each ensemble's members."""
        return {
            name: [(alpha, ensemble_system(name, alpha)) for alpha in sorted(ensemble.alphas)]
            for name, ensemble in self._evaluation().ensembles.items()
        }

    def _stage_records(self) -> list["StageRecord"]:
        """What the stages of this run took, as run.json has it."""
        from cpo_pipe.eval.report import StageRecord

        stages = self._record()["stages"]
        return [
            StageRecord(
                name=name if "started" in stage else f"{name} (not finished)",
                seconds=stage["seconds"],
                total_seconds=stage.get("total_seconds", stage["seconds"]),
                spent="; ".join(_spent_in_words(api, spent) for api, spent in stage.get("apis", {}).items()),
            )
            for name, stage in sorted(stages.items(), key=lambda item: item[1].get("started", math.inf))
        ]

    def _shown_groups(self) -> tuple[Sources, Rows | None, list[str]]:
        """Negatives and groups of the recipe, where they are there, and what to say where not."""
        if self.recipe.negatives is None:
            return Sources(pa.table({}), []), None, []
        try:
            return *self.groups(self._owners()[0]), []
        except MissingInput as missing:
            return Sources(pa.table({}), []), None, [f"No negatives are shown: {missing}"]

    def _finished_trainings(self) -> dict[str, Model]:
        finished = {}
        for name in self.recipe.training_order():
            with suppress(MissingInput):
                finished[name] = self.model(name)
        return finished

    def _address(self, model: Model | ApiModel) -> str:
        """Where a model is in the store; of one from elsewhere its name and fingerprint."""
        if isinstance(model, ApiModel):
            return f"{model.config.model} at {model.config.url}"
        if model.path.is_relative_to(self.store.local):
            return str(model.path.relative_to(self.store.local))
        return f"{model.name} ({model.fingerprint})"

    def _measure_quality(self, sources: Sources, groups: Rows) -> Quality:
        return measure_quality(sources.selection, sources.pools, groups, self._reference_logprobs())

    def _reference_logprobs(self) -> Rows | None:
        """Where the first training with a reference model that is there keeps its log-probs, made or not."""
        for training in self.recipe.train.values():
            if training.reference is not None:
                with suppress(MissingInput):
                    return logprob_rows(self.store, self.model(training.reference), training.dtype)
        return None

    def _target_logprobs(self, model: Model, examples: pa.Table) -> list[tuple[float, int]]:
        from cpo_pipe.trainer.logprobs import target_logprobs

        return target_logprobs(self.store, model, examples, self.executor)

    def _judging(self) -> "Means":
        """What judges are made with."""
        from cpo_pipe.eval.judges.resolve import Means

        return Means(self._apis, self._judge_model, self._logprobs)

    def _judge_model(self, name: str) -> Model:
        return self.model(name) if name in self.trainings else self._named(name)

    def _logprobs(self, model: Model, groups: pa.Table) -> list[float]:
        from cpo_pipe.trainer.logprobs import cached_logprobs, read_logprobs

        rows = cached_logprobs(self.store, model, "float32", groups, self.executor)
        values: list[float] = read_logprobs(rows, groups).tolist()
        return values

    def _ranker(self) -> str | None:
        """Fingerprint of the embedding model that ranks this recipe's negatives."""
        if self.recipe.negatives is None or not self._ranked():
            return None
        return locate_embedder(self._rank().model, self.store).fingerprint

    def everything(self) -> Path | None:
        """All that is missing, in order; returns the path of the report, if the recipe evaluates."""
        if self.recipe.evaluate is not None and self.recipe.evaluate.labels is not None:
            from cpo_pipe.eval.labels import read_labels

            # Damaged labels are an error now, not after the trainings.
            read_labels(Path(self.recipe.evaluate.labels), self.store.hash_file)
        self.prepare()
        grouped: set[str | None] = set()
        for name in self.recipe.training_order():
            whose = self._own(name)
            if self.trainings[name].contrasts and whose not in grouped:
                self._generate(whose)
                self._group(whose)
                grouped.add(whose)
            self.train([name])
        if self.recipe.negatives is not None and not grouped:
            self._generate(None)
            self._group(None)
        return self.evaluate() if self.recipe.evaluate is not None else None

    # ── resolving ────────────────────────────────────────────────────────────────────────────────────────────────

    def _inputs(self, name: str) -> Inputs:
        config: Training = self.trainings[name]
        examples = self.examples()
        init = self.model(config.init) if isinstance(config.init, str) else config.init
        columns = ["example_id", "prompt_ids", "target_ids"]  # texts need not be in memory while training
        if not config.contrasts:
            return Inputs(examples.tokenizer, init, examples.read("train", columns=columns))
        reference = self.model(config.reference) if config.reference is not None else None
        sources, groups = self.groups(self._own(name))
        strengths = self.recipe.strengths_of(name)
        return Inputs(examples.tokenizer, init, sources.selection.select(columns), groups, reference, strengths)

    def system(self, name: str, system: System) -> Model | ApiModel:
        """The model of a system; an ensemble is merged."""
        if system.model is not None:
            return self._apis.get(system.model) or self.model(system.model)
        assert system.merge is not None
        parts = [(self.model(part), weight) for part, weight in system.merge.items()]
        return checkpoint_model(name, merge(name, self.store, parts, self.examples().tokenizer))

    def _generator(self, name: str, *, any_tokenizer: bool = False) -> Model | ApiModel:
        """What makes negatives: an API of the recipe, or a model."""
        if name in self._apis:
            return self._apis[name]
        return self._named(name) if any_tokenizer and name not in self.trainings else self.model(name)

    def _own(self, name: str) -> str | None:
        """The name of a training that has negatives of its own: a later round, or by its settings; None of others."""
        return name if name not in self.recipe.train or self.trainings[name].negatives is not None else None

    def _owners(self) -> list[str | None]:
        """Whose negatives there are to be: of the trainings that share them (None), and of each that has its own."""
        owners = dict.fromkeys(self._own(name) for name, training in self.trainings.items() if training.contrasts)
        return sorted(owners, key=lambda whose: whose is not None) or [None]

    def _negatives(self, whose: str | None = None) -> Negatives:
        negatives = self.recipe.negatives if whose is None else self.recipe.negatives_of(whose)
        if negatives is None:
            raise InputError("negatives is missing: the recipe has no such section, so there is nothing to generate")
        return negatives

    def _evaluation(self) -> Evaluate:
        if self.recipe.evaluate is None:
            raise InputError("evaluate is missing: the recipe has no such section, so there is nothing to compare")
        return self.recipe.evaluate

    def _rank(self) -> Rank:
        return self.recipe.rank if isinstance(self.recipe.rank, Rank) else Rank()

    def _ranked(self) -> bool:
        return self.recipe.rank != "none"

    def _command(self, stage: str, *names: str) -> str:
        return shlex.join(["cpo-pipe", stage, self._source, *names, *self._options])

    @contextmanager
    def _stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Note in the run's folder how long a stage took and what it asked of APIs, also where it fails or is stopped.

        Once it is done also by which recipe, when it started, and what it made.
        """
        record: dict[str, Any] = {}
        if not processes.is_main():
            yield record
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is said before the work
        self.store.register_run(self.run_dir)
        start = time.time()
        before = {name: api.ledger.used for name, api in self._apis.items()}
        try:
            yield record
        except BaseException:
            with suppress(OSError):  # a full disk takes no record either, and what failed first is what to say
                self._note(name, None, time.time() - start, before)
            raise
        atomic.write_bytes(self.run_dir / "recipe.yaml", recipe_text(self.recipe).encode())
        self._note(name, {"started": start, **record}, time.time() - start, before)

    def _note(self, name: str, done: dict[str, Any] | None, seconds: float, before: Mapping[str, Tokens]) -> None:
        """Add to run.json what a stage took; `done` is what it left, None where it failed, which undoes nothing."""
        run = self._record()
        run |= {"store": self.store.name, "versions": _versions()}
        earlier = run["stages"].get(name, {})
        total = earlier.get("total_seconds", 0.0) + seconds
        took = {"seconds": round(seconds, 3), "total_seconds": round(total, 3), "apis": earlier.get("apis", {})}
        for api, tokens in before.items():
            _add_spent(took["apis"], self._apis[api], self._apis[api].ledger.used - tokens)
        run["stages"][name] = (earlier if done is None else done) | took
        self._write_record(run)

    def _record(self) -> Record:
        """What run.json has of the earlier runs of this folder; a damaged one is set aside, and begun anew."""
        path = self.run_dir / "run.json"
        found = run_record(self.run_dir)
        if found is None and path.exists():
            aside = path.with_name(f"run.json.damaged-{time.time_ns()}")
            path.rename(aside)
            log.warning(
                "%s is damaged and was moved to %s; the time and cost of earlier runs are lost", path, aside.name
            )
        return found or {"stages": {}}

    def _write_record(self, record: Record) -> None:
        atomic.write_bytes(self.run_dir / "run.json", json.dumps(with_checksum(record), indent=2).encode())


def _of(whose: str | None) -> str:
    """Whose negatives and groups, in words; nothing of those that trainings share."""
    return f" of {whose}" if whose is not None else ""


def _add_spent(apis: dict[str, dict[str, Any]], api: ApiModel, used: Tokens) -> None:
    """Add what an API was asked to what it was asked before; dollars where the recipe names its prices."""
    if used != Tokens():
        before = apis.get(api.name, {"prompt_tokens": 0, "written_tokens": 0, "usd": 0.0})
        price, sofar = api.price(used), before["usd"]
        apis[api.name] = {
            "prompt_tokens": before["prompt_tokens"] + used.prompt,
            "written_tokens": before["written_tokens"] + used.written,
            "usd": None if price is None or sofar is None else sofar + price,
        }


def _spent_in_words(api: str, spent: Mapping[str, Any]) -> str:
    dollars = "" if spent["usd"] is None else f", {spent['usd']:.4g} US dollars"
    return f"{api}: {spent['prompt_tokens']:,} prompt tokens and {spent['written_tokens']:,} written{dollars}"


def _versions() -> dict[str, str]:
    """Of Python and of the packages that could change what is made."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
