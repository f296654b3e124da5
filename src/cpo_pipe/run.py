"""A run: one recipe on one store. Each stage resolves its inputs, makes what is missing, and is logged."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from cpo_pipe.checks import check_settings, check_stages
from cpo_pipe.data.errors import Findings, MissingInput
from cpo_pipe.data.execution.base import Executor, LocalExecutor
from cpo_pipe.data.store import Store, atomic
from cpo_pipe.data.text import one_line, say, say_prose
from cpo_pipe.pipeline.negatives.generate import generate_negatives
from cpo_pipe.pipeline.prepare.leakage import LEAKAGE, leakage_warnings
from cpo_pipe.pipeline.prepare.prepare import prepare
from cpo_pipe.pipeline.quality.measure import measure_quality
from cpo_pipe.pipeline.rank.rank import rank
from cpo_pipe.recipe.recipe import Recipe
from cpo_pipe.recipe.render import recipe_text
from cpo_pipe.resolve import Resolver, of
from cpo_pipe.run_log import RunLog
from cpo_pipe.trainer.objectives.preference import PreferenceTraining
from cpo_pipe.trainer.train import train

if TYPE_CHECKING:
    from cpo_pipe.eval.evaluate import Evaluation
    from cpo_pipe.eval.generate import SystemModel

log = logging.getLogger(__name__)


class Run:
    """One recipe on one store, with a folder for what belongs to the run alone."""

    def __init__(
        self,
        recipe: Recipe,
        source: str,
        store: Store,
        run_dir: Path,
        executor: Executor | None = None,
        options: Sequence[str] = (),
    ):
        """`source` and `options` are the recipe and the options of the command line; messages repeat them."""
        self.recipe, self.store, self.run_dir, self.options = recipe, store, run_dir, options
        self.executor = executor or LocalExecutor()
        self.resolver = Resolver(recipe, store, source, options)
        self.log = RunLog(run_dir, store, recipe_text(recipe), self.resolver.apis)

    def everything(self, force: bool = False, quiet: bool = False) -> Path | None:
        """Make all that is missing, in order; return the path of the report, if the recipe evaluates.

        Args:
            force: try also trainings that do not fit into memory or on the disk.
            quiet: print no results.
        """
        steps, self.log.planned = self._steps(), self.stages()
        check_settings(self.resolver.offline(), force)
        with self.log.whole():
            self.prepare()
            check_stages(self.resolver)
            for step in steps.values():
                step()
            return self.evaluate(quiet) if self.recipe.evaluate is not None else None

    def _steps(self) -> dict[str, Callable[[], object]]:
        """Return the stages between `prepare` and `evaluate`, in order, by the names that they have in the log."""
        steps: dict[str, Callable[[], object]] = {}

        def add_groups(owner: str | None) -> None:
            steps[f"generate-negatives{of(owner)}"] = partial(self._generate_negatives, owner)
            steps[f"rank{of(owner)}"] = partial(self._rank, owner)

        for name in self.recipe.training_order():
            owner = self.resolver.negatives_owner(name)
            if isinstance(self.resolver.trainings[name], PreferenceTraining) and f"rank{of(owner)}" not in steps:
                add_groups(owner)
            steps[f"train {name}"] = partial(self.train, [name])
        if self.recipe.negatives is not None and not any(step.startswith("rank") for step in steps):
            add_groups(None)
        return steps

    def check(self, force: bool = False) -> None:
        """Find all that is wrong with the recipe, and make nothing; check the stages only if the examples are prepared.

        Args:
            force: do not check whether trainings fit into memory and on the disk.

        Raises:
            InputError: something is wrong; all of it is in the message.
        """
        resolver, findings = self.resolver.offline(), Findings()
        with findings.collect():
            check_settings(resolver, force)
        with findings.collect():
            resolver.examples()
            check_stages(resolver)
        findings.report()

    def stages(self) -> list[str]:
        """Return the names of all stages in order, as they are in the log."""
        return ["prepare", *self._steps(), *(["evaluate"] if self.recipe.evaluate is not None else [])]

    def prepare(self) -> None:
        """Stage `prepare`: read, split and tokenize the ground-truth pairs."""
        with self.log.stage("prepare") as made:
            made["artifact"] = prepare(self.recipe.data, self.store, self.run_dir).artifact.name

    def generate_negatives(self) -> None:
        """Stage `generate-negatives`, for all whose generator exists."""
        self._for_each_owner(self._generate_negatives)

    def _generate_negatives(self, training: str | None) -> None:
        plan = self.resolver.negatives(training)
        with self.log.stage(f"generate-negatives{of(training)}") as made:
            generate_negatives(plan, self.executor)
            made["artifact"] = [source.rows.name for source in plan.sources]

    def rank(self) -> None:
        """Stage `rank`, for all whose negatives exist."""
        self._for_each_owner(self._rank)

    def _rank(self, training: str | None) -> None:
        plan = self.resolver.complete_negatives(training)
        with self.log.stage(f"rank{of(training)}") as made:
            dependencies = self.resolver.scorer_dependencies()
            made["artifact"] = rank(self.recipe.rank, dependencies, plan, self.executor).name

    def _for_each_owner(self, stage: Callable[[str | None], None]) -> None:
        """Run a stage for each that has negatives and can be done now; say what the others wait for.

        Raises:
            MissingInput: none can be done.
        """
        owners, waiting = self.resolver.negatives_owners(), dict[str | None, MissingInput]()
        for training in owners:
            try:
                stage(training)
            except MissingInput as missing:
                waiting[training] = missing
        if len(waiting) == len(owners):
            raise next(iter(waiting.values()))
        for training, reason in waiting.items():
            log.info("%s is waiting: %s", training or "what the trainings share", reason)

    def quality(self) -> None:
        """Print figures and warnings about the negatives and the split; write quality.parquet and leakage.parquet."""
        from cpo_pipe.eval.report.terminal import print_leakage, print_quality

        plan, groups = self.resolver.groups(self.resolver.negatives_owners()[0])
        with self.log.stage("quality"):
            reference, dropped = self.resolver.reference_logprobs(), self.resolver.dropped_as_correct(plan)
            measured = measure_quality(plan.selection, plan.sources, groups, reference, dropped)
            leakage = self.resolver.examples().leakage
            tables = {"quality": measured.table, "leakage": pa.Table.from_pylist(leakage, LEAKAGE)}
            for name, table in tables.items():
                atomic.write_table(self.run_dir / f"{name}.parquet", table)
        print_leakage(leakage)
        print_quality(measured.table, [*leakage_warnings(leakage), *measured.notes])

    def train(self, names: Sequence[str] = ()) -> dict[str, str]:
        """Stage `train`: the named trainings; without names all whose inputs exist, in order of dependency.

        Returns:
            The trainings that could not start, with the reason (which names the command that unblocks them).

        Raises:
            InputError: a name is not in the recipe.
            MissingInput: an input of a named training is missing.
        """
        self.resolver.check_trainings(names)
        trainings, blocked = self.resolver.trainings, {}
        for name in self.recipe.training_order():
            if names and name not in names:
                continue
            try:
                inputs = self.resolver.training_inputs(name)
            except MissingInput as missing:
                if names:
                    raise
                blocked[name] = str(missing)
                continue
            with self.log.stage(f"train {name}") as made:
                checkpoint = train(name, trainings[name], self.store, inputs, self.run_dir, self.executor)
                made["artifact"] = checkpoint.name
        return blocked

    def evaluation(self, systems: Mapping[str, "SystemModel"] | None = None) -> "Evaluation":
        """Compare the systems, or find the comparison that was made; `systems` are those that are resolved already."""
        from cpo_pipe.eval.evaluate import evaluate

        config = self.resolver.evaluate_section()
        return evaluate(
            config, self.store, self.resolver.examples(), systems or self.resolver.systems(),
            ranker=self.resolver.ranker(), max_new_tokens=config.max_new_tokens or self.recipe.data.longest_target(),
            models=self.resolver.judge_models(config), apis=self.resolver.apis, executor=self.executor,
        )  # fmt: skip

    def evaluate(self, quiet: bool = False) -> Path:
        """Stage `evaluate`: write report.html and metrics.parquet, print the table; return the report's path."""
        from cpo_pipe.eval.report.terminal import print_leaderboards
        from cpo_pipe.run_report import rankings, write_run_report

        config = self.resolver.evaluate_section()
        with self.log.stage("evaluate") as made:
            systems = self.resolver.systems()
            evaluation = self.evaluation(systems)
            made["artifact"] = evaluation.artifact.name
        shutil.copyfile(evaluation.artifact.path / "metrics.parquet", self.run_dir / "metrics.parquet")
        report = write_run_report(self.resolver, self.log, evaluation, systems)
        if quiet:
            return report
        boards, answer = rankings(evaluation)
        print_leaderboards(boards, config.baseline, evaluation.notes)
        say(one_line(f"report: {report}"))
        if answer is not None:
            say_prose(answer.sentence)
        return report

    def evaluation_costs(self) -> None:
        """Print what `evaluate` would still ask of APIs, as systems and as judges; nothing is asked, made or loaded."""
        from cpo_pipe.eval.costs import evaluation_costs, print_costs

        config = self.resolver.evaluate_section()
        systems = self.resolver.available_systems()
        max_new_tokens = config.max_new_tokens or self.recipe.data.longest_target()
        costs, missing = evaluation_costs(
            config, self.store, self.resolver.examples(), systems, max_new_tokens=max_new_tokens,
            models=self.resolver.judge_models(config, only_apis=True), apis=self.resolver.apis,
        )  # fmt: skip
        print_costs(costs, missing, max_new_tokens)
