"""Texts from which TRL makes the token ids that we train on.

TRL tokenizes prompt and completion together and appends an EOS token to both completions, so texts are written without
one. A text is written so that TRL makes our ids of it (SentencePiece drops the space at
the start of what it decodes alone). Where no such text exists, because tokens merge across prompt and completion, TRL
trains on other ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpo_pipe.data.models.answers import text_behind
from cpo_pipe.data.models.chat import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptedCandidate:
    """A candidate of a group with its prompt."""

    conversation: Conversation
    """The prompt before any template."""
    rendered: str
    """The prompt as the recipe's template renders it."""
    prompt_ids: list[int]
    text: str
    token_ids: list[int]

    @property
    def all_ids(self) -> list[int]:
        """The token ids that we train on, prompt first."""
        return [*self.prompt_ids, *self.token_ids]


@dataclass(frozen=True)
class WrittenCandidate:
    """A candidate as preference data has it: two texts, or two lists of messages and the tools."""

    prompt: Any
    completion: Any
    same_ids: bool
    """Whether TRL makes our token ids of it."""
    tools: str | None = None
    """As JSON."""


def as_texts(candidates: Sequence[PromptedCandidate], tokenizer: "PreTrainedTokenizerBase") -> list[WrittenCandidate]:
    """Return candidates as texts: the stored text where TRL makes our ids of it, or else what it adds to its prompt.

    The latter is taken also where neither gives our ids: otherwise a model could tell rejected texts by the space at
    their start, which chosen ones have.
    """
    end = str(tokenizer.eos_token)

    def encoded(texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
        return ids

    prompts = [candidate.rendered for candidate in candidates]
    bos = str(tokenizer.bos_token or "")
    # A chat template writes the BOS token that TRL's tokenizing puts before any text.
    begun = [prompt for prompt in dict.fromkeys(prompts) if bos and prompt.startswith(bos)]
    doubled = {
        prompt for prompt, ids in zip(begun, encoded(begun), strict=True) if ids[1:2] == [tokenizer.bos_token_id]
    }
    prompts = [prompt.removeprefix(bos) if prompt in doubled else prompt for prompt in prompts]
    texts = [candidate.text for candidate in candidates]
    same_ids = [False] * len(candidates)
    for from_ids in (False, True):
        left = [place for place, found in enumerate(same_ids) if not found]
        if from_ids:
            for place in left:
                candidate = candidates[place]
                texts[place] = text_behind(candidate.prompt_ids, candidate.token_ids, tokenizer)
        for place, ids in zip(left, encoded([prompts[place] + texts[place] + end for place in left]), strict=True):
            same_ids[place] = ids == candidates[place].all_ids
    return [WrittenCandidate(*written) for written in zip(prompts, texts, same_ids, strict=True)]
