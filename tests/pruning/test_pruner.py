import copy

import pytest
import torch
from torch import nn

from hf_compress.constraint import constrain
from hf_compress.pruning.pruner import Pruner
from hf_compress.targets import find_targets

STEPS = 40


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def train(net, optimizer, pruner, first=0, last=STEPS):
    for step in range(first, last):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (net(x) - 2 * x[:, :4]).square().mean().backward()
        pruner.at(step + 1, STEPS)
        optimizer.step()


def begin(net, optimizer, *, done=0, **settings):
    selection = find_targets(net)
    pruner = Pruner(targets=selection.targets, **({"interval": 4, "end": 0.5} | settings))
    pruner.at(done, STEPS)
    constrain(optimizer, selection.parameters, pruner)
    return pruner


PATTERNS = [
    {"pattern": "2:4"},
    {"pattern": "1:4", "score": "taylor"},
    {"pattern": "4x1", "sparsity": 0.7},
    {"pattern": "row", "sparsity": 0.5, "score": "taylor"},
    {"pattern": "2x2", "sparsity": 0.6, "scope": "row"},
]


@pytest.mark.parametrize("settings", PATTERNS, ids=lambda s: s["pattern"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [9, 20, 33])
def test_resume_is_bit_equal_for_every_pattern(settings, dtype, stop):
    def start():
        net = network().to(dtype)
        return net, torch.optim.AdamW(net.parameters(), lr=1e-2)

    def run(net, optimizer, pruner, first, last):
        for step in range(first, last):
            x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step)).to(dtype)
            optimizer.zero_grad()
            (net(x) - 2 * x[:, :4]).square().mean().backward()
            pruner.at(step + 1, STEPS)
            optimizer.step()

    whole, optimizer = start()
    run(whole, optimizer, begin(whole, optimizer, **settings), 0, STEPS)
    part, optimizer = start()
    run(part, optimizer, begin(part, optimizer, **settings), 0, stop)
    saved = copy.deepcopy((part.state_dict(), optimizer.state_dict()))
    rest, optimizer = start()
    rest.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    pruner = begin(rest, optimizer, done=stop, **settings)
    run(rest, optimizer, pruner, stop, STEPS)
    assert pruner.finished
    for i in (0, 2):
        assert rest[i].weight.equal(whole[i].weight)


@pytest.mark.parametrize("settings", PATTERNS, ids=lambda s: s["pattern"])
def test_what_it_counts_is_what_there_is(settings):
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    pruner = begin(net, optimizer, **settings)
    before = 0.0
    for step in range(STEPS):
        train(net, optimizer, pruner, step, step + 1)
        zeros = sum(int((net[i].weight == 0).sum()) for i in (0, 2))
        assert pruner.pruned == zeros
        assert pruner.sparsity >= before
        before = pruner.sparsity
    assert pruner.pruned == pruner.due >= round(pruner.schedule.final * pruner.total)


def test_n_of_m_says_its_sparsity_itself():
    assert Pruner(pattern="2:4").schedule.final == 0.5
    assert Pruner(0.75, pattern="1:4").schedule.final == 0.75
    assert Pruner(1 / 3, pattern="2:3").schedule.final == pytest.approx(1 / 3)


def test_a_sparser_start_stays_sparser_than_the_pattern():
    net = network()
    with torch.no_grad():
        net[0].weight[:, 1:] *= (torch.arange(15) % 4 == 3).float()  # at most 1 of 4 is left
    zeros = net[0].weight == 0
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    train(net, optimizer, begin(net, optimizer, pattern="2:4"))
    assert (net[0].weight[zeros] == 0).all()
    assert ((net[2].weight == 0).reshape(-1, 4).sum(1) == 2).all()


def test_a_schedule_told_an_earlier_step_revives_the_latent_weights():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)  # latent weights stay what they are
    dense = net[0].weight.detach().clone()
    pruner = begin(net, optimizer, sparsity=0.5, score="magnitude", interval=1)
    train(net, optimizer, pruner, 0, 12)
    fewer, more = net[0].weight.detach().clone(), pruner.pruned
    train(net, optimizer, pruner, 3, 4)
    assert pruner.pruned < more
    revived = (net[0].weight != 0) & (fewer == 0)
    assert revived.any()
    assert net[0].weight[revived].equal(dense[revived])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "give `sparsity`"),
        ({"pattern": "4x1"}, "give `sparsity`"),
        ({"pattern": "2:4", "sparsity": 0.6}, "means 0.5: leave `sparsity` out"),
        ({"pattern": "2:4", "sparsity": 50}, "pass 0.8"),
        ({"pattern": "2;4", "sparsity": 0.5}, "allowed are 'unstructured'"),
        ({"pattern": "row", "sparsity": 0.5, "scope": "row"}, "nothing to rank"),
        ({"sparsity": 0.5, "scope": "column"}, "allowed are"),
        ({"sparsity": 0.5, "score": "wanda "}, "or a `Score` of your own"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        Pruner(**wrong)


def test_a_pattern_that_does_not_divide_is_refused_when_attached():
    net = nn.Sequential(nn.Linear(6, 8))
    with pytest.raises(ValueError, match=r"0\.weight, whose shape is \(8, 6\)"):
        begin(net, torch.optim.SGD(net.parameters(), lr=0.1), pattern="2:4")


def test_diverged_scores_are_refused_in_every_pattern():
    for settings in PATTERNS:
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        pruner = begin(net, optimizer, **settings)
        net(torch.full((4, 16), float("nan"))).sum().backward()
        pruner.at(8, STEPS)
        with pytest.raises(ValueError, match="NaN or infinite"):
            optimizer.step()


def alternating(progress):
    return 1.0 if progress == 1.0 else float(int(8 * progress) % 2)


def test_a_schedule_that_falls_gives_back_what_was_pruned():
    """Dense and sparse in turn (compare AC/DC, arXiv:2106.12379), against a loop written out."""
    net, plain = network(), network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    settings = {"score": "magnitude", "scope": "layer", "schedule": alternating, "interval": 5}
    pruner = begin(net, optimizer, sparsity=0.5, end=1.0, **settings)

    weights = [plain[0].weight, plain[2].weight]
    latents = [weight.detach().clone() for weight in weights]
    masks = [torch.ones_like(weight) for weight in weights]
    for step in range(STEPS):
        train(net, optimizer, pruner, step, step + 1)

        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
        loss = (plain(x) - 2 * x[:, :4]).square().mean()
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        sparse = step + 1 == STEPS or (step + 1) // 5 % 2 == 1
        with torch.no_grad():
            for parameter, gradient in zip(plain.parameters(), gradients, strict=True):
                if parameter.dim() == 1:
                    parameter -= 0.1 * gradient
            for i, gradient in enumerate((gradients[0], gradients[2])):
                latents[i] -= 0.1 * gradient * masks[i]
                if not sparse:
                    masks[i] = torch.ones_like(masks[i])
                elif (step + 1) % 5 == 0:
                    lowest = latents[i].abs().flatten().argsort()[: latents[i].numel() // 2]
                    masks[i] = torch.ones(latents[i].numel()).index_fill(0, lowest, 0).view_as(masks[i])
                weights[i].copy_(latents[i] * masks[i])
        for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)
        assert pruner.sparsity == (0.5 if sparse else 0.0)
