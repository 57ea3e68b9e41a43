import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_compress.constraint import constrain
from hf_compress.pruning.input_squares import InputSquares
from hf_compress.pruning.pruner import Pruner
from hf_compress.pruning.scores import SCORES, Noise, Score, find_score
from hf_compress.targets import find_targets

STEPS, INTERVAL = 24, 3


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12, bias=False), nn.Tanh(), nn.Linear(12, 4, bias=False))


def batch(step):
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
    return x, 2 * x[:, :4]


def loss_of(net, step):
    x, y = batch(step)
    return (net(x) - y).square().mean()


def prune(net, score, *, sparsity=0.6, **settings):
    """Train with a pruner; the statistics as they were at the last ranking."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    pruner = Pruner(
        sparsity, score=score, interval=INTERVAL, end=STEPS, min_keep=0.0, schedule="linear", **settings
    )
    constrain(optimizer, find_targets(net).parameters, pruner)
    statistics = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        pruner.at(step + 1, STEPS)
        optimizer.step()
        state = [optimizer.state[layer.weight] for layer in (net[0], net[2])]
        if "hf_compress_statistic" in state[0]:
            statistics = [s["hf_compress_statistic"].clone() for s in state]
    return statistics


class Masked(torch.autograd.Function):
    """The mask as a function of scores, with the straight-through gradient (arXiv:2005.07683)."""

    @staticmethod
    def forward(ctx, scores, mask):
        return mask.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def test_a_score_of_your_own_such_as_movement_is_training_the_scores_of_parametrized_masks():
    movement = Score(
        name="movement",
        paper="arXiv:2005.07683",
        formula=lambda weight, total: total,
        accumulate=lambda total, weight, grad, decay: total.sub_(weight * grad),
    )
    ours = network()
    statistics = prune(ours, movement)

    usual = network()
    layers = (usual[0], usual[2])
    latent = [layer.weight.detach().clone().requires_grad_() for layer in layers]
    scores = [torch.zeros_like(w, requires_grad=True) for w in latent]
    masks = [torch.ones_like(w) for w in latent]
    weights = torch.optim.AdamW(latent, lr=1e-2)
    for step in range(STEPS):
        x, y = batch(step)
        shown = [w * Masked.apply(s, m) for w, s, m in zip(latent, scores, masks, strict=True)]
        loss = (torch.tanh(x @ shown[0].t()) @ shown[1].t() - y).square().mean()
        for tensor in (*latent, *scores):
            tensor.grad = None
        loss.backward()
        weights.step()
        with torch.no_grad():
            before = [s.clone() for s in scores]
            for s in scores:
                s -= s.grad
        if (step + 1) % INTERVAL == 0:
            flat = torch.cat([s.detach().flatten() for s in scores])
            pruned = round(0.6 * (step + 1) / STEPS * len(flat))
            threshold = flat.kthvalue(pruned).values
            masks = [(s.detach() > threshold).float() for s in scores]
    for layer, w, m in zip((ours[0], ours[2]), latent, masks, strict=True):
        assert (layer.weight != 0).equal(m.bool())
        assert layer.weight.equal((w * m).detach())
    # The last statistics we could see are those of the step before the last ranking.
    for ours_s, usual_s in zip(statistics, before, strict=True):
        assert ours_s.equal(usual_s)


def test_taylor_and_obd_are_moving_averages():
    weight, first, second = torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor([-1.0])
    for name, values in (("taylor", (6.0, 2.0)), ("obd", (9.0, 1.0))):
        average = torch.zeros(1)
        for grad in (first, second):
            SCORES[name].accumulate(average, weight, grad, 0.5)
        torch.testing.assert_close(average, torch.tensor([values[0] / 4 + values[1] / 2]))
    assert SCORES["obd"].formula(weight, torch.tensor([5.0])) == 20


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 12), Conv1D(4, 12)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def squares_of(model, batches):
    """By the definition: the mean over all positions of each squared input feature."""
    inputs = [x.flatten(0, -2) for x in batches]
    hidden = [torch.tanh(model.first(x)).detach() for x in inputs]
    return torch.cat(inputs).square().mean(0), torch.cat(hidden).square().mean(0)


def test_input_squares_are_the_means_whatever_the_cut():
    model, data = Wide(), torch.randn(12, 5, 8)
    squares = InputSquares(model, find_targets(model).targets)
    wanted = squares_of(model, [data])
    for cut in ([12], [6, 6], [1, 4, 7]):
        squares.close()
        for part in data.split(cut):
            model(part)
        means = squares.means()
        torch.testing.assert_close(means["first.weight"], wanted[0][None])
        torch.testing.assert_close(means["second.weight"], wanted[1][:, None])
    model.eval()
    model(100 * data)
    assert squares.means()["first.weight"].equal(means["first.weight"])
    squares.remove()
    assert not model.first._forward_pre_hooks


def test_wanda_in_training_equals_its_definition():
    model, total = Wide(), 20
    selection = find_targets(model)
    squares = InputSquares(model, selection.targets)
    pruner = Pruner(
        0.5,
        score="wanda",
        scope="row",
        schedule="constant",
        interval=100,
        start=10,
        end=10,
        targets=selection.targets,
        inputs=squares,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    dense = [w.detach().clone() for w in selection.parameters.values()]
    constrain(optimizer, selection.parameters, pruner)
    averages = [torch.zeros(8), torch.zeros(12)]
    for step in range(1, 11):
        parts = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(step))
        if step == 7:
            model(1e4 * parts[0])  # a step that an overflow skipped: its inputs do not count
            pruner.at(step, total)
        for average, mean in zip(averages, squares_of(model, parts), strict=True):
            average.mul_(0.9).add_(mean, alpha=0.1)
        optimizer.zero_grad()
        for part in parts:
            model(part).square().mean().backward()
        pruner.at(step, total)
        optimizer.step()
    assert pruner.finished
    for weight, old, average, dim in zip(
        selection.parameters.values(), dense, averages, (1, 0), strict=True
    ):
        score = old.abs().movedim(dim, 1) * average.sqrt()
        for row, kept in zip(score, (weight != 0).movedim(dim, 1), strict=True):
            assert set(row.argsort()[len(row) // 2 :].tolist()) == set(
                kept.nonzero().flatten().tolist()
            )


def test_random_is_a_function_of_seed_name_and_place():
    whole = Noise(0, "w", 0)[0:1000]
    assert Noise(0, "w", 300)[20:60].equal(whole[320:360])
    assert not Noise(1, "w", 0)[0:1000].equal(whole)
    assert not Noise(0, "v", 0)[0:1000].equal(whole)


def test_random_is_uniform():
    numbers = Noise(0, "w", 0)[0 : 1 << 20]
    counts = torch.histc(numbers, 64, 0, 1)
    expected = (1 << 20) / 64
    # Chi square with 63 degrees of freedom: above 120 once in 100,000.
    assert float(((counts - expected) ** 2 / expected).sum()) < 120
    assert abs(float(torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1])) < 5e-3


def test_random_masks_are_nested_along_the_ramp():
    net = network()
    pruner = Pruner(0.8, score="random", interval=2, end=12)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    constrain(optimizer, find_targets(net).parameters, pruner)
    before = torch.zeros_like(net[0].weight, dtype=torch.bool)
    for step in range(12):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        pruner.at(step + 1, 12)
        optimizer.step()
        now = net[0].weight == 0
        assert (now | ~before).all()
        before = now
    assert before.any()


def test_a_score_of_ones_own():
    from hf_compress.pruning.scores import Score

    largest_first = Score(name="smallest stay", paper="none", formula=lambda weight: -weight.abs())
    net = network()
    prune(net, largest_first, sparsity=0.5)
    zeros = sum(int((p == 0).sum()) for p in net.parameters())
    assert zeros == round(0.5 * sum(p.numel() for p in net.parameters()))


@pytest.mark.parametrize("score", SCORES)
def test_zeros_that_are_there_at_the_start_stay_whatever_the_score(score):
    net = network()
    with torch.no_grad():
        net[0].weight[:, ::2] = 0
    selection = find_targets(net)
    inputs = InputSquares(net, selection.targets) if score == "wanda" else None
    prune(net, score, sparsity=0.7, targets=selection.targets, inputs=inputs)
    assert (net[0].weight[:, ::2] == 0).all()
    zeros = sum(int((p == 0).sum()) for p in net.parameters())
    assert zeros == round(0.7 * sum(p.numel() for p in net.parameters()))


def test_refusals():
    with pytest.raises(ValueError, match="'wanda'.*or a `Score` of your own"):
        find_score("snip")
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="InputSquares"):
        constrain(optimizer, find_targets(net).parameters, Pruner(0.5, score="wanda"))


def test_a_layer_that_is_not_called_is_told():
    model = Wide()
    model.forward = lambda x: nn.functional.linear(x, model.first.weight)
    squares = InputSquares(model, find_targets(model, "first").targets)
    model(torch.randn(3, 8))
    with pytest.raises(RuntimeError, match=r"first\.weight was used without calling"):
        squares.means()
