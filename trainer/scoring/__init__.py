"""Log-probabilities of candidates under a causal language model.

The functions that other stages call (see their docstrings for shapes, units and errors):

- `logprobs.cached_logprobs(store, model, dtype, groups, executor)`: compute those log-probs of a table of groups that
  the store lacks, and return the artifact.
- `logprobs.read_logprobs(rows, groups)`: log π(candidate | prompt) of every candidate from that artifact, summed over
  its tokens, in nats, shape (C,).
- `logprobs.target_logprobs(store, model, examples, executor)`: both for the targets of examples, in float32, with
  the number of tokens.
- `logprobs.load_scorer(model, dtype, probes)`: a frozen model as a `Scorer`, for what is not kept in the store.

What they are made of, each usable on its own:

- `group_table`: groups as Arrow tables; lengths, keys, targets as groups.
- `prefix_tree`: a group as a tree of tokens, where each common prefix is computed once.
- `attention`: attention backends over such trees, registered in transformers.
- `head`: from hidden states to log-probs, without the logits of the prompt.
- `scorer`: `Scorer`, an `nn.Module` that packs groups and returns log-probs with gradients, or logits without.
- `probes`, `self_check`: which attention backend is numerically equivalent to the model's own forward pass.
- `batching`: groups of similar length in forward passes of a token budget.
- `dropout`: removes dropout from a model.

A new attention backend is a function in `attention.py`, a value of `AttentionBackend`, and a place in
`self_check.BACKENDS`; the self-check then decides for which models it is taken.
"""
