"""Spoken digits, synthesized by eSpeak NG: many speakers, of whom some are heard in the test only.

pip install --no-deps espeakng-loader    the library and its voices
pip install scipy                        comes with scikit-learn
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

SAMPLING_RATE = 16_000
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en-gb", "en-us", "en-gb-scotland", "en-gb-x-rp")
# Variants of eSpeak's voice, which differ in pitch, formants and roughness.
SPEAKERS = {
    "train": (
        *("f1", "f2", "f3", "f4", "m1", "m2", "m3", "m4", "m5", "m6", "Andy", "Annie", "Denis", "Gene"),
        *("Lee", "Mario", "Michael", "Nguyen", "Storm", "adam", "belinda", "ed", "john", "linda"),
    ),
    "test": ("f5", "m7", "m8", "Alicia", "Hugo", "david", "max", "steph"),
}
# Numbers of speak_lib.h.
_SYNCHRONOUS, _UTF8, _BY_CHARACTER, _RATE, _PITCH = 2, 1, 1, 1, 3


@lru_cache(maxsize=1)  # what eSpeak says next depends on what it said before
def spoken_digits() -> DatasetDict:
    """Splits `train` and `test` with the columns `audio` (`array`: samples from -1 to 1, and their
    `sampling_rate`), `label` and `speaker`: each digit once by each speaker in each accent, at a speed
    and pitch drawn for it. Always the same rows.

    Raises ImportError when a package is not installed.
    """
    for name in ("espeakng_loader", "scipy"):
        if importlib.util.find_spec(name) is None:
            raise ImportError("this sample comes in packages: pip install espeakng-loader scipy")
    features = Features(
        {
            "audio": {"array": List(Value("float32")), "sampling_rate": Value("int32")},
            "label": ClassLabel(names=list(WORDS)),
            "speaker": Value("string"),
        }
    )
    say = _synthesizer()
    return DatasetDict(
        {
            split: Dataset.from_list(list(_rows(say, speakers)), features=features)
            for split, speakers in SPEAKERS.items()
        }
    )


def _rows(say: Any, speakers: Sequence[str]) -> Iterator[dict[str, Any]]:
    drawn = random.Random(0)
    for speaker in speakers:
        for accent in ACCENTS:
            for word in WORDS:
                speed, pitch = drawn.randint(120, 220), drawn.randint(30, 70)
                array = say(word, f"{accent}+{speaker}", speed, pitch)
                sound = {"array": array, "sampling_rate": SAMPLING_RATE}
                yield {"audio": sound, "label": word, "speaker": speaker}


def _synthesizer() -> Any:
    """A function of a text, a voice, words a minute and a pitch of 0 to 99, to samples."""
    from scipy.signal import resample_poly

    espeak: Any = importlib.import_module("espeakng_loader")
    library = ctypes.CDLL(espeak.get_library_path())
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, espeak.get_data_path().encode(), 0)
    if rate <= 0:
        raise OSError(f"eSpeak NG cannot read its data in {espeak.get_data_path()}.")
    heard: list[int] = []
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

    @kind
    def hear(samples: Any, count: int, events: Any) -> int:
        if samples:
            heard.extend(samples[:count])
        return 0

    def say(text: str, voice: str, speed: int, pitch: int) -> np.ndarray:
        heard.clear()
        written = text.encode()
        library.espeak_SetSynthCallback(hear)
        library.espeak_ng_SetRandSeed(ctypes.c_long(0))
        library.espeak_SetVoiceByName(voice.encode())
        library.espeak_SetParameter(_RATE, speed, 0)
        library.espeak_SetParameter(_PITCH, pitch, 0)
        if library.espeak_Synth(written, len(written) + 1, 0, _BY_CHARACTER, 0, _UTF8, None, None):
            raise OSError(f"eSpeak NG cannot say {text!r} in the voice {voice!r}.")
        samples = np.asarray(heard, dtype=np.float32) / 32768
        return resample_poly(samples, SAMPLING_RATE, rate).astype(np.float32)

    return say
