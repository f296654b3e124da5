"""Reward models: sequence classifiers with one output, which rate an answer to a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cpo_pipe.data.batching import batches_by_length
from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import Spec, hash_weights, model_fingerprint, read_json
from cpo_pipe.data.models.chat import ChatTemplate, Conversation, NotRenderable
from cpo_pipe.data.models.chat_date import chat_date
from cpo_pipe.data.models.control_tokens import breaker
from cpo_pipe.data.models.fetch import fetch_folder
from cpo_pipe.data.models.model import Model, check_weights
from cpo_pipe.data.models.tokenizer import TokenizerFiles, tokenizer_in
from cpo_pipe.data.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CPU_TOKENS, GPU_TOKENS = 1 << 10, 1 << 14
"""Tokens per forward pass."""


class Rewards(NamedTuple):
    """Rewards of n answers."""

    rewards: NDArray[np.float32]
    """The model's output for each answer, shape (n,)."""
    truncated: NDArray[np.bool_]
    """Which answers do not fit into the model's window with their prompt, so that their end is not read; shape (n,)."""


Encoded = dict[str, list[int]]
"""What the tokenizer makes of a text: `input_ids`, and `token_type_ids` where the model takes them."""


@dataclass(frozen=True)
class RewardModel:
    """A reward model on disk, loaded at the first text.

    A prompt and its answer are rendered by the tokenizer's chat template; where it has none, they are the tokenizer's
    pair of texts. Control tokens in them are text.
    """

    model: Model
    tokenizer: TokenizerFiles
    chat_date: str | None
    """The date that the chat template prints, where it prints one."""
    _loaded: list["_Loaded"] = field(default_factory=list, repr=False, compare=False)

    def __reduce__(self) -> tuple[type["RewardModel"], tuple[Model, TokenizerFiles, str | None]]:
        return RewardModel, (self.model, self.tokenizer, self.chat_date)  # another process loads its own

    def spec(self) -> Spec:
        """Return what decides the rewards."""
        date = {"chat_date": self.chat_date} if self.chat_date else {}
        return {"model": self.model.fingerprint, "tokenizer": self.tokenizer.fingerprint, **date}

    def window(self) -> int | None:
        """Return how many tokens of prompt and answer it reads, as far as its files say."""
        file = self.tokenizer.path / "tokenizer_config.json"
        longest = read_json(file).get("model_max_length") if file.is_file() else None
        known = [size for size in (self.model.context(), longest) if isinstance(size, int)]
        return min(known, default=None)

    def rate(self, conversations: Sequence[Conversation], answers: Sequence[str]) -> Rewards:
        """Return the reward of each answer to the conversation at its index, in float32.

        Raises:
            InputError: the model cannot be loaded, or its chat template cannot render a conversation.
            RunError: the weights are damaged.
        """
        if not self._loaded:
            self._loaded.append(_Loaded(self))
        return self._loaded[0].rate(conversations, answers, self.window())


def locate_reward_model(name: str, store: Store, key: str) -> RewardModel:
    """Return the reward model that a folder or hub name leads to; loads nothing.

    Args:
        name: the folder or hub name.
        store: keeps the date that a chat template prints.
        key: where the recipe names it, for messages.

    Raises:
        InputError: no such model, it is no sequence classifier with one output, its files are damaged, or it asks to
            run code of its own.
    """
    folder = fetch_folder(name, "reward model")
    check_weights(folder)
    fingerprint = model_fingerprint(folder, store.hash_file)
    config = read_json(folder / "config.json")
    kinds = config.get("architectures") or []
    if not any(str(kind).endswith("ForSequenceClassification") for kind in kinds):
        raise InputError(
            f"{key} {name}: its architecture is {', '.join(map(str, kinds)) or 'not named'}, not one for sequence "
            "classification; name a reward model that transformers loads with AutoModelForSequenceClassification"
        )
    labels = len(config.get("id2label") or {}) or config.get("num_labels", 2)  # transformers' default
    if labels != 1:
        raise InputError(f"{key} {name}: it has {labels} outputs for a text, but a reward is one; name a reward model")
    model = Model(name, folder, fingerprint, hash_weights(folder, store.hash_file))
    tokenizer = tokenizer_in(folder, store)
    return RewardModel(model, tokenizer, chat_date(tokenizer, store))


class _Loaded:
    """A reward model in memory."""

    def __init__(self, model: RewardModel):
        import torch
        from transformers import AutoModelForSequenceClassification

        self._name = model.model.name
        self._tokenizer: PreTrainedTokenizerBase = model.tokenizer.load()
        has_template = bool(self._tokenizer.chat_template)
        self._template = ChatTemplate(self._tokenizer, model.chat_date) if has_template else None
        self._as_text = breaker(self._tokenizer)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network: Any = model.model.load(torch.float32, AutoModelForSequenceClassification)
        self._network: PreTrainedModel = network.eval().to(self._device)

    def rate(self, conversations: Sequence[Conversation], answers: Sequence[str], window: int | None) -> Rewards:
        """Return the reward of each answer. Those of like length share a forward pass."""
        encoded = [self._encode(*fields) for fields in zip(conversations, answers, strict=True)]
        whole = np.array([len(each["input_ids"]) for each in encoded], np.int64)
        lengths = whole if window is None else np.minimum(whole, window)
        padding = self._network.config.get_text_config().pad_token_id
        # A decoder reads its reward behind the last token that is not the padding of its config; without any it takes
        # one text at a time.
        budget = 1 if padding is None else CPU_TOKENS if self._device.type == "cpu" else GPU_TOKENS
        rewards = np.zeros(len(encoded), np.float32)
        for batch in batches_by_length(lengths, budget):
            rewards[batch] = self._forward([encoded[place] for place in batch], int(lengths[batch].max()), padding or 0)
        return Rewards(rewards, whole > lengths)

    def _encode(self, conversation: Conversation, answer: str) -> Encoded:
        if self._template is None:
            pair = self._tokenizer(self._as_text(conversation.text), self._as_text(answer), verbose=False)
            return {name: pair[name] for name in ("input_ids", "token_type_ids") if name in pair}
        try:
            return {"input_ids": self._template.whole_ids(conversation, {"role": "assistant", "content": answer})}
        except NotRenderable as error:
            raise InputError(
                f"reward model {self._name}: its chat template cannot render the conversation "
                f"{conversation.text[:60]!r} ({error}); name a reward model for such conversations"
            ) from error

    def _forward(self, encoded: Sequence[Encoded], length: int, padding: int) -> NDArray[np.float32]:
        import torch

        def padded(name: str, fill: int) -> torch.Tensor:
            rows = [(each[name][:length] + [fill] * length)[:length] for each in encoded]
            return torch.tensor(rows, device=self._device)

        inputs = {name: padded(name, padding if name == "input_ids" else 0) for name in encoded[0]}
        ones = torch.tensor([[len(each["input_ids"])] for each in encoded], device=self._device)
        inputs["attention_mask"] = (torch.arange(length, device=self._device) < ones).long()
        with torch.inference_mode():
            logits = self._network(**inputs).logits
        rewards: NDArray[np.float32] = logits[:, 0].float().cpu().numpy()
        return rewards
