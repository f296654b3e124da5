"""Log-probabilities of candidates under a causal language model. Begin with `logprobs`, which keeps them in the store.

A new attention backend is a function in `attention.py`, a value of `AttentionBackend`, and a place in
`self_check.BACKENDS`; the self-check then decides for which models it is taken.
"""
