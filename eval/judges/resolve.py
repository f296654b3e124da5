"""The judges that a recipe names, with what they need."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cpo_pipe.data.chat_date import chat_date
from cpo_pipe.data.embedding import Embedder, EmbeddingMemo
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models import Model, TokenizerFiles, tokenizer_in
from cpo_pipe.data.recipe import Evaluate
from cpo_pipe.data.recipe import Judge as Settings
from cpo_pipe.data.store import Store
from cpo_pipe.data.templates import CHAT
from cpo_pipe.eval.judges.base import Judge
from cpo_pipe.eval.judges.likelihood import LikelihoodJudge
from cpo_pipe.eval.judges.local import LocalJudge
from cpo_pipe.eval.judges.logprobs import Logprobs
from cpo_pipe.eval.judges.openai import OpenAiJudge
from cpo_pipe.eval.judges.query import Query
from cpo_pipe.eval.judges.scores import ExactJudge, LongerJudge, SimilarityJudge
from cpo_pipe.pipeline.engines.openai import ApiModel


@dataclass(frozen=True)
class Means:
    """What judges are made with."""

    apis: Mapping[str, ApiModel]
    model: Callable[[str], Model]
    """From a name in the recipe to the model that it means, whatever its tokenizer is."""
    logprobs: Logprobs


def open_judges(
    config: Evaluate, store: Store, means: Means, template: str, embedder: Embedder | None, memo: EmbeddingMemo | None
) -> list[Judge]:
    """The judges of a recipe; nothing heavy is loaded.

    Args:
        config: the recipe's section.
        store: memoizes hashes of files.
        means: what judges are made with.
        template: of the examples' prompts.
        embedder: the embedding model; None where no judge needs it.
        memo: its embeddings.

    Raises:
        InputError: a model is not there, or has no tokenizer.
    """

    def opened(name: str, settings: Settings) -> Judge:
        if settings.kind == "exact":
            return ExactJudge(name, settings.pattern)
        if settings.kind == "longer":
            return LongerJudge(name)
        if settings.kind == "similarity":
            assert embedder is not None
            assert memo is not None
            return SimilarityJudge(name, memo.encode, embedder.fingerprint)
        query = Query(settings.template)
        if settings.kind == "openai":
            assert settings.api is not None
            api = means.apis[settings.api]
            return OpenAiJudge(name, api, query, settings.both_orders, settings.max_tokens, settings.temperature)
        assert settings.model is not None
        model = means.model(settings.model)
        tokenizer = own_tokenizer(model, store)
        rendered = settings.kind == "local" or template == CHAT
        day = chat_date(tokenizer, store) if rendered else None
        if settings.kind == "likelihood":
            return LikelihoodJudge(name, model, tokenizer, template, means.logprobs, day)
        return LocalJudge(name, model, tokenizer, query, settings.both_orders, settings.engine, means.logprobs, day)

    return [opened(name, settings) for name, settings in config.judges.items()]


def own_tokenizer(model: Model, store: Store) -> TokenizerFiles:
    """The tokenizer in a model's own folder.

    Raises:
        InputError: no tokenizer is there, or it needs Python code of its own.
    """
    return tokenizer_in(model.path, store)


def named_spec(config: Evaluate, judge: Judge) -> Spec:
    """What decides the figures of a judge: its verdicts, the name that its metrics have, and the orders."""
    spec, settings = judge.spec(), config.judges[judge.name]
    if judge.name != settings.kind:
        spec["name"] = judge.name
    if not settings.both_orders:
        spec["both_orders"] = False
    return spec
