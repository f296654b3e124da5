"""What an engine samples, in the order of the requests."""

from collections.abc import Sequence

from cpo_pipe.pipeline.engines.base import Engine, Request, Sample, Sampling


def answers(engine: Engine, requests: Sequence[Request], sampling: Sampling) -> list[list[Sample]]:
    """Of each request its samples; each is answered once."""
    found = list(engine.generate(requests, sampling))
    assert sorted(place for place, _ in found) == list(range(len(requests)))
    return [samples for _, samples in sorted(found, key=lambda answer: answer[0])]
