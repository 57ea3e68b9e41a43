import copy
import math

import pytest
import torch
from torch import nn

from hf_compress.constraint import constrain
from hf_compress.pruning.regrowth import RigL
from hf_compress.targets import find_targets

STEPS, INTERVAL = 40, 4


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))


def loss_of(net, step):
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
    return (net(x) - 2 * x[:, :4]).square().mean()


def begin(net, optimizer, done=0, **settings):
    rigl = RigL(0.75, **({"fraction": 0.3, "interval": INTERVAL} | settings))
    rigl.at(done, STEPS)
    constrain(optimizer, find_targets(net).parameters, rigl)
    return rigl


def train(net, optimizer, rigl, first=0, last=STEPS):
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        rigl.at(step + 1, STEPS)
        optimizer.step()


def test_equals_its_definition_written_naively():
    ours = network()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    train(ours, optimizer, begin(ours, optimizer))

    naive = network()
    optimizer = torch.optim.SGD(naive.parameters(), lr=0.1, momentum=0.9)
    weights = [naive[0].weight, naive[2].weight]
    masks = []
    with torch.no_grad():
        for w in weights:
            order = w.abs().flatten().argsort(stable=True)
            mask = torch.ones(w.numel(), dtype=torch.bool)
            mask[order[: round(0.75 * w.numel())]] = False
            masks.append(mask.view_as(w))
            w.mul_(masks[-1])
    moved = 0
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss_of(naive, step - 1).backward()
        if step % INTERVAL == 0 and step < 30:
            part = 0.15 * (1 + math.cos(math.pi * step / 30))
            for i, w in enumerate(weights):
                count = round(part * int(masks[i].sum()))
                active = [j for j in range(w.numel()) if masks[i].flatten()[j]]
                size, slope = w.detach().abs().flatten(), w.grad.abs().flatten()
                dropped = set(sorted(active, key=lambda j: float(size[j]))[:count])
                inactive = [j for j in range(w.numel()) if j not in active or j in dropped]
                grown = sorted(inactive, key=lambda j: -float(slope[j]))[:count]
                mask = torch.zeros(w.numel(), dtype=torch.bool)
                mask[[*(set(active) - dropped), *grown]] = True
                new = mask.view_as(w) & ~masks[i]
                moved += int(new.sum())
                optimizer.state[w]["momentum_buffer"][new] = 0  # of when they were pruned
                masks[i] = mask.view_as(w)
        for w, mask in zip(weights, masks, strict=True):
            w.grad *= mask
        optimizer.step()
        with torch.no_grad():
            for w, mask in zip(weights, masks, strict=True):
                w.mul_(mask)
    assert moved > 10
    assert ours[0].weight.equal(naive[0].weight)
    assert ours[2].weight.equal(naive[2].weight)


def test_what_is_grown_does_not_remember_how_it_moved_before():
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    rigl = begin(net, optimizer, interval=2)
    train(net, optimizer, rigl, 0, 3)
    weight = net[0].weight
    before = weight.detach() != 0
    optimizer.zero_grad()
    loss_of(net, 3).backward()
    slope = weight.grad.clone()
    optimizer.state[weight]["exp_avg"].fill_(100.0)  # none of which may reach what is grown
    rigl.at(4, STEPS)
    optimizer.step()
    grown = (optimizer.state[weight]["hf_compress_mask"] > 0) & ~before
    assert grown.any()
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"][grown], 0.1 * slope[grown])
    assert (optimizer.state[weight]["exp_avg"][~grown] > 80).all()


def test_is_as_sparse_from_the_beginning_and_keeps_only_a_mask():
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    rigl = begin(net, optimizer)
    for step in range(STEPS):
        for layer in (net[0], net[2]):
            zeros = int((layer.weight == 0).sum())
            assert zeros == round(0.75 * layer.weight.numel())
        train(net, optimizer, rigl, step, step + 1)
    ours = {key for key in optimizer.state[net[0].weight] if str(key).startswith("hf_compress")}
    assert ours == {"hf_compress_mask"}
    assert rigl.sparsity == 0.75
    assert rigl.finished


def test_the_mask_moves_until_the_end_and_no_longer():
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    rigl, masks = begin(net, optimizer, end=0.5), []
    for step in range(STEPS):
        train(net, optimizer, rigl, step, step + 1)
        masks.append(net[0].weight != 0)
    changes = [i + 1 for i in range(1, STEPS) if not masks[i].equal(masks[i - 1])]
    assert changes
    assert set(changes) <= set(range(INTERVAL, 20, INTERVAL))


@pytest.mark.parametrize("stop", [3, 4, 17])
def test_resume_is_bit_equal(stop):
    whole = network()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    train(whole, optimizer, begin(whole, optimizer))

    part = network()
    optimizer = torch.optim.AdamW(part.parameters(), lr=1e-2)
    train(part, optimizer, begin(part, optimizer), 0, stop)
    saved = copy.deepcopy((part.state_dict(), optimizer.state_dict()))
    rest = network()
    optimizer = torch.optim.AdamW(rest.parameters(), lr=1e-2)
    rest.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(rest, optimizer, begin(rest, optimizer, stop), stop)
    assert rest[0].weight.equal(whole[0].weight)


def test_a_weight_that_lost_all_its_gradients_is_left_in_peace():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    rigl = begin(net, optimizer)
    for step in range(8):
        optimizer.zero_grad()
        net[0](torch.randn(3, 8)).sum().backward()  # the second layer takes no part
        rigl.at(step + 1, STEPS)
        optimizer.step()
    assert int((net[2].weight == 0).sum()) == round(0.75 * 48)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sparsity": 90}, "pass 0.8"),
        ({"sparsity": None}, "pass 0.8"),
        ({"fraction": 0.0}, r"\(0, 1\]"),
        ({"fraction": 1.5}, r"\(0, 1\]"),
        ({"fraction": "0.3"}, "such as 0.3"),
        ({"interval": 0}, "1 or more"),
        ({"interval": True}, "1 or more"),
        ({"end": 1.5}, "fraction of the training"),
        ({"end": -3}, "count from 0"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        RigL(**({"sparsity": 0.5} | wrong))


@pytest.mark.parametrize("wrong", [{"interval": 100}, {"interval": 10, "end": 10}])
def test_a_training_without_an_exchange_is_refused(wrong):
    net = network()
    rigl = RigL(0.5, **wrong)
    rigl.at(0, STEPS)
    with pytest.raises(ValueError, match="`interval` is 10.*would never move: pass a shorter"):
        constrain(torch.optim.SGD(net.parameters(), lr=0.1), find_targets(net).parameters, rigl)


def test_a_sparser_model_is_refused():
    net = network()
    nn.init.zeros_(net[0].weight)
    with pytest.raises(ValueError, match=r"0\.weight is sparser than 0\.75"):
        begin(net, torch.optim.SGD(net.parameters(), lr=0.1))


def test_a_loop_that_never_tells_the_time_is_told():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    constrain(optimizer, find_targets(net).parameters, RigL(0.5))
    loss_of(net, 0).backward()
    with pytest.raises(RuntimeError, match=r"rigl\.at"):
        optimizer.step()
