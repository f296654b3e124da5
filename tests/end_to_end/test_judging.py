"""Judges in a whole run: what they cost beforehand, what they are asked, and that nothing is asked twice."""

import json
from pathlib import Path
from zlib import crc32

import pyarrow.parquet as pq
import pytest

from cpo_pipe.pipeline.api import client, limits
from tests.support.api_server import Reply, Seen, error, serve, written
from tests.support.project import Project


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BACKOFF", 0.01)
    monkeypatch.setattr(limits, "LONGEST_BACKOFF", 0.1)
    monkeypatch.setattr(client, "_TOGETHER", 0.02)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def options(url: str, judges: str, *more: str) -> list[str]:
    api = f"apis={{mini: {{url: '{url}', model: m, attempts: 2, input_price: 1000, output_price: 2000}}}}"
    sets = [api, f"evaluate.judges={judges}", "evaluate.baseline=ground-truth", *more]
    return [part for value in sets for part in ("--set", value)]


def first(seen: Seen) -> Reply:
    return written(seen, "A")


PAIRS = 8
"""What two systems write for four test examples, against the targets."""


def test_what_is_said_beforehand_is_what_is_asked(made: Project) -> None:
    with serve(first) as server:
        arguments = ["tiny.yaml", *options(server.url, "{taste: {kind: openai, api: mini}, longer: {}}")]
        before = made.made()
        dry = made.cli("evaluate", *arguments, "--dry-run")
        assert dry.status == 0, dry.err
        assert (server.seen, made.made()) == ([], before)
        head, note = dry.out.splitlines()
        assert head.startswith(f"judge taste (apis.mini): {2 * PAIRS} calls to be made, about ")
        prompt = int(head.split("about ")[1].split()[0].replace(",", ""))
        assert f"at most {2 * PAIRS * 16} written: about {(prompt + 2 * 2 * PAIRS * 16) / 1000:.4g} US dollars" in head
        assert note == "prompt tokens are estimated: one for every 4 bytes of UTF-8"

        done = made.cli("evaluate", *arguments)
        assert done.status == 0, done.err
        assert len(server.seen) == 2 * PAIRS
        assert prompt == sum(-(-len(seen.prompt.encode()) // 4) for seen in server.seen)

        again = made.cli("evaluate", *arguments)
        assert again.status == 0, again.err
        # Another artifact, of the same verdicts: figures are made, and nothing is asked.
        assert made.cli("evaluate", *arguments, "--set", "evaluate.bootstrap=60").status == 0
        assert len(server.seen) == 2 * PAIRS
        assert "judge taste (apis.mini): 0 calls" in made.cli("evaluate", *arguments, "--dry-run").out


@pytest.mark.slow
def test_figures_are_called_by_the_judges_name(made: Project) -> None:
    with serve(first) as server:
        done = made.cli(
            "evaluate", "tiny.yaml", *options(server.url, "{taste: {kind: openai, api: mini}, size: {kind: longer}}")
        )
    assert done.status == 0, done.err
    rows = pq.read_table("runs/tiny/latest/metrics.parquet").to_pylist()
    found = {row["metric"]: (row["value"], row["n"]) for row in rows if row["system"] == "cpo"}
    assert found["taste position bias"] == (1, 4), "it always takes the first"
    assert found["taste flip rate"] == (1, 4)
    assert found["taste tie"] == (1, 4)
    assert found["taste unparseable"] == (0, 4)
    assert {"size win rate", "size characters"} <= set(found)
    assert not {metric for metric in found if metric.startswith(("size position", "size flip", "size unparseable"))}


def test_models_that_judge_here(made: Project) -> None:
    judges = "{likely: {kind: likelihood, model: start}, letters: {kind: local, model: start, template: dolly}}"
    settings = ["--set", f"evaluate.judges={judges}", "--set", "evaluate.baseline=ground-truth"]
    # The tiny model's context of 128 tokens leaves the paper's template no room: no verdict, not an error
    done = made.cli("evaluate", "tiny.yaml", *settings)
    assert done.status == 0, done.err
    rows = pq.read_table("runs/tiny/latest/metrics.parquet").to_pylist()
    found = {row["metric"]: row["value"] for row in rows if row["system"] == "cpo"}
    assert found["likely log-prob"] < 0
    assert found["letters unparseable"] == 1
    assert found["letters tie"] == 1
    assert (
        made.cli("evaluate", "tiny.yaml", *settings, "--dry-run").out
        == "nothing that this recipe evaluates costs anything\n"
    )


def test_what_failed_is_said_and_asked_again(made: Project) -> None:
    broken = True

    def script(seen: Seen) -> Reply:
        return error(500, "oops") if broken and crc32(seen.prompt.encode()) % 4 == 0 else written(seen, "A")

    judges = "{first: {kind: openai, api: mini}, second: {kind: openai, api: mini, template: wiki}}"
    with serve(script) as server:
        arguments = ["tiny.yaml", *options(server.url, judges, "apis.mini.attempts=1")]
        failed = made.cli("evaluate", *arguments)
        assert failed.status == 1
        assert "requests got no answer" in failed.error()
        kept = len(server.delivered)
        assert len(server.seen) == 2 * 2 * PAIRS > kept, "the second judge was asked, too"
        broken = False
        done = made.cli("evaluate", *arguments)
        assert done.status == 0, done.err
        assert len(server.seen) - 2 * 2 * PAIRS == 2 * 2 * PAIRS - kept, "what failed, and nothing else"


def test_missing_outputs_count_as_the_longest(project: Project) -> None:
    assert project.cli("prepare", "tiny.yaml").status == 0
    with serve() as server:
        arguments = ["tiny.yaml", *options(server.url, "{taste: {kind: openai, api: mini, both_orders: false}}")]
        dry = project.cli("evaluate", *arguments, "--dry-run")
        assert dry.status == 0, dry.err
        assert server.seen == []
    head, _, *missing = dry.out.splitlines()
    assert head.startswith(f"judge taste (apis.mini): {PAIRS} calls to be made")
    assert missing == [
        f"{name}, greedy: 4 outputs are not generated yet; in queries to judges each counts as 8 tokens, the longest "
        "allowed"
        for name in ("start", "cpo")
    ]
    assert not (project.root / "runs" / "tiny" / "latest" / "metrics.parquet").exists()


# ── systems that are APIs ────────────────────────────────────────────────────────────────────────────────────────


def is_query(seen: Seen) -> bool:
    return "Which response is better?" in str(seen.prompt)


@pytest.mark.slow
def test_systems_that_are_asked_have_their_price_too(made: Project) -> None:
    def script(seen: Seen) -> Reply:
        if is_query(seen):
            return written(seen, "A")
        refused = sum(not is_query(other) for other in server.seen) == 1
        return written(seen, "no", "content_filter" if refused else "stop") if refused else written(seen)

    def calls(*lines: str) -> list[int]:
        return [int(line.split(": ", 1)[1].split(" calls")[0]) for line in lines]

    with serve(script) as server:
        more = ("evaluate.systems.gpt={model: mini}", "apis.mini.system=be brief", "apis.mini.concurrency=1")
        arguments = ["tiny.yaml", *options(server.url, "{taste: {kind: openai, api: mini}}", *more)]
        before = made.made()
        dry = made.cli("evaluate", *arguments, "--dry-run")
        assert dry.status == 0, dry.err
        assert (server.seen, made.made()) == ([], before)
        system, judge, _, missing = dry.out.splitlines()
        assert system.startswith("system gpt, greedy (apis.mini): 4 calls to be made, about ")
        prompt = int(system.split("about ")[1].split()[0])
        assert f"at most {4 * 8} written: about {(prompt + 2 * 4 * 8) / 1000:.4g} US dollars" in system
        assert missing.startswith("gpt, greedy: 4 outputs are not generated yet; in queries to judges each counts as 8")

        done = made.cli("evaluate", *arguments)
        assert done.status == 0, done.err
        asked = [seen for seen in server.seen if not is_query(seen)]
        assert calls(system, judge) == [len(asked), len(server.seen) - len(asked)] == [4, 2 * (PAIRS + 4)]
        assert prompt == sum(-(-len(f"be brief{seen.prompt}".encode()) // 4) for seen in asked)

        again = made.cli("evaluate", *arguments, "--dry-run").out.splitlines()
        assert calls(*again[:2]) == [0, 0], "what was refused is not asked again"
        assert len(again) == 3
        alone = made.cli("evaluate", *arguments, "--set", "evaluate.judges=[longer]", "--dry-run").out.splitlines()
        assert [line.split(" (")[0] for line in alone[:-1]] == ["system gpt, greedy"]


@pytest.mark.slow
def test_who_has_the_answers_of_another_costs_nothing(made: Project) -> None:
    """A server that takes no top-k has one answer whatever that is; and that it is not used is said once."""
    judges = ("{one: {kind: openai, api: mini, both_orders: false}, two: {kind: openai, api: mini}, "
              "three: {kind: openai, api: mini}}")  # fmt: skip
    decodings = "evaluate.decodings={a: {top_k: 5}, b: {top_k: 5}, c: {top_k: 6}}"
    systems = "evaluate.systems={gpt: {model: mini}, twin: {model: mini}}"
    with serve(lambda seen: written(seen, "A" if is_query(seen) else "")) as server:
        arguments = ["tiny.yaml", *options(server.url, judges, systems, decodings)]
        dry = made.cli("evaluate", *arguments, "--dry-run").out.splitlines()
        systems_said = [line.split(" calls")[0].split(": ")[1] for line in dry if line.startswith("system ")]
        assert systems_said == ["4", "0", "0", "0", "0", "0"]
        done = made.cli("evaluate", *arguments)
        assert done.status == 0, done.err
        assert sum(not is_query(seen) for seen in server.seen) == 4
        assert done.err.count("top_k 5 is not used") == 1

        fresh = [*arguments, "--set", "evaluate.judges.one.template=wiki", "--set", "evaluate.judges.two.template=wiki"]
        fresh += ["--set", "evaluate.judges.three.template=wiki", "--set", "evaluate.decodings={a: {top_k: 5}}"]
        fresh += ["--set", "evaluate.systems={gpt: {model: mini}}"]
        before = len(server.seen)
        dry = made.cli("evaluate", *fresh, "--dry-run").out.splitlines()
        said = [int(line.split(" calls")[0].split(": ")[1]) for line in dry if line.startswith("judge ")]
        assert said == [4, 4, 0]
        assert made.cli("evaluate", *fresh).status == 0
        assert len(server.seen) - before == sum(said)


@pytest.mark.slow
def test_an_unused_top_k_is_said_once_for_each(made: Project) -> None:
    decodings = "evaluate.decodings={a: {top_k: 5}, b: {top_k: 5, top_p: 0.5}, c: {top_k: 6, top_p: 0.7}}"
    with serve() as server:
        done = made.cli(
            "evaluate",
            "tiny.yaml",
            *options(server.url, "[longer]", "evaluate.systems={gpt: {model: mini}}", decodings),
        )
        assert done.status == 0, done.err
        assert len(server.seen) == 3 * 4
    assert [done.err.count(f"top_k {k} is not used") for k in (5, 6)] == [1, 1]


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that is there, except the cache of files' hashes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != "file-hashes.json"
    }


@pytest.mark.slow
def test_what_is_said_beforehand_merges_and_downloads_nothing(made: Project) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(made.model)
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(made.root / "adapter")
    with serve(first) as server:
        lora = (
            "evaluate.systems.lora={model: adapter}",
            "evaluate.ensembles={mix: {of: [adapter, cpo], alphas: [0.5]}}",
        )
        arguments = ["tiny.yaml", *options(server.url, "{taste: {kind: openai, api: mini}}", *lora)]
        before = tree(made.root)
        hub = ["--set", "evaluate.systems.big={model: no-such-owner/no-such-model}"]
        after_adapter = ["--set", "train.start.init=adapter"]
        for more, absent in (([], ["lora", "mix@0.5"]), (hub, ["lora", "big", "mix@0.5"]),
                             (after_adapter, ["start", "cpo", "lora", "mix@0.5"])):  # fmt: skip
            dry = made.cli("evaluate", *arguments, *more, "--dry-run")
            assert dry.status == 0, dry.err
            missing = [line.split(",")[0] for line in dry.out.splitlines() if "outputs are not generated yet" in line]
            assert missing == absent
            assert "system lora is not available yet: model adapter: the adapter is not merged with " in dry.err
            assert tree(made.root) == before
            assert server.seen == []
        (said,) = [line for line in made.cli("evaluate", *arguments, "--dry-run").out.splitlines() if "taste" in line]
        done = made.cli("evaluate", *arguments)
        assert done.status == 0, done.err
        assert f"taste (apis.mini): {len(server.seen)} calls to be made" in said
        again = made.cli("evaluate", *arguments, "--dry-run")
        assert "judge taste (apis.mini): 0 calls" in again.out
        assert " yet" not in again.out + again.err


@pytest.mark.slow
def test_what_a_failed_evaluation_cost_is_counted(made: Project) -> None:
    broken = True

    def script(seen: Seen) -> Reply:
        return error(400, "no such thing") if broken and len(server.seen) > 2 else written(seen)

    def record() -> dict:
        return json.loads((made.root / "runs/tiny/latest/run.json").read_text())["stages"]["evaluate"]

    def spent() -> tuple[int, int]:
        return record()["apis"]["mini"]["prompt_tokens"], record()["apis"]["mini"]["written_tokens"]

    with serve(script) as server:
        more = ("evaluate.systems.gpt={model: mini}", "apis.mini.concurrency=1")
        arguments = ["tiny.yaml", *options(server.url, "[longer]", *more)]
        earlier = record()
        failed = made.cli("evaluate", *arguments)
        assert failed.status == 2, failed.err
        assert spent() == (20, 10), "two answers"
        assert not {"artifact", "started"} & record().keys(), "it is not done"
        first = record()["total_seconds"]
        assert first == record()["seconds"]
        broken = False
        done = made.cli("evaluate", *arguments)
        assert done.status == 0, done.err
        assert spent() == (server.tokens["prompt_tokens"], server.tokens["completion_tokens"]) == (40, 20)
        assert record()["artifact"] != earlier["artifact"]
        assert record()["total_seconds"] == pytest.approx(first + record()["seconds"], abs=0.002)
        assert record()["apis"]["mini"]["usd"] == pytest.approx(40 / 1000 + 20 * 2 / 1000)
    assert "mini: 40 prompt tokens and 20 written" in (made.root / "runs/tiny/latest/report.html").read_text()


@pytest.mark.slow
def test_two_judges_by_similarity_are_one(made: Project) -> None:
    done = made.cli("evaluate", "tiny.yaml", "--set", "evaluate.judges={similarity: {}, near: {kind: similarity}}")
    assert done.status == 2
    assert done.error() == (
        "error: recipe tiny.yaml: evaluate.judges: similarity and near have the same metric "
        '"cosine to target"; remove one'
    )
    assert made.cli("evaluate", "tiny.yaml", "--set", "evaluate.judges={near: {kind: similarity}}").status == 0


def test_each_of_several_samples_has_its_price(made: Project) -> None:
    systems = "evaluate.systems={gpt: {model: mini}}"
    decodings = "evaluate.decodings={greedy: {temperature: 0}, hot: {samples: 3}}"
    with serve() as server:
        arguments = ["tiny.yaml", *options(server.url, "[longer]", systems, decodings)]
        dry = made.cli("evaluate", *arguments, "--dry-run").out.splitlines()
        calls = {line.split(" (")[0]: int(line.split(" calls")[0].split(": ")[1]) for line in dry[:-1]}
        assert calls == {"system gpt, greedy": 4, "system gpt, hot": 12}
        assert f"at most {12 * 8} written" in dry[1]
        done = made.cli("evaluate", *arguments)
        assert done.status == 0, done.err
        assert len(server.seen) == 16
    rows = pq.read_table("runs/tiny/latest/metrics.parquet").to_pylist()
    assert {row["decoding"] for row in rows if row["metric"] == "self-BLEU"} == {"hot"}
