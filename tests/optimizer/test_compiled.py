"""A compiled step in a usual training loop: gradients set to None, a schedule, and nothing compiled anew."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim.lr_scheduler import LambdaLR

from asgo import ASGO

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def build(capturable):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 6))
    optimizer = ASGO(model.named_parameters(), lr=torch.tensor(1e-2), root="minimax", capturable=capturable)
    return model, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))


def train(model, optimizer, schedule, step, count):
    """A usual loop; what `count` says after every step."""
    counts, dice = [], torch.Generator().manual_seed(1)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(3, 4, generator=dice)).square().mean().backward()
        step()
        schedule.step()
        counts.append(count())
    return counts


@pytest.mark.parametrize("capturable", [False, True])
def test_nothing_is_compiled_after_the_second_step(capturable):
    torch._dynamo.reset()
    plain, compiled = build(capturable), build(capturable)
    train(*plain, plain[1].step, int)
    counter = CompileCounter()
    counts = train(*compiled, torch.compile(compiled[1].step, backend=counter), lambda: counter.frame_count)
    assert counts[0] > 0
    assert counts[1:] == counts[1:2] * 5
    for param, other in zip(plain[0].parameters(), compiled[0].parameters(), strict=True):
        torch.testing.assert_close(other, param, rtol=1e-4, atol=1e-6)
