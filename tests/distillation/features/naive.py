"""The papers' losses written as they are read: loops over rows, tokens, heads and keys, on what
transformers gives out by its own means or on the weights themselves."""

import copy

import torch


def inside(model, batch):
    """Of the only stack: hidden states (the embeddings first, the last after the final norm), maps of
    attention, and queries, keys and values (rows, tokens, heads, size) of each layer."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    given = model(**batch, output_hidden_states=True, output_attentions=True)
    hidden = list(given.hidden_states)
    kind = model.config.model_type
    if kind == "vit":
        hidden[-1] = model.vit(**batch).last_hidden_state
    projected = [projections(model, kind, layer, hidden[layer]) for layer in range(len(hidden) - 1)]
    return hidden, given.attentions, projected


def projections(model, kind, number, states):
    """What the layer's matrices make of its input, cut into heads of 8, as all tiny models have."""
    if kind == "bert":
        attention = model.bert.encoder.layer[number].attention.self
        parts = [part(states) for part in (attention.query, attention.key, attention.value)]
    elif kind == "gpt2":
        layer = model.transformer.h[number]
        parts = layer.attn.c_attn(layer.ln_1(states)).split(32, dim=-1)
    elif kind == "llama":  # before its rotation
        layer = model.model.layers[number]
        states = layer.input_layernorm(states)
        attention = layer.self_attn
        parts = [part(states) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
    else:
        layer = model.vit.layers[number]
        states = layer.layernorm_before(states)
        attention = layer.attention
        parts = [part(states) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
    return [part.unflatten(-1, (-1, 8)) for part in parts]


def real_tokens(batch):
    """(row, position) of what is not padding."""
    if "attention_mask" not in batch:
        rows = len(batch["pixel_values"])
        return [(row, position) for row in range(rows) for position in range(5)]
    mask = batch["attention_mask"]
    return [
        (row, position)
        for row in range(mask.shape[0])
        for position in range(mask.shape[1])
        if mask[row, position]
    ]


def mean(values):
    return torch.stack(list(values)).mean()


def divergence(teacher, student):
    """KL of two rows of probabilities."""
    return sum(p * (p / q).log() for p, q in zip(teacher, student, strict=True) if p > 0)


def distilbert(student, teacher, batch):
    """L_cos between the last hidden states."""
    ours, theirs = inside(student, batch)[0][-1], inside(teacher, batch)[0][-1]
    return mean(
        1 - ours[at] @ theirs[at] / (ours[at].norm() * theirs[at].norm()) for at in real_tokens(batch)
    )


def hidden_error(student, teacher, batch, pairs):
    """The mean squared error of hidden states, counted as transformers does: embeddings are 0."""
    ours, theirs = inside(student, batch)[0], inside(teacher, batch)[0]
    return mean(
        ((ours[i][at] - theirs[j][at]) ** 2).mean() for i, j in pairs for at in real_tokens(batch)
    )


def score_error(student, teacher, batch, pairs):
    """The mean squared error of Q K^T / sqrt(d), over the heads, and the keys that a token sees."""
    (_, maps, ours), (_, _, theirs) = inside(student, batch), inside(teacher, batch)
    errors = []
    for i, j in pairs:
        for row, position in real_tokens(batch):
            for head in range(4):
                queries = ours[i][0][row, position, head], theirs[j][0][row, position, head]
                seen = [key for key, p in enumerate(maps[i][row, head, position]) if p > 0]
                scores = [
                    query @ keys[row, key, head] / 8**0.5
                    for key in seen
                    for query, keys in zip(queries, (ours[i][1], theirs[j][1]), strict=True)
                ]
                errors.append(
                    mean((a - b) ** 2 for a, b in zip(scores[::2], scores[1::2], strict=True))
                )
    return mean(errors)


def tinybert(student, teacher, batch):
    embeddings = hidden_error(student, teacher, batch, [(0, 0)])
    hidden = hidden_error(student, teacher, batch, [(1, 2), (2, 4)])
    return embeddings + hidden + score_error(student, teacher, batch, [(0, 1), (1, 3)])


def pkd(student, teacher, batch):
    """Four layers to two: the first of the student learns from the second of the teacher."""
    ours, theirs = inside(student, batch)[0][1], inside(teacher, batch)[0][2]
    return mean(
        ((a[0] / a[0].norm() - b[0] / b[0].norm()) ** 2).sum()
        for a, b in zip(ours, theirs, strict=True)
    )


def map_divergence(student, teacher, batch, pairs):
    ours, theirs = inside(student, batch)[1], inside(teacher, batch)[1]
    return mean(
        divergence(theirs[j][row, head, position], ours[i][row, head, position])
        for i, j in pairs
        for row, position in real_tokens(batch)
        for head in range(ours[i].shape[1])
    )


def relation_divergence(student, teacher, batch, part, heads=None):
    """Between the last layers, of queries (0), keys (1) or values (2), cut into so many heads."""
    ours, theirs = inside(student, batch)[2][-1][part], inside(teacher, batch)[2][-1][part]
    if heads is not None:
        ours, theirs = (side.flatten(2).unflatten(-1, (heads, -1)) for side in (ours, theirs))
    tokens = real_tokens(batch)
    found = []
    for row, position in tokens:
        others = [other for number, other in tokens if number == row]
        for head in range(ours.shape[2]):
            maps = []
            for side in (theirs, ours):
                products = [side[row, position, head] @ side[row, other, head] for other in others]
                maps.append((torch.stack(products) / side.shape[-1] ** 0.5).softmax(0))
            found.append(divergence(*maps))
    return mean(found)


def minilm(student, teacher, batch):
    attention = map_divergence(student, teacher, batch, [(-1, -1)])
    return attention + relation_divergence(student, teacher, batch, 2)


def minilmv2(student, teacher, batch, heads):
    return sum(relation_divergence(student, teacher, batch, part, heads) for part in (0, 1, 2))


def mobilebert(student, teacher, batch):
    hidden = hidden_error(student, teacher, batch, [(1, 2), (2, 4)])
    return hidden + map_divergence(student, teacher, batch, [(0, 1), (1, 3)])


def squarehead(student, teacher, batch):
    ours, theirs = inside(student, batch)[0], inside(teacher, batch)[0]
    return mean(
        ((ours[i][at] - theirs[j][at]) ** 2).sum() / (theirs[j][at] ** 2).sum()
        for i, j in [(1, 2), (2, 4)]
        for at in real_tokens(batch)
    )
