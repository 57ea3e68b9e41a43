"""The mechanism against the usual formulation with parametrized modules, and its refusals."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper, DummyOptim
from torch import nn
from torch.nn.utils import parametrize
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from hf_compress.constraint import Constraint, constrain
from hf_compress.pruning.pruner import Pruner


def int4(weight):
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 7
    return (weight / scale).round().clamp(-8, 7) * scale


class StraightThrough(nn.Module):
    def forward(self, weight):
        return weight + (int4(weight) - weight).detach()


class Int4(Constraint):
    order = 1
    needs_latent = True

    def begin(self, members):
        pass

    def observe(self, members):
        pass

    def update(self, members):
        pass

    def project_(self, members):
        for member in members:
            member.param.copy_(int4(member.param))


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def weights(net):
    return {"0.weight": net[0].weight, "2.weight": net[2].weight}


def train(net, optimizer, steps, first=0, pruner=None, total=40):
    for step in range(first, first + steps):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (net(x) - 2 * x[:, :4]).square().mean().backward()
        if pruner is not None:
            pruner.at(step + 1, total)
        optimizer.step()


def test_quantization_aware_training_equals_parametrized_modules_bit_for_bit():
    ours, usual = network(), network()
    for layer in (usual[0], usual[2]):
        parametrize.register_parametrization(layer, "weight", StraightThrough())
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2)
    constrain(optimizer, weights(ours), Int4())
    train(ours, optimizer, 200)
    train(usual, torch.optim.AdamW(usual.parameters(), lr=1e-2), 200)
    for i in (0, 2):
        # The parametrization computes w + (q - w), which rounds; the grid it means is q.
        assert ours[i].weight.equal(int4(usual[i].parametrizations.weight.original))


def test_gradual_obd_pruning_equals_its_definition_written_naively():
    total, interval = 40, 5
    ours, naive = network(), network()
    pruner = Pruner(0.8, interval=interval, end=0.5, decay=0.9, min_keep=0.0)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2)
    constrain(optimizer, weights(ours), pruner)
    train(ours, optimizer, total, pruner=pruner, total=total)

    optimizer = torch.optim.AdamW(naive.parameters(), lr=1e-2)
    params = [naive[0].weight, naive[2].weight]
    latent = [p.detach().clone() for p in params]
    fisher = [torch.zeros_like(p) for p in params]
    masks = [torch.ones_like(p) for p in params]
    for step in range(1, total + 1):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step - 1))
        optimizer.zero_grad()
        (naive(x) - 2 * x[:, :4]).square().mean().backward()
        with torch.no_grad():
            for p, w, f, m in zip(params, latent, fisher, masks, strict=True):
                f.mul_(0.9).addcmul_(p.grad, p.grad, value=0.1)
                p.grad *= m
                p.copy_(w)
        optimizer.step()
        with torch.no_grad():
            if step <= 20 and step % interval == 0:
                scores = [p.square() * f for p, f in zip(params, fisher, strict=True)]
                ranked = torch.cat([s.flatten() for s in scores])
                k = round(0.8 * (1 - (1 - step / 20) ** 3) * len(ranked))
                threshold = ranked.kthvalue(k).values
                masks = [(s > threshold).float() for s in scores]
            for i, (p, m) in enumerate(zip(params, masks, strict=True)):
                latent[i] = p.detach().clone()
                p.mul_(m)
    assert ours[0].weight.equal(naive[0].weight)
    assert ours[2].weight.equal(naive[2].weight)
    zeros = sum(int((w == 0).sum()) for w in weights(ours).values())
    assert zeros == round(0.8 * sum(w.numel() for w in weights(ours).values()))


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stop", [7, 20, 33])
def test_resume_is_bit_equal(optimizer, dtype, stop):
    def start():
        net = network().to(dtype)
        opt = OPTIMIZERS[optimizer](net.parameters())
        return net, opt, Pruner(0.7, interval=4, end=0.6)

    def run(net, opt, pruner, first, steps):
        for step in range(first, first + steps):
            x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step)).to(dtype)
            opt.zero_grad()
            (net(x) - 2 * x[:, :4]).square().mean().backward()
            pruner.at(step + 1, 40)
            opt.step()

    whole = start()
    constrain(whole[1], weights(whole[0]), whole[2])
    run(*whole, 0, 40)

    part = start()
    constrain(part[1], weights(part[0]), part[2])
    run(*part, 0, stop)
    saved = copy.deepcopy((part[0].state_dict(), part[1].state_dict()))

    rest = start()
    rest[0].load_state_dict(saved[0])
    rest[1].load_state_dict(saved[1])
    rest[2].at(stop, 40)
    constrain(rest[1], weights(rest[0]), rest[2])
    run(*rest, stop, 40 - stop)
    for name, weight in weights(whole[0]).items():
        assert weight.equal(weights(rest[0])[name])
    assert rest[2].finished


def test_pruning_and_quantization_share_one_latent_weight_and_zeros_stay():
    for pruning_first in (True, False):
        net = network()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        pruner = Pruner(0.6, interval=4, end=0.5)
        for constraint in (pruner, Int4()) if pruning_first else (Int4(), pruner):
            handle = constrain(optimizer, weights(net), constraint)
        train(net, optimizer, 40, pruner=pruner)
        state = optimizer.state[net[0].weight]
        mask, latent = state["hf_compress_mask"], state["hf_compress_latent"]
        assert net[0].weight.equal(int4(latent * mask))
        zeros = sum(int((~optimizer.state[w]["hf_compress_mask"]).sum()) for w in weights(net).values())
        assert zeros == round(0.6 * (16 * 32 + 32 * 4))
        assert (net[0].weight[~mask] == 0).all()
        handle.remove()
        assert not any(str(key).startswith("hf_compress") for key in state)


def test_storage_and_names_never_change():
    net = network()
    pointers = {name: p.data_ptr() for name, p in net.named_parameters()}
    keys = list(net.state_dict())
    optimizer = torch.optim.AdamW(net.parameters())
    pruner = Pruner(0.5)
    constrain(optimizer, weights(net), pruner)
    train(net, optimizer, 40, pruner=pruner)
    assert {name: p.data_ptr() for name, p in net.named_parameters()} == pointers
    assert list(net.state_dict()) == keys


def test_a_fixed_mask_needs_no_latent_copy():
    net = network()
    optimizer = torch.optim.AdamW(net.parameters())
    pruner = Pruner(0.5, end=0.5)
    constrain(optimizer, weights(net), pruner)
    train(net, optimizer, 40, pruner=pruner)
    ours = {key for key in optimizer.state[net[0].weight] if str(key).startswith("hf_compress")}
    assert ours == {"hf_compress_mask"}


def test_zeros_that_are_there_at_the_start_stay_below_the_target():
    net = network()
    with torch.no_grad():
        net[0].weight[:20] = 0
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    pruner = Pruner(0.8, interval=4, end=0.9)
    constrain(optimizer, weights(net), pruner)
    assert pruner.sparsity == 320 / 640
    train(net, optimizer, 4, pruner=pruner)
    assert pruner.sparsity == 0.5
    assert (net[0].weight[:20] == 0).all()


@pytest.mark.parametrize("fused", [False, True])
def test_after_an_fp16_overflow_nothing_happened(fused):
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=fused)
    pruner = Pruner(0.5, interval=1, end=10)
    constrain(optimizer, weights(net), pruner)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def step(number, poison):
        optimizer.zero_grad()
        loss = net(torch.ones(2, 16)).square().mean()
        scaler.scale(loss).backward()
        if poison:
            net[0].weight.grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        pruner.at(number, 20)
        scaler.step(optimizer)
        scaler.update()

    step(1, poison=False)
    before = copy.deepcopy((net.state_dict(), pruner.sparsity, optimizer.state[net[0].weight]))
    step(2, poison=True)
    assert pruner.sparsity == before[1]
    for key, value in net.state_dict().items():
        assert value.equal(before[0][key])
    average = "hf_compress_statistic"
    assert optimizer.state[net[0].weight][average].equal(before[2][average])
    # The ranking that the overflow skipped at the last step of the schedule is made up for.
    step(10, poison=True)
    assert pruner.sparsity < 0.5
    step(11, poison=False)
    assert pruner.sparsity == 0.5


def test_a_parameter_without_a_gradient_keeps_waiting():
    net = network()
    idle = nn.Linear(16, 16)
    optimizer = torch.optim.AdamW([*net.parameters(), *idle.parameters()], lr=1e-2)
    pruner = Pruner(0.5, interval=2, end=0.5, scope="layer", score="magnitude")
    constrain(optimizer, {**weights(net), "idle": idle.weight}, pruner)
    train(net, optimizer, 40, pruner=pruner)
    assert int((idle.weight == 0).sum()) == 128
    idle(torch.ones(1, 16)).sum().backward()
    pruner.at(40, 40)
    optimizer.step()
    assert int((idle.weight == 0).sum()) == 128


def test_in_a_bare_accelerate_loop():
    accelerator = Accelerator(cpu=True)
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    net, optimizer = accelerator.prepare(net, optimizer)
    pruner = Pruner(0.9)
    constrain(optimizer, weights(net), pruner)
    train(net, optimizer, 40, pruner=pruner)
    zeros = sum(int((w == 0).sum()) for w in weights(net).values())
    assert zeros == round(0.9 * 640)


def test_a_short_schedule_has_ten_rankings():
    net = network()
    optimizer = torch.optim.AdamW(net.parameters())
    pruner = Pruner(0.5, schedule="linear", end=20)
    constrain(optimizer, weights(net), pruner)
    seen = []
    for step in range(40):
        train(net, optimizer, 1, first=step, pruner=pruner)
        seen.append(pruner.sparsity)
    assert len(set(seen)) == 10 + 1  # and the nothing of the first step
    assert seen[1] == pytest.approx(0.05)


def test_each_layer_rounds_alone_and_the_schedule_still_ends():
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(3, 1, bias=False) for _ in range(5))
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-2)
    pruner = Pruner(0.45, scope="layer", end=5)  # 1 of 3 in each: 5 of 15, where 0.45 of 15 is 7
    constrain(optimizer, {str(i): layer.weight for i, layer in enumerate(layers)}, pruner)
    for step in range(8):
        optimizer.zero_grad()
        sum(layer(torch.randn(4, 3)).square().sum() for layer in layers).backward()
        pruner.at(step + 1, 8)
        optimizer.step()
    assert pruner.finished
    assert [int((layer.weight == 0).sum()) for layer in layers] == [1] * 5


def test_a_refused_constraint_leaves_nothing_attached():
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    late = Pruner(0.5, end=50)
    late.at(0, 40)
    with pytest.raises(ValueError, match="ends at step 50"):
        constrain(optimizer, weights(net), late)
    pruner = Pruner(0.5)
    constrain(optimizer, weights(net), pruner)
    train(net, optimizer, 40, pruner=pruner)
    assert pruner.finished


def test_a_loop_that_never_tells_the_time_is_told():
    net = network()
    optimizer = torch.optim.AdamW(net.parameters())
    constrain(optimizer, weights(net), Pruner(0.5))
    with pytest.raises(RuntimeError, match="pruner.at"):
        train(net, optimizer, 1)


class ScheduleFree(torch.optim.SGD):
    def eval(self):
        pass


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("twice", "already has a Pruner"),
        ("none", "no parameters"),
        ("foreign", "not trained by the optimizer"),
        ("packed", "packed as torch.uint8"),
        ("schedule-free", "schedule-free"),
        ("not an optimizer", "not a torch optimizer"),
        ("ZeRO", "DeepSpeed.*use DDP or FSDP2"),
        ("ZeRO, optimizer from its config", "DeepSpeed.*use DDP or FSDP2"),
        ("layer-wise", "layer-wise optimizer"),
    ],
)
def test_refusals(case, message):
    net = network()
    optimizer = torch.optim.AdamW(net.parameters())
    parameters = weights(net)
    if case == "twice":
        constrain(optimizer, parameters, Pruner(0.5))
    elif case == "none":
        parameters = {}
    elif case == "foreign":
        parameters = weights(network())
    elif case == "packed":
        parameters = {"w": nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)}
    elif case == "ZeRO":
        Accelerator(cpu=True)  # the wrapper asks its state
        optimizer = DeepSpeedOptimizerWrapper(optimizer)
    elif case == "ZeRO, optimizer from its config":
        optimizer = DummyOptim(list(net.parameters()))
    elif case == "layer-wise":
        optimizer = LayerWiseDummyOptimizer()
    elif case == "schedule-free":
        optimizer = ScheduleFree(net.parameters())
    else:
        optimizer = object()
    with pytest.raises(ValueError, match=message):
        constrain(optimizer, parameters, Pruner(0.5))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sparsity": 80}, "For 80 % pass 0.8"),
        ({"sparsity": -1}, r"in \[0, 1\)"),
        ({"sparsity": 1.0}, r"in \[0, 1\)"),
        ({"sparsity": float("nan")}, r"in \[0, 1\)"),
        ({"sparsity": "0.5"}, r"in \[0, 1\)"),
        ({"sparsity": True}, r"in \[0, 1\)"),
        ({"score": "snip"}, "allowed are"),
        ({"scope": "block"}, "allowed are"),
        ({"schedule": "square"}, "allowed are"),
        ({"interval": 0}, "number of steps"),
        ({"decay": 1.0}, "decay"),
        ({"min_keep": 2}, "fraction"),
        ({"start": 0.9, "end": 0.1}, "after"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        Pruner(**({"sparsity": 0.5} | wrong))
