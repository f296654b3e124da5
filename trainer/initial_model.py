"""The network that a training starts from."""

from collections.abc import Sequence

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.models.end_tokens import name_end_tokens
from cpo_pipe.data.models.model import Model, ScratchModel, made_from, new_network
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.trainer.scoring.dropout import remove_dropout
from cpo_pipe.trainer.scoring.group_table import Extremes


def check_fits(name: str, groups: Extremes, model: str, context: int | None, vocabulary: int | None) -> None:
    """Refuse groups that do not fit into a model's context, or have token ids that it lacks.

    Raises:
        InputError: a group does not fit.
    """
    if context is not None and groups.longest > context:
        raise InputError(
            f"train.{name}: example {groups.longest_in} has {groups.longest} tokens and the context of {model} is "
            f"{context}: lower data.max_prompt_tokens and data.max_target_tokens (or max_new_tokens of a source "
            "of negatives)"
        )
    if vocabulary is not None and groups.largest >= vocabulary:
        raise InputError(
            f"train.{name}: a candidate of example {groups.largest_in} has the token id {groups.largest}, but {model} "
            f"has {vocabulary}: its generator has another vocabulary"
        )


def initial_model(
    name: str,
    init: Model | ScratchModel,
    tokenizer: TokenizerFiles,
    ends: Sequence[int],
    extremes: Extremes,
) -> tuple[PreTrainedModel, PreTrainedConfig]:
    """Make the network to train, in float32 and without dropout; it ends texts as the targets do.

    Returns:
        The network, and the config for its checkpoint, which keeps the dropout.
    """
    model: PreTrainedModel
    if isinstance(init, Model):
        model = init.load(torch.float32)
    else:
        model = scratch_model(init, tokenizer)
        settings = model.config.get_text_config()
        context = getattr(settings, "max_position_embeddings", None)
        check_fits(name, extremes, "the scratch model", context, settings.vocab_size)
    model.train(False)
    name_end_tokens(model, ends)
    return model, remove_dropout(model)


def scratch_model(config: ScratchModel, tokenizer: TokenizerFiles) -> PreTrainedModel:
    """Return a model with random weights, its vocabulary and special tokens taken from the tokenizer.

    Raises:
        InputError: transformers does not know the architecture or a key, or its settings make no model.
    """
    config.check_keys()
    vocabulary = tokenizer.load()
    ids = {"eos_token_id": vocabulary.eos_token_id, "bos_token_id": vocabulary.bos_token_id,
           "pad_token_id": vocabulary.pad_token_id}  # fmt: skip
    try:
        settings = AutoConfig.for_model(config.architecture, vocab_size=len(vocabulary), **ids, **config.config)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            model = new_network(settings)
    except Exception as error:  # a config's faults show in any of an architecture's ways
        raise made_from(config, error) from error
    return model
