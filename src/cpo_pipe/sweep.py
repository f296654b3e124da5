"""A recipe's `sweep`: all combinations of the values that it lists, run on one store and ranked on validation rows."""

import itertools
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpo_pipe.data.errors import Findings, InputError
from cpo_pipe.data.text import one_line, say, say_prose
from cpo_pipe.eval.report.verdict import Verdict
from cpo_pipe.eval.statistics.significance import SIGNIFICANCE, holm
from cpo_pipe.recipe.recipe import Recipe
from cpo_pipe.recipe.render import inline
from cpo_pipe.run import Run
from cpo_pipe.screen import print_table

OFF = "sweep={}"
"""The override that makes a recipe one run."""
ON_VALIDATION = "evaluate.split=validation"


def combinations(sweep: Mapping[str, Sequence[Any]]) -> list[list[str]]:
    """Return the overrides of each combination of the listed values; the last key varies fastest."""
    listed = [[f"{key}={inline(value)}" for value in values] for key, values in sweep.items()]
    return [list(chosen) for chosen in itertools.product(*listed)]


@dataclass(frozen=True)
class Outcome:
    """A combination, and how its best system compares with the baseline."""

    chosen: list[str]
    run: str
    verdict: Verdict


def open_sweep(recipe: Recipe, open_run: Callable[[list[str]], Run], force: bool) -> list[tuple[list[str], Run]]:
    """Return all combinations with their runs, checked; make nothing.

    Raises:
        InputError: the recipe has no validation rows or no evaluation, or a combination is invalid.
    """
    if recipe.evaluate is None:
        raise InputError("sweep: needs the section evaluate, by which the combinations are ranked; add it")
    if not recipe.data.validation and recipe.data.validation_source is None:
        raise InputError("sweep: ranks on validation rows, but data.validation is 0; raise it")
    findings, opened = Findings(), list[tuple[list[str], Run]]()
    for settings in combinations(recipe.sweep):
        with findings.collect():
            run = open_run([OFF, ON_VALIDATION, *settings])
            run.check(force)
            opened.append((settings, run))
    findings.report()
    return opened


def run_sweep(recipe: Recipe, open_run: Callable[[list[str]], Run], command: Sequence[str], force: bool) -> None:
    """Run all combinations, each in a folder of its own, and print them from the best to the worst.

    Args:
        recipe: with the section `sweep`.
        open_run: returns the run of the recipe with more overrides.
        command: the command line that runs one combination, without its overrides, for the closing message.
        force: see `Run.everything`.

    Raises:
        InputError: as `open_sweep`.
    """
    from cpo_pipe.run_report import rankings  # draws charts: its import takes a second

    outcomes, opened = [], open_sweep(recipe, open_run, force)
    for number, (settings, run) in enumerate(opened, 1):
        say(one_line(f"combination {number}/{len(opened)}: {' '.join(settings)}"))
        run.everything(force)
        _, verdict = rankings(run.evaluation())
        if verdict is None:
            raise InputError("sweep: no system is compared with the baseline; add a system to evaluate.systems")
        outcomes.append(Outcome(settings, str(run.run_dir), verdict))
    _print(outcomes, command)


def _print(outcomes: Sequence[Outcome], command: Sequence[str]) -> None:
    adjusted = holm([outcome.verdict.p for outcome in outcomes])
    ranked = sorted(zip(outcomes, adjusted, strict=True), key=lambda one: -one[0].verdict.difference)
    first = outcomes[0].verdict
    say_prose(f"{first.metric} under {first.decoding} on validation rows, the best system of each combination against "
              f"{first.baseline}; p adjusted for {len(outcomes)} combinations")  # fmt: skip
    rows = [
        [" ".join(one.chosen), one.verdict.system, f"{one.verdict.value:.4g}", f"{one.verdict.difference:+.3g}",
         f"{p:.3f}{'*' if p < SIGNIFICANCE else ''}", one.run]
        for one, p in ranked
    ]  # fmt: skip
    print_table(["combination", "system", ">value", ">gain", ">p", "run"], rows)
    if len({outcome.verdict.baseline_value for outcome in outcomes}) > 1:
        say_prose(f"{first.baseline} differs between combinations: each gain is over its own")
    settings = [part for setting in ranked[0][0].chosen for part in ("--set", setting)]
    say(one_line(f"the best one on the recipe's own rows: {shlex.join([*command, '--set', OFF, *settings])}"))
