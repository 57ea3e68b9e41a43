"""One folder with the compressed model, its measured report and its card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub.utils import validate_repo_id
from torch import Tensor, nn
from transformers import (
    BaseImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SequenceFeatureExtractor,
)

from hf_compress.publishing.adapters import (
    check_adapters,
    describe_adapters,
    is_adapted,
    save_adapters,
)
from hf_compress.publishing.audit import audit
from hf_compress.publishing.card import render
from hf_compress.publishing.destination import Destination
from hf_compress.publishing.differences import float_weights
from hf_compress.publishing.evaluation import first_batch, trainer_scores
from hf_compress.publishing.folder import check_target, move_into_place, on_main_process, workplace
from hf_compress.publishing.integers import inspect_integers
from hf_compress.publishing.measuring import measure
from hf_compress.publishing.metadata import check_license
from hf_compress.publishing.naming import hub_id, written_as
from hf_compress.publishing.pictures import draw_all
from hf_compress.publishing.push import send
from hf_compress.publishing.recipe import grids_of, input_grids_of, recipe_of, teacher_of
from hf_compress.publishing.report import Labels, report_of, results_of
from hf_compress.publishing.validate import validate
from hf_compress.quantization.export import save_quantized
from hf_compress.targets import without_adapters


def publish(
    source: Any,
    repo_id: str | None = None,
    *,
    folder: str | Path | None = None,
    push: bool = True,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    baseline: PreTrainedModel | None = None,
    baseline_name: str | None = None,
    evaluate: Callable[[PreTrainedModel], Mapping[str, float]] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    processing_class: Any = None,
    base_model: str | None = None,
    dataset: str | None = None,
    dataset_revision: str | None = None,
    split: str | None = None,
    evaluation: Mapping[str, Any] | None = None,
    metric: str | None = None,
    language: str | Sequence[str] | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    memory: bool = False,
    format: str = "dense",
) -> Path:
    """Writes the model, `report.json`, `README.md` and pictures to `folder`, sends it to `repo_id` on
    the Hub in one commit, and returns the folder.

    Every number comes from measurements made here, and from the written files, opened again. The
    callbacks, the arguments and the teacher of a trainer tell how the model was made.

    source: a Trainer after training, or a model: of transformers, packed by bitsandbytes too, or one
        under adapters of PEFT, of which only these are written.
    repo_id: "org/name" or "name" on the Hub, and the name in the card; by default that of `folder`,
        and then nothing is sent.
    folder: by default the name of the model, in the working directory. What it holds can be sent again
        by `hf_compress.publishing.push.push_folder`, which is also how a push that failed goes on.
    push: False writes the folder only.
    private, revision, create_pr, token: see `hf_compress.publishing.destination.Destination`.
    baseline: the dense model, measured in the same way; by default the teacher of a distilling
        trainer. It is moved to the trainer's device.
    baseline_name: what the card calls it, such as how it was trained.
    evaluate: function of a model to its scores by name; by default what the trainer evaluates.
    inputs: batch to time one forward pass of; by default the first of the trainer's eval dataset.
    processing_class: tokenizer or processor to save; by default the trainer's.
    base_model: hub id of the model it began with; by default the name in the config. Adapters need it
        where their base is a folder, since others load that by its name.
    dataset, dataset_revision, split: what was evaluated on, for the card.
    evaluation: how its rows were made, as the fields of `hf_compress.cli.rows.Evaluation`, so that
        `hf-compress verify` can make them again.
    metric: the score of the card's first sentence; by default the first that is no loss.
    language: ISO 639 codes of what the model reads, such as "en".
    license, license_name, license_link: licence identifier of the Hub; "other" needs a name, and may
        have a link.
    memory: measure the peak memory too, loading each model in a process of its own.
    format: how weights that a `QuantizationCallback` trained on integer grids are written, see
        `hf_compress.quantization.export.save_quantized`. "dense", the default: floats on the grid.

    All is prepared beside `folder` and moved into place at the end. `folder` may hold an earlier
    result of this function. On several ranks call it on each; the first one writes and sends.

    Raises before any work FileExistsError or OSError for a `folder` that cannot take it, ValueError
    and TypeError for other arguments, NotImplementedError for FSDP and DeepSpeed, PushError for what
    the Hub would refuse. Raises ValueError when the files are denser than was asked, or the card would
    not be true or valid, and PushError for a push that failed, with the folder whole.
    """
    if folder is None and repo_id is None:
        raise ValueError("Where to? Pass a `repo_id` of the Hub, a `folder`, or both.")
    to = None
    if push and repo_id is not None:
        to = Destination(repo_id, private, revision, create_pr, token)
    elif private or revision or create_pr:
        raise ValueError("Nothing is to be sent: pass a `repo_id`, or no more than a `folder`.")
    # Without "..", so that the folder has a name.
    folder = Path(os.path.abspath(folder or str(repo_id).rpartition("/")[2]))
    trainer = None if isinstance(source, nn.Module) else source
    model = source if trainer is None else trainer.accelerator.unwrap_model(trainer.model)
    baseline = baseline if baseline is not None else teacher_of(trainer)
    _check(trainer, model, baseline, repo_id)
    base_model = base_model or hub_id(without_adapters(model).config.name_or_path or None)
    check_adapters(model, base_model)
    check_license(license, license_name, license_link)
    grids = grids_of(trainer)
    if format != "dense" and not grids:
        raise ValueError(
            f"`format` is {format!r}, and no weights were trained on integer grids: publish after a "
            "training with a QuantizationCallback, or leave it out."
        )
    input_grids = input_grids_of(trainer, format)
    on_main_process(lambda: check_target(folder))
    try:
        if to is not None:
            to = on_main_process(to.checked) or to
        history = [] if trainer is None else list(trainer.state.log_history)
        recipe = recipe_of(trainer)
        if evaluate is None:
            evaluate = trainer_scores(trainer)
        scores = {"compressed": dict(evaluate(model))}
        if baseline is not None:
            scores["dense"] = dict(evaluate(baseline))
        if metric is not None and metric not in scores["compressed"]:
            raise ValueError(f"`metric` {metric!r} is none of {sorted(scores['compressed'])}.")
        if inputs is None:
            inputs = first_batch(trainer)
        if processing_class is None and trainer is not None:
            processing_class = trainer.processing_class
        labels = Labels(
            to.repo_id if to else repo_id or folder.name,
            base_model,
            baseline_name,
            dataset,
            split,
            metric,
            license,
            license_name,
            license_link,
            [language] if isinstance(language, str) else language and list(language),
            dataset_revision,
            evaluation,
        )

        def write() -> None:
            place = workplace(folder)
            if is_adapted(model):
                save_adapters(model, place, str(base_model))
            elif grids:
                save_quantized(model, place, grids=grids, input_grids=input_grids, format=format)
            else:
                model.save_pretrained(place)
            if processing_class is not None:
                processing_class.save_pretrained(place)
            written = written_as(model, recipe.weights)
            targets = [tensor for names in written.values() for tensor in names]
            integers = None
            if grids:
                found, integers = inspect_integers(
                    place,
                    model,
                    grids,
                    format=format,
                    targets=targets,
                    baseline=baseline,
                    chosen=recipe.grids,
                )
            else:
                found = audit(place, targets=targets)
            recipe.check(found, model, written)
            report = report_of(labels, trainer, model, baseline, recipe, found, format) | {
                "integers": integers,
                "tokenizer": isinstance(processing_class, PreTrainedTokenizerBase),
                "image_processor": isinstance(processing_class, BaseImageProcessor),
                "feature_extractor": isinstance(processing_class, SequenceFeatureExtractor),
                "adapters": describe_adapters(model, found),
                "history": history,
            }
            measured = measure(place, found, model, baseline, scores, inputs, memory)
            compressed = list(dict.fromkeys([*recipe.weights, *recipe.grids]))
            weights = [float_weights(each, compressed) for each in (baseline, model)]
            _write(place, report | results_of(measured, metric), weights)
            validate(place)
            move_into_place(folder)

        on_main_process(write)
    finally:
        on_main_process(lambda: shutil.rmtree(workplace(folder), ignore_errors=True))
    # Others do not wait for it: an upload may outlast their patience.
    if to is not None and PartialState().is_main_process:
        send(folder, to)
    return folder


def _check(trainer: Any, model: Any, baseline: Any, repo_id: str | None) -> None:
    if trainer is not None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise NotImplementedError(
            "The model is sharded: trainer.save_model(), and publish what `from_pretrained` loads."
        )
    for role, given in (("source", without_adapters(model)), ("baseline", baseline)):
        if given is not None and not isinstance(given, PreTrainedModel):
            raise TypeError(
                f"`{role}` must be a Transformers model, or a Trainer of one, got "
                f"{type(given).__name__}."
            )
    if baseline is model:
        raise ValueError("`baseline` is the compressed model itself: pass the dense one.")
    validate_repo_id(repo_id)


def _write(place: Path, report: Mapping[str, Any], weights: Sequence[Sequence[Tensor]]) -> None:
    """weights: the compressed ones, in the dense model and now."""
    written = json.dumps(report, indent=1) + "\n"
    (place / "report.json").write_text(written, encoding="utf-8")
    # From what a reader finds, so that the card can be written again from there.
    told = json.loads(written)
    before, after = weights
    card = render(told, pictures=draw_all(told, before, after, place))
    (place / "README.md").write_text(card, encoding="utf-8")
