"""Log-probs of the head against log_softmax, and its memory."""

import pytest
import torch
from torch import Tensor

from cpo_pipe.trainer.scoring.head import Head


@pytest.mark.parametrize("memory", [1 << 30, 4 * 50 * 7, 1])
@pytest.mark.parametrize(("scale", "cap", "bias"), [(1.0, None, False), (0.5, None, True), (2.0, 3.0, True)])
def test_the_head_against_log_softmax(
    memory: int, scale: float, cap: float | None, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpo_pipe.trainer.scoring.head.CHUNK_BYTES", 4 * 50 * 3)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((20, 8), (50, 8), (50,))]
    row = torch.tensor([0, 0, 0, 1, 2, 4, 4, 19])
    label = torch.tensor([3, 4, 49, 0, 7, 7, 8, 1])
    first = [sum(1 for r in row if r < s) for s in range(21)]
    upstream = torch.randn(8, generator=generator, dtype=torch.float64)
    results = []
    for dtype in (torch.float64, torch.float32):
        hidden, weight, offset = (tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors)
        if dtype == torch.float64:
            logits = scale * (hidden @ weight.t() + (offset if bias else 0))
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            values = logits.log_softmax(-1)[row, label]
        else:
            values = Head(scale, cap).logprobs(hidden, weight, offset if bias else None, row, label, first, memory)
        (values * upstream.to(dtype)).sum().backward()
        results.append([values, hidden.grad, weight.grad, *([offset.grad] if bias else [])])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [32_000, 256_000])
def test_memory_of_large_vocabularies_stays_within_the_cap(vocabulary: int) -> None:
    # 300 positions times 256,000 floats are 307 MB; the cap allows 8 MB of them.
    peak = 0

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal peak
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.shape[-1:] == (vocabulary,):
                peak = max(peak, result.numel() * result.itemsize)
            return result

    hidden = torch.randn(300, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    row = torch.arange(300)
    with Count():
        Head(1.0, None).logprobs(hidden, weight, None, row, row, list(range(301)), 8 << 20).sum().backward()
    assert 0 < peak <= 8 << 20


def test_a_second_backward_pass_is_refused() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4)
    values = Head(1.0, None).logprobs(hidden, weight, None, torch.arange(3), torch.arange(3), [0, 1, 2, 3], 1 << 20)
    values.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second one is not possible"):
        values.sum().backward()
