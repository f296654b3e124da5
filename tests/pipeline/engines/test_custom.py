"""The engine of the guide samples from the distribution that the others sample from."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.engines.base import Request, Sampling
from cpo_pipe.pipeline.engines.transformers import TransformersEngine
from tests.support.answers import answers

GUIDE = Path(__file__).parents[3] / "docs" / "guide" / "negatives.md"
GREEDY = Sampling(temperature=0, top_k=0, max_new_tokens=12, stop_ids=())
REQUESTS = [Request([5, 6, 7], 1, 3), Request([9], 1, 4), Request([*range(10, 30)], 1, 5)]


@pytest.fixture(scope="module")
def engines(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, TransformersEngine]:
    """The guide's engine and transformers, with the same model."""
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 30
    names: dict[str, Any] = {"__name__": "my_engines"}
    exec(code, names)
    model = locate_model(str(tiny_model), Store(tmp_path_factory.mktemp("store")))
    return names["Loop"](model), TransformersEngine(model)


@pytest.mark.parametrize("change", [{}, {"temperature": 0.7, "top_k": 1}, {"temperature": 1.0, "top_p": 1e-6}])
def test_one_likeliest_token_is_that_of_transformers(
    engines: tuple[Any, TransformersEngine], change: dict[str, Any]
) -> None:
    endless = replace(GREEDY, **change)
    stop = answers(engines[1], REQUESTS[:1], endless)[0][0].token_ids[4]
    own, known = (answers(engine, REQUESTS, replace(endless, stop_ids=(stop,))) for engine in engines)
    for (ours,), (theirs,) in zip(own, known, strict=True):
        assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
        assert ours.logprob == pytest.approx(theirs.logprob, rel=1e-4)
    assert {sample.finish_reason for (sample,) in own} == {"stop", "length"}


def test_a_sample_depends_on_its_seed_only(engines: tuple[Any, TransformersEngine]) -> None:
    sampling = replace(GREEDY, temperature=1.0, top_k=50)
    (together,) = answers(engines[0], [Request([5, 6, 7], 4, 9)], sampling)
    alone = [answers(engines[0], [Request([5, 6, 7], 1, 9 + k)], sampling)[0][0] for k in range(4)]
    assert together == alone
    assert len({tuple(sample.token_ids) for sample in together}) > 1
