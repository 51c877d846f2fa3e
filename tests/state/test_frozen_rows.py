"""Rows frozen in a model that cannot be changed, on one process; under engines: tests/dist/test_frozen.py."""

import pytest
import torch

from engine import freeze_rows
from engine.errors import UsageError
from engine_kernels import convert
from tests.dist.rows import BASE, ROWS, Whole


def made(**options):
    model = Whole(0)
    return model, torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1, **options)


def train(model, optimizer, steps):
    for number in range(steps):
        model(torch.randint(0, ROWS, (4, 7), generator=torch.Generator().manual_seed(number))).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_momentum_that_is_there_moves_nothing_and_is_gone():
    model, optimizer = made()
    train(model, optimizer, 3)
    assert optimizer.state[model.embed.weight]["exp_avg"][:BASE].any()
    freeze_rows((model, optimizer), {"embed.weight": BASE, "head.bias": BASE})
    assert not optimizer.state[model.embed.weight]["exp_avg"][:BASE].any()
    before = model.embed.weight.detach().clone(), model.head.bias.detach().clone(), model.head.weight.detach().clone()
    train(model, optimizer, 3)
    assert torch.equal(model.embed.weight[:BASE], before[0][:BASE])
    assert torch.equal(model.head.bias[:BASE], before[1][:BASE])
    assert not torch.equal(model.embed.weight[BASE:], before[0][BASE:])
    assert (model.head.weight != before[2]).all(), "what was not named is trained"
    assert not optimizer.state[model.embed.weight]["exp_avg"][:BASE].any(), "and stays so: the gradient is masked"


def test_gradients_that_are_not_finite_are_chosen_away_not_multiplied():
    model, optimizer = made()
    model.embed.weight.register_hook(lambda grad: torch.cat([grad[:BASE] * float("inf"), grad[BASE:]]))
    freeze_rows((model, optimizer), {"embed.weight": BASE})
    model(torch.randint(0, ROWS, (4, 7))).backward()
    assert not model.embed.weight.grad[:BASE].any()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite()


def test_a_gradient_that_is_there_already_is_masked():
    model, optimizer = made()
    model(torch.randint(0, ROWS, (4, 7))).backward()
    assert model.embed.weight.grad[:BASE].any()
    freeze_rows((model, optimizer), {"embed.weight": BASE})
    assert not model.embed.weight.grad[:BASE].any()


def test_values_that_are_loaded_later_are_kept_from_then_on():
    model, optimizer = made()
    freeze_rows((model, optimizer), {"embed.weight": BASE})
    train(model, optimizer, 1)
    model.load_state_dict(Whole(5).state_dict())
    train(model, optimizer, 2)
    assert torch.equal(model.embed.weight[:BASE], Whole(5).embed.weight[:BASE])
    model.embed.weight.data = model.embed.weight.data.clone()  # elsewhere in memory
    train(model, optimizer, 2)
    assert torch.equal(model.embed.weight[:BASE], Whole(5).embed.weight[:BASE])


def test_tied_weights_are_frozen_by_either_name_and_trained_again_after_remove():
    model = Whole(0)
    model.head.weight = model.embed.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    before = model.embed.weight.detach().clone()
    frozen = freeze_rows((model, optimizer), {"head.weight": BASE})
    train(model, optimizer, 2)
    assert torch.equal(model.embed.weight[:BASE], before[:BASE])
    frozen.remove()
    train(model, optimizer, 1)
    assert not torch.equal(model.embed.weight[:BASE], before[:BASE])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"embedding.weight": 3}, "'embedding.weight' does not name a parameter of the model: there is none"),
        ({"weight": 3}, "2 parameters end in it: embed.weight, head.weight"),
        ({"embed.weight": ROWS + 1}, rf"embed.weight has shape \[{ROWS}, 6\]; {ROWS + 1} of its rows cannot be frozen"),
        ({"embed.weight": -1}, "-1 of its rows cannot be frozen"),
    ],
)
def test_what_cannot_be_frozen(rows, message):
    with pytest.raises(UsageError, match=message):
        freeze_rows(made(), rows)


def test_members_whose_rows_cannot_be_frozen():
    model, _ = made()
    with pytest.raises(UsageError, match="there is no optimizer"):
        freeze_rows((model, None), {"embed.weight": 3})
    model.embed.weight.requires_grad_(False)
    only_head = torch.optim.SGD(model.head.parameters(), lr=0.1)
    with pytest.raises(UsageError, match=r"embed.weight is in no optimizer"):
        freeze_rows((model, only_head), {"embed.weight": 3})
    split = convert(Whole(0), {"embed": BASE})
    with pytest.raises(UsageError, match=r"embed.trainable is a part of embed.weight already"):
        freeze_rows((split, torch.optim.SGD([p for p in split.parameters() if p.requires_grad], lr=0.1)), {"embed.trainable": 3})
