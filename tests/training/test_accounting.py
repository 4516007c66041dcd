import torch
from torch import nn

from wasi_export.training.accounting import LiveBytes, count_memory

KB = 1024


def linear():
    model = nn.Linear(64, 64, bias=False)  # 16 KB
    return model, torch.optim.AdamW(model.parameters())


def test_what_is_alive_at_once_is_added_up_and_what_is_gone_is_not():
    model, optimizer = linear()
    with count_memory(model, optimizer) as account:
        first = torch.empty(KB)
        second = torch.empty(KB)
        del first
        third = torch.empty(KB)
        assert account.peak.activations == 8 * KB
        view = third.view(4, -1)[1:].T  # no new memory
        assert account.peak.activations == 8 * KB
        del second, third
        kept = torch.empty(KB)
        assert account.peak.activations == 8 * KB  # the view keeps its storage
        del view, kept
    assert account.peak == LiveBytes(parameters=16 * KB, activations=8 * KB)


def test_a_step_is_split_into_what_its_memory_is():
    model, optimizer = linear()
    with count_memory(model, optimizer) as account:
        for _ in range(2):
            x = torch.ones(KB, 64)  # 256 KB
            account.count(x, "inputs")
            hidden = model(x)  # 256 KB, as is its exponential, which is kept for the backward pass
            hidden.exp().sum().backward()
            del hidden, x
            assert account.peak.gradients == 0
            optimizer.step()
            optimizer.zero_grad()
    peak = account.peak
    assert (peak.parameters, peak.inputs) == (16 * KB, 256 * KB)
    assert 32 * KB <= peak.optimizer < 33 * KB  # two moments and a step count
    assert 3 * 256 * KB <= peak.activations < 3 * 256 * KB + KB  # hidden, its exponential and its gradient
    assert 2 * 256 * KB <= account.saved_bytes < 2 * 256 * KB + KB


def test_accumulated_gradients_are_told_from_activations():
    model, optimizer = linear()
    with count_memory(model, optimizer) as account:
        model(torch.ones(1, 64)).sum().backward()
        large = torch.empty(64 * KB)
        del large
    assert account.peak.gradients == 16 * KB
    assert account.peak.activations < 257 * KB


def test_nothing_is_counted_or_hooked_afterwards():
    model, optimizer = linear()
    with count_memory(model, optimizer) as account:
        pass
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    assert account.peak == LiveBytes(parameters=16 * KB)
