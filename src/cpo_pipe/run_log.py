"""The log of a run folder, `run.json`: what each stage made, how long it took, and what it asked of APIs."""

import json
import logging
import math
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpo_pipe.data import peak_memory, progress
from cpo_pipe.data.execution import processes
from cpo_pipe.data.store import Store, atomic
from cpo_pipe.data.store.records import Record, changed_files, run_record, with_checksum
from cpo_pipe.pipeline.api.model import ApiModel, Tokens
from cpo_pipe.runs import link_latest
from cpo_pipe.status import Status

if TYPE_CHECKING:
    from cpo_pipe.eval.report.data import StageRecord

log = logging.getLogger(__name__)

PACKAGES = ("cpo-pipe", "torch", "transformers", "datasets", "sentence-transformers", "pyarrow")


class RunLog:
    """The log of one run folder. Times and costs add up over all runs of the folder, also of stages that failed."""

    def __init__(self, run_dir: Path, store: Store, recipe: str, apis: Mapping[str, ApiModel]):
        """`recipe` is the text that is written beside the log; `apis` are those whose cost is recorded."""
        self.run_dir = run_dir
        self.planned: list[str] = []
        """The stages of a whole run in order, from which each has its number; empty where a stage runs alone."""
        self._status = Status(run_dir)
        self._store = store
        self._recipe = recipe
        self._apis = apis

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Record a stage: its time and use of APIs in any case, its start and what it made only if it succeeds.

        Yields:
            A dict, into which the caller writes what was made.
        """
        made: dict[str, Any] = {}
        if not processes.is_main():
            yield made
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is reported before the work
        link_latest(self.run_dir)
        self._store.register_run(self.run_dir)
        start = time.time()
        before = {name: api.ledger.used for name, api in self._apis.items()}
        number = f"{self.planned.index(name) + 1}/{len(self.planned)}" if name in self.planned else ""
        if number:
            log.info("stage %s %s", number, name)
        last = not number or name == self.planned[-1]
        work: list[dict[str, Any]] = []

        def finish(label: str, unit: str, done: int, seconds: float) -> None:
            work.append({"label": label, "unit": unit, "done": done, "seconds": round(seconds, 3)})

        peak_memory.reset()
        try:
            with self._status.stage(name, number, last), progress.stage(number, self._status.progress, finish):
                yield made
        except BaseException:
            with suppress(OSError):  # a full disk takes no record either; report what failed first
                self._add(name, None, time.time() - start, before)
            raise
        atomic.write_bytes(self.run_dir / "recipe.yaml", self._recipe.encode())
        made |= {"peak": peak_memory.peak(), "work": work}
        self._add(name, {"started": start, **made}, time.time() - start, before)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Record in the status how a run of all stages ends, also between two of them."""
        try:
            yield
        except BaseException as error:
            if self.run_dir.is_dir():
                self._status.fail(error)
            raise

    def stages(self) -> list["StageRecord"]:
        """Return what the stages of this folder's runs took, in the order in which they last started."""
        from cpo_pipe.eval.report.data import StageRecord

        stages = self.read()["stages"]
        return [
            StageRecord(
                name=name if "started" in stage else f"{name} (not finished)",
                seconds=stage["seconds"],
                total_seconds=stage.get("total_seconds", stage["seconds"]),
                spent="; ".join(_spent_in_words(api, spent) for api, spent in stage.get("apis", {}).items()),
            )
            for name, stage in sorted(stages.items(), key=lambda item: item[1].get("started", math.inf))
        ]

    def has_report(self, identity: str) -> bool:
        """Return whether the report of this identity and all files beside it are as they were written."""
        record = self.read()
        if record.get("report", {}).get("identity") != identity:
            return False
        changed = changed_files(self.run_dir, record)
        if changed:
            log.warning("%s: missing or changed; writing it again", ", ".join(changed))
        return not changed

    def record_report(self, identity: str, files: Mapping[str, str], verdict: str) -> None:
        """Record which report was written: its identity, the SHA-256 of each file by its path, and its verdict."""
        self._write(self.read() | {"report": {"identity": identity, "files": dict(files), "verdict": verdict}})

    def read(self) -> Record:
        """Return the content of run.json; a damaged file is moved aside, and a new log begins."""
        path = self.run_dir / "run.json"
        found = run_record(self.run_dir)
        if found is None and path.exists():
            aside = path.with_name(f"run.json.damaged-{time.time_ns()}")
            path.rename(aside)
            log.warning(
                "%s is damaged and was moved to %s; the time and cost of earlier runs are lost", path, aside.name
            )
        return found or {"stages": {}}

    def _add(self, name: str, made: dict[str, Any] | None, seconds: float, before: Mapping[str, Tokens]) -> None:
        """Add one execution of a stage; `made` is None where it failed, which undoes nothing of an earlier one."""
        run = self.read()
        run |= {"store": self._store.name, "versions": versions()}
        earlier = run["stages"].get(name, {})
        total = earlier.get("total_seconds", 0.0) + seconds
        took = {"seconds": round(seconds, 3), "total_seconds": round(total, 3), "apis": earlier.get("apis", {})}
        for api, tokens in before.items():
            _add_spent(took["apis"], self._apis[api], self._apis[api].ledger.used - tokens)
        run["stages"][name] = (earlier if made is None else made) | took
        self._write(run)

    def _write(self, record: Record) -> None:
        atomic.write_bytes(self.run_dir / "run.json", json.dumps(with_checksum(record), indent=2).encode())


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that can change results."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def _add_spent(apis: dict[str, dict[str, Any]], api: ApiModel, used: Tokens) -> None:
    """Add the tokens of one execution to those before; in dollars where the recipe gives prices."""
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
