"""The loss in chunks against the plain form, on tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_compress.distillation.chunked import chunked_sums
from hf_compress.distillation.divergences import DIVERGENCES, Divergence
from hf_compress.distillation.output_layer import OutputLayer
from hf_compress.distillation.slopes import CLOSED_FORMS

ROWS, LENGTH, WIDTH, CLASSES = 2, 9, 5, 11
LAYERS = {
    "plain": {},
    "bias": {"bias": True},
    "soft-cap": {"softcap": 3.0},
    "scale": {"scale": 0.3},
    "all": {"bias": True, "softcap": 3.0, "scale": 0.3},
}


def random(*shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=dtype, generator=generator)


def make(kind="plain", dtype=torch.float32, teacher_classes=CLASSES):
    """Student and teacher, hidden states and layer each, of different widths."""
    settings = dict(LAYERS[kind])
    bias = random(CLASSES, dtype=dtype, seed=2) if settings.pop("bias", False) else None
    weight = random(CLASSES, WIDTH, dtype=dtype, seed=1)
    hidden = random(ROWS, LENGTH, WIDTH, dtype=dtype, seed=0)
    for each in (hidden, weight, bias):
        if each is not None:
            each.requires_grad_()
    taught = random(ROWS, LENGTH, 4, dtype=dtype, seed=3)
    theirs = OutputLayer(weight=random(teacher_classes, 4, dtype=dtype, seed=4), softcap=4.0)
    return hidden, OutputLayer(weight=weight, bias=bias, **settings), [(taught, theirs)]


def make_labels():
    labels = torch.randint(0, CLASSES, (ROWS, LENGTH), generator=torch.Generator().manual_seed(5))
    labels[0, :2], labels[1, 4:] = -100, -100
    return labels, labels != -100


def logits_of(hidden, layer):
    logits = layer.scale * F.linear(hidden, layer.weight, layer.bias)
    return logits if layer.softcap is None else layer.softcap * torch.tanh(logits / layer.softcap)


def plain(hidden, layer, teachers, labels, counts, divergence, weights=(1.0,)):
    """Cross-entropy and divergence of all logits at once."""
    student = logits_of(hidden[counts], layer)
    theirs = [logits_of(states[counts], each) for states, each in teachers]
    theirs = divergence.merged_classes(theirs, weights)
    compared = student[:, : theirs.shape[-1]]
    task = F.cross_entropy(student, labels[counts], reduction="sum")
    agreement = (compared.argmax(-1) == theirs.argmax(-1)).sum()
    return task, divergence.between_classes(compared, theirs).sum(), agreement


def mixed(task, distillation, alpha):
    return (
        task
        if alpha == 0
        else distillation
        if alpha == 1
        else (1 - alpha) * task + alpha * distillation
    )


def gradients(loss, hidden, layer):
    learnt = [each for each in (hidden, layer.weight, layer.bias) if each is not None]
    return torch.autograd.grad(0.7 * loss, learnt)


def assert_exact(hidden, layer, teachers, divergence, alpha, *, chunk_size=4, **weights):
    labels, counts = make_labels()
    sums = chunked_sums(
        hidden,
        layer,
        teachers,
        labels,
        counts,
        divergence=divergence,
        alpha=alpha,
        chunk_size=chunk_size,
        **weights,
    )
    expected = plain(hidden, layer, teachers, labels, counts, divergence, **weights)
    assert sums.items == 11
    torch.testing.assert_close(sums[1:3], expected[:2], rtol=1e-5, atol=1e-5)
    assert sums.agreement == expected[2]
    torch.testing.assert_close(
        gradients(mixed(*sums[1:3], alpha), hidden, layer),
        gradients(mixed(*expected[:2], alpha), hidden, layer),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("alpha", [0, 0.5, 1])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_and_gradients_are_those_of_the_plain_form(name, alpha, kind):
    divergence = Divergence(name=name, temperature=2.0, teacher_temperature=1.5)
    assert_exact(*make(kind), divergence, alpha)


@pytest.mark.parametrize("name", [*CLOSED_FORMS, "skew_kl"])
def test_without_the_square_of_the_temperature(name):
    assert_exact(*make(), Divergence(name=name, temperature=2.0, scaled=False), 0.5)


@pytest.mark.parametrize("chunk_size", [1, 11, 100])
def test_the_size_of_the_chunks_changes_nothing(chunk_size):
    assert_exact(*make("all"), Divergence(), 0.3, chunk_size=chunk_size)


@pytest.mark.parametrize("name", [*CLOSED_FORMS, "skew_kl"])
def test_a_vocabulary_padded_further_than_the_teachers(name):
    assert_exact(*make("all", teacher_classes=8), Divergence(name=name, temperature=3.0), 0.5)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_several_teachers(name):
    hidden, layer, teachers = make()
    other = OutputLayer(weight=random(CLASSES, 3, dtype=torch.float32, seed=6))
    teachers.append((random(ROWS, LENGTH, 3, dtype=torch.float32, seed=7), other))
    divergence = Divergence(name=name, temperature=2.0)
    assert_exact(hidden, layer, teachers, divergence, 0.5, weights=(0.3, 0.7))


@pytest.mark.parametrize("name", [*CLOSED_FORMS, "skew_kl"])
@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_the_gradient_is_that_of_finite_differences(name, alpha):
    hidden, layer, teachers = make("all", dtype=torch.float64)
    labels, counts = make_labels()
    divergence = Divergence(name=name, temperature=2.0)

    def loss(hidden, weight, bias):
        given = OutputLayer(weight=weight, bias=bias, scale=layer.scale, softcap=layer.softcap)
        sums = chunked_sums(
            hidden, given, teachers, labels, counts, divergence=divergence, alpha=alpha, chunk_size=4
        )
        return mixed(*sums[1:3], alpha)

    # It goes back over the same graph several times.
    assert torch.autograd.gradcheck(loss, (hidden, layer.weight, layer.bias))


def test_a_tied_weight_gets_both_gradients():
    embedding = random(CLASSES, WIDTH, dtype=torch.float32, seed=0).requires_grad_()
    labels, counts = make_labels()
    _, _, teachers = make()

    def loss(function, **settings):
        hidden = torch.tanh(embedding[labels.clamp(min=0)])
        layer = OutputLayer(weight=embedding)
        values = function(
            hidden, layer, teachers, labels, counts, divergence=Divergence(temperature=2.0), **settings
        )
        return mixed(*(values[1:3] if settings else values[:2]), 0.5)

    ours = torch.autograd.grad(loss(chunked_sums, alpha=0.5, chunk_size=4), embedding)
    torch.testing.assert_close(ours, torch.autograd.grad(loss(plain), embedding))


def test_a_frozen_layer_gets_no_gradient():
    hidden, layer, teachers = make("bias")
    layer.weight.requires_grad_(False)
    labels, counts = make_labels()
    settings = {"divergence": Divergence(), "alpha": 0.5, "chunk_size": 4}
    mixed(*chunked_sums(hidden, layer, teachers, labels, counts, **settings)[1:3], 0.5).backward()
    assert layer.weight.grad is None
    assert hidden.grad.abs().sum() > 0
    assert layer.bias.grad.abs().sum() > 0


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_half_precision_rounds_the_products_and_nothing_else(weights):
    """Under autocast, and with weights in it: all but the products of matrices is as in fp32."""
    labels, counts = make_labels()
    divergence = Divergence(temperature=2.0)
    results = []
    for function, settings in ((plain, {}), (chunked_sums, {"alpha": 0.5, "chunk_size": 4})):
        hidden, layer, teachers = make("bias")
        layer = OutputLayer(weight=layer.weight.to(weights), bias=layer.bias.to(weights))
        with torch.autocast("cpu", torch.bfloat16):
            values = function(
                hidden, layer, teachers, labels, counts, divergence=divergence, **settings
            )
            loss = mixed(*(values[1:3] if settings else values[:2]), 0.5)
        assert loss.dtype == torch.float32
        results.append((loss, *torch.autograd.grad(loss, (hidden, layer.weight, layer.bias))))
    torch.testing.assert_close(results[0], results[1], rtol=2e-2, atol=2e-2)


def test_what_does_not_count_may_be_anything():
    hidden, layer, teachers = make()
    labels, counts = make_labels()
    spoilt = hidden.detach().masked_fill(~counts[..., None], torch.nan).requires_grad_()
    taught = [(states.masked_fill(~counts[..., None], torch.inf), each) for states, each in teachers]
    settings = {"divergence": Divergence(name="reverse_kl"), "alpha": 0.5, "chunk_size": 4}
    ours, expected = (
        chunked_sums(states, layer, asked, labels, counts, **settings)
        for states, asked in ((spoilt, taught), (hidden, teachers))
    )
    torch.testing.assert_close(ours, expected)
    (gradient,) = torch.autograd.grad(mixed(*ours[1:3], 0.5), spoilt)
    assert (gradient[~counts] == 0).all()
    assert (gradient[counts] != 0).all()


def test_a_part_of_weight_0_brings_in_no_nan():
    hidden, layer, teachers = make()
    labels, counts = make_labels()
    broken = [(torch.full_like(states, torch.nan), each) for states, each in teachers]
    settings = {"divergence": Divergence(), "alpha": 0, "chunk_size": 4}
    sums = chunked_sums(hidden, layer, broken, labels, counts, **settings)
    assert all(torch.isfinite(each).all() for each in gradients(sums.task, hidden, layer))


def test_without_items_all_is_0_and_connected():
    hidden, layer, teachers = make("all")
    labels, counts = make_labels()
    settings = {"divergence": Divergence(), "alpha": 0.5, "chunk_size": 4}
    sums = chunked_sums(hidden, layer, teachers, labels, counts & False, **settings)
    assert list(sums) == [0, 0, 0, 0]
    for gradient in gradients(mixed(*sums[1:3], 0.5), hidden, layer):
        assert (gradient == 0).all()


class Sizes(TorchDispatchMode):
    """The most elements of any tensor that is made, which is not as large as the weight."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, list | tuple) else (made,):
            if isinstance(each, torch.Tensor):
                self.largest = max(self.largest, each.numel())
        return made


@pytest.mark.parametrize("name", [*CLOSED_FORMS, "skew_kl"])
def test_no_tensor_is_larger_than_a_chunk_of_logits(name):
    hidden, layer, teachers = make("all")
    labels, counts = make_labels()
    settings = {"divergence": Divergence(name=name), "alpha": 0.5, "chunk_size": 6}
    with Sizes() as sizes:
        mixed(*chunked_sums(hidden, layer, teachers, labels, counts, **settings)[1:3], 0.5).backward()
    # The largest are the hidden states.
    assert 6 * CLASSES <= sizes.largest <= hidden.numel() < 11 * CLASSES


def test_without_gradients_none_are_made():
    hidden, layer, teachers = make()
    labels, counts = make_labels()
    settings = {"divergence": Divergence(), "alpha": 0.5, "chunk_size": 4}
    with torch.no_grad():
        sums = chunked_sums(hidden, layer, teachers, labels, counts, **settings)
    assert not sums.task.requires_grad
    torch.testing.assert_close(sums, chunked_sums(hidden, layer, teachers, labels, counts, **settings))


def test_shapes_that_do_not_fit_and_empty_chunks_are_refused():
    hidden, layer, teachers = make()
    labels, counts = make_labels()
    settings = {"divergence": Divergence(), "alpha": 0.5}
    short = [(states[:, 1:], each) for states, each in teachers]
    with pytest.raises(ValueError, match=r"teacher's hidden states are \(2, 8, 4\), labels \(2, 9\)"):
        chunked_sums(hidden, layer, short, labels, counts, chunk_size=4, **settings)
    with pytest.raises(ValueError, match="`chunk_size` is 0"):
        chunked_sums(hidden, layer, teachers, labels, counts, chunk_size=0, **settings)
