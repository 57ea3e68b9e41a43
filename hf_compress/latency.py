"""How long a model takes on this machine, beside another one."""

from __future__ import annotations

import importlib.metadata
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.devices import device_name, hardware, host, synchronize
from hf_compress.example_inputs import example_inputs
from hf_compress.frozen import evaluating

Model = Callable[..., Any]
"""A module, or whatever takes the same keyword tensors: an exported model in its runtime."""
Times = Iterator[tuple[str, float]]


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one pass, and what they hold for.

    inputs: shape of each tensor of the batch. threads: those of torch on the CPU.
    """

    median_ms: float
    p95_ms: float
    runs: int
    inputs: dict[str, list[int]]
    device: str
    threads: int


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What `measure_latency` found, by the kind of pass: "forward", or of a model that generates
    "prefill" and "decode", which is of one token.

    hardware: see `hf_compress.devices.hardware`. versions: of torch and transformers.
    """

    model: dict[str, Latency]
    baseline: dict[str, Latency] | None
    hardware: dict[str, Any]
    versions: dict[str, str]

    @property
    def ratios(self) -> dict[str, float]:
        """How many times faster than the baseline, by medians; empty without one."""
        if self.baseline is None:
            return {}
        return {kind: self.baseline[kind].median_ms / own.median_ms for kind, own in self.model.items()}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratios": self.ratios}


def measure_latency(
    model: PreTrainedModel,
    *,
    batch: int = 1,
    length: int | None = None,
    threads: int | None = None,
    baseline: PreTrainedModel | None = None,
    new_tokens: int = 16,
    runs: int = 50,
    warmup: int = 5,
) -> Speed:
    """The latency of `model` on inputs made for it, see `hf_compress.example_inputs`.

    batch: rows. length: tokens of text (by default 128), or samples of sound (16,000: a second); images
        and spectrograms have the size of the model.
    threads: of torch, meanwhile; by default as many as it has.
    baseline: such as the dense model; timed in turn with `model`, run by run, on the same inputs.
    new_tokens: how many a model that generates decodes in each run, after the prefill.

    Raises ValueError for numbers below 1, a `length` that the model does not take, and a model whose
    inputs are not known: time those that you have by `compare_latency`.
    """
    inputs = example_inputs(model, batch=batch, length=length)
    models: dict[str, Model] = {"model": model}
    if baseline is not None:
        models["baseline"] = baseline
    with _threads(threads):
        if model.can_generate():
            found = compare_decoding(models, inputs, new_tokens=new_tokens, runs=runs, warmup=warmup)
        else:
            forward = compare_latency(models, inputs, runs=runs, warmup=warmup)
            found = {name: {"forward": latency} for name, latency in forward.items()}
        return Speed(
            model=found["model"],
            baseline=found.get("baseline"),
            hardware=hardware(),
            versions={name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        )


def compare_latency(
    models: Mapping[str, Model],
    inputs: Mapping[str, Tensor],
    *,
    runs: int = 50,
    warmup: int = 5,
    threads: int | None = None,
) -> dict[str, Latency]:
    """The latency of one forward of several models, in turn, so that all meet the same disturbances.

    models: what is no module gets `inputs` as they are, and waits for its own result.
    inputs: keyword tensors that every model takes; a module gets them on its device.
    runs, warmup: timed forwards of each, and those before them. threads: of torch, meanwhile.

    Modules are put in eval mode and back. Raises ValueError for numbers below 1, or a `warmup` below 0.
    """
    with _threads(threads):
        found = _in_turn(models, inputs, _forward, runs, warmup)
    return {name: kinds["forward"] for name, kinds in found.items()}


def compare_decoding(
    models: Mapping[str, Model],
    inputs: Mapping[str, Tensor],
    *,
    new_tokens: int = 16,
    runs: int = 50,
    warmup: int = 5,
    threads: int | None = None,
) -> dict[str, dict[str, Latency]]:
    """As `compare_latency`, for models that generate: "prefill" is the forward of `inputs` that begins,
    "decode" the mean of the `new_tokens` forwards after it, each of the most probable token and with
    the cache of those before. In an encoder-decoder the encoder is part of the prefill. What is
    no module is called as a decoder of transformers is.

    Raises ValueError for numbers below 1, or a `warmup` below 0.
    """
    if new_tokens < 1:
        raise ValueError(f"`new_tokens` must be at least 1, got {new_tokens}.")
    with _threads(threads):
        return _in_turn(models, inputs, partial(_generate, new_tokens=new_tokens), runs, warmup)


def _in_turn(
    models: Mapping[str, Model],
    inputs: Mapping[str, Tensor],
    once: Callable[[Model, Mapping[str, Tensor], torch.device], Times],
    runs: int,
    warmup: int,
) -> dict[str, dict[str, Latency]]:
    if runs < 1 or warmup < 0:
        raise ValueError(f"`runs` must be at least 1 and `warmup` at least 0, got {runs}, {warmup}.")
    devices = {name: _device(model) for name, model in models.items()}
    batches = {
        name: {key: value.to(device) for key, value in inputs.items()}
        for name, device in devices.items()
    }
    times: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    with ExitStack() as stack, torch.no_grad():
        for model in models.values():
            if isinstance(model, nn.Module):
                stack.enter_context(evaluating(model))
        for run in range(warmup + runs):
            for name, model in models.items():
                for kind, seconds in once(model, batches[name], devices[name]):
                    if run >= warmup:
                        times[name].setdefault(kind, []).append(1000 * seconds)
    shapes = {key: list(value.shape) for key, value in inputs.items()}
    return {
        name: {
            kind: Latency(
                median_ms=statistics.median(values),
                p95_ms=_percentile(values, 0.95),
                runs=runs,
                inputs=shapes,
                device=device_name(devices[name]),
                threads=torch.get_num_threads(),
            )
            for kind, values in kinds.items()
        }
        for name, kinds in times.items()
    }


def _forward(model: Model, batch: Mapping[str, Tensor], device: torch.device) -> Times:
    seconds, _ = _time(device, lambda: model(**batch))
    yield "forward", seconds


def _generate(
    model: Model, batch: Mapping[str, Tensor], device: torch.device, *, new_tokens: int
) -> Times:
    generates_beside = isinstance(model, PreTrainedModel) and model.config.is_encoder_decoder
    begin = {}
    if generates_beside:
        rows = len(next(iter(batch.values())))
        begin["decoder_input_ids"] = torch.full((rows, 1), _start_token(model), device=device)
    seconds, output = _time(device, lambda: model(**batch, **begin, use_cache=True))
    yield "prefill", seconds
    kept: dict[str, Any] = {}
    if generates_beside:
        kept["encoder_outputs"] = (output.encoder_last_hidden_state,)
        if "attention_mask" in batch:
            kept["attention_mask"] = batch["attention_mask"]

    def decode() -> None:
        nonlocal output
        name = "decoder_input_ids" if generates_beside else "input_ids"
        for _ in range(new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            output = model(
                **{name: token}, **kept, past_key_values=output.past_key_values, use_cache=True
            )

    seconds, _ = _time(device, decode)
    yield "decode", seconds / new_tokens


def _start_token(model: Any) -> int:
    token = model.generation_config.decoder_start_token_id
    return model.config.decoder_start_token_id if token is None else token


def _time(device: torch.device, call: Callable[[], Any]) -> tuple[float, Any]:
    synchronize(device)
    begin = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - begin, result


def _device(model: Model) -> torch.device:
    if isinstance(model, nn.Module):
        return next(model.parameters()).device
    return host()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Torch has so many meanwhile."""
    if count is not None and count < 1:
        raise ValueError(f"`threads` must be at least 1, got {count}.")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _percentile(values: list[float], fraction: float) -> float:
    return float(torch.quantile(torch.tensor(values, dtype=torch.float64), fraction))
