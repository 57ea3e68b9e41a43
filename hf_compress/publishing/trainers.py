"""Trainers whose own `push_to_hub` and `create_model_card` write a card that was measured."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub import CommitInfo
from transformers import PreTrainedModel, Trainer

from hf_compress.publishing.destination import Destination
from hf_compress.publishing.folder import on_main_process
from hf_compress.publishing.progress import write_progress_card
from hf_compress.publishing.publish import publish
from hf_compress.publishing.push import send

# Trainer sends its whole output directory while it trains, but nothing that begins so.
FOLDER = "_published"


class PublishingMixin(Trainer):
    """Puts `publish` in the place of a Trainer's own card and push.

        class MyTrainer(PublishingMixin, Trainer): ...

    `push_to_hub`, and `save_model` with `push_to_hub=True`, evaluate the model and `baseline`, write
    model, report and card to `_published` in the output directory, and send that in one commit, without
    the pickles. While it trains, the pushes of `hub_strategy` carry a card that says how far it is.
    With checkpoints in them (`"checkpoint"`, `"all_checkpoints"`) these are Trainer's own, with the
    state of the optimizer, as it needs them to resume.

    baseline: the dense model, to be set before; by default the teacher of a distilling trainer.
    """

    baseline: PreTrainedModel | None = None

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        dataset_name: str | None = None,
    ) -> None:
        """Writes README.md, report.json and pictures to the output directory; within `train` a card of
        how far it is. On several ranks call it on each.

        license, finetuned_from, dataset: as `license`, `base_model` and `dataset` of `publish`. What a
        measured card tells by itself is not taken from the others.

        Raises as `publish` does.
        """
        if self.is_in_train:
            if self.is_world_process_zero():
                model = self.accelerator.unwrap_model(self.model)
                write_progress_card(model, self.args, self.state)
            return
        name = model_name if model_name and "/" in model_name else self._repository()
        self._publish(name, license, finetuned_from, dataset or dataset_name)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> CommitInfo | Any:
        """See `Trainer.push_to_hub`; `card` is for `create_model_card`. On several ranks call it on
        each: the first one sends, and returns the commit, or a future of it where not `blocking`.

        Raises as `publish` does; a push that failed goes on with `push_folder`, as the error says.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        to = Destination(
            self._repository(),
            private if private is not None else self.args.hub_private_repo,
            revision or self.args.hub_revision,
            token=token or self.args.hub_token,
        )
        to = on_main_process(to.checked) or to
        dataset = card.get("dataset") or card.get("dataset_name")
        folder = self._publish(to.repo_id, card.get("license"), card.get("finetuned_from"), dataset)
        if not PartialState().is_main_process:
            return None
        message = commit_message or "End of training"
        if blocking:
            return send(folder, to, message)
        return to.api.run_as_future(send, folder, to, message)

    def _repository(self) -> str:
        given = self.hub_model_id or self.args.hub_model_id
        return given or Path(str(self.args.output_dir)).absolute().name

    def _publish(
        self,
        name: str,
        license: str | None,
        base_model: str | None,
        dataset: str | Sequence[str] | None,
    ) -> Path:
        output = Path(str(self.args.output_dir))
        folder = publish(
            self,
            name,
            folder=output / FOLDER,
            push=False,
            baseline=self.baseline,
            license=license,
            base_model=base_model,
            dataset=dataset if dataset is None or isinstance(dataset, str) else ", ".join(dataset),
        )

        def copy_card() -> None:
            for pattern in ("README.md", "report.json", "*.png"):
                for file in folder.glob(pattern):
                    shutil.copy(file, output / file.name)

        on_main_process(copy_card)
        return folder
