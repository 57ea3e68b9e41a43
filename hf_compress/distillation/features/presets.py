"""Sets of matches under the name of the paper that chose them. Weights, and the other parts of the
loss, are the user's to set: `dataclasses.replace(match, weight=...)`."""

from __future__ import annotations

from collections.abc import Iterable

from hf_compress.distillation.features.match import Match

PRESETS: dict[str, tuple[Match, ...]] = {
    # DistilBERT (papers/1910.01108): the direction of the last hidden state of each token.
    "distilbert": (Match("hidden", distance="cosine", layers="final", projection=True),),
    # TinyBERT (papers/1909.10351): embeddings, hidden states, and scores of attention.
    "tinybert": (
        Match("embeddings", projection=True),
        Match("hidden", projection=True),
        Match("attention", distance="mse"),
    ),
    # Patient KD (papers/1908.09355): the direction of the first token in all layers but the last.
    "pkd": (Match("hidden", distance="normalized", layers="skip", tokens="first", projection=True),),
    # MiniLM (papers/2002.10957): maps of attention and relations of values in the last layer.
    "minilm": (Match("attention", layers="final"), Match("values", layers="final")),
    # MiniLMv2 (papers/2012.15828): three relations of the last layers, of any number of heads. For a
    # large teacher the paper takes one of its upper middle layers: layers=[(-1, 20)].
    "minilmv2": tuple(
        Match(what, layers="final", relation_heads=12) for what in ("queries", "keys", "values")
    ),
    # MobileBERT (papers/2004.02984): hidden states and maps of attention, layer by layer.
    "mobilebert": (Match("hidden", projection=True), Match("attention")),
    # SquareHead (papers/2310.06927): hidden states relative to the teacher's, for sparse recovery.
    "squarehead": (Match("hidden", distance="relative", projection=True),),
}


def as_matches(matches: str | Match | Iterable[Match]) -> tuple[Match, ...]:
    """The matches that are meant: those of a preset, one, or several.

    Raises ValueError for an unknown preset, TypeError for anything else.
    """
    if isinstance(matches, str):
        if matches not in PRESETS:
            raise ValueError(f"there is no preset {matches!r}; there are {', '.join(PRESETS)}.")
        return PRESETS[matches]
    if isinstance(matches, Match):
        return (matches,)
    given = tuple(matches)
    for match in given:
        if not isinstance(match, Match):
            raise TypeError(
                f"`matches` holds a {type(match).__name__}: pass Match('hidden', ...) and so on, or "
                f"the name of one preset, {', '.join(PRESETS)}."
            )
    return given
