"""How a model was made, asked of the objects that made it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch.distributed import is_torchelastic_launched
from transformers import BitsAndBytesConfig, PreTrainedModel

from hf_compress.distillation.cache.cells import Origin
from hf_compress.publishing.audit import Audit
from hf_compress.publishing.destination import without_tokens
from hf_compress.publishing.naming import cached_revision, hub_id
from hf_compress.publishing.validate import LOCAL_PATH
from hf_compress.quantization.grids import Grid
from hf_compress.targets import find_targets

_TRAINING = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
)


@runtime_checkable
class Describes(Protocol):
    """A callback that tells what it did.

    `describe()` is JSON-able, with `method` and, where there are any, `paper`, `sparsity` (a fraction,
    or one for each entry of `targets`; with `scope` "layer" it holds for each weight alone), `weights`
    (fraction of zeros by name of the weight) and `skipped` (reason by name).
    """

    def describe(self) -> dict[str, Any]: ...


@runtime_checkable
class TrainsOnGrids(Protocol):
    """A callback that leaves weights on integer grids; `grids` tells which, by name of the weight, and
    `input_grids` fixed ones of the inputs of its layer. quantizes_inputs: whether the model now rounds
    its inputs."""

    grids: dict[str, Grid]
    input_grids: dict[str, Grid]
    quantizes_inputs: bool

    def describe(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Recipe:
    """What `describe()` of the callbacks, the teacher, the arguments and the command line tell.

    command: how the program was started; None in a notebook.
    """

    methods: list[dict[str, Any]]
    distillation: dict[str, Any] | None
    training: dict[str, Any] | None
    command: str | None

    @property
    def weights(self) -> list[str]:
        """Names of the weights that the methods set zeros in."""
        names = (name for method in self.methods for name in method.get("weights", ()))
        return list(dict.fromkeys(names))

    @property
    def grids(self) -> dict[str, str]:
        """How the grid of each weight was found that the methods left on one."""
        return {name: method["grid"] for method in self.methods for name in method.get("quantized", ())}

    def check(self, found: Audit, model: PreTrainedModel, written: Mapping[str, Sequence[str]]) -> None:
        """Raises ValueError where the files are denser than the methods were asked for.

        written: the tensors of the files by the weight of `model` that they hold.
        """
        for method in self.methods:
            weights = method.get("weights", {})
            for names, fraction in [*_asked(method, model), *(([n], f) for n, f in weights.items())]:
                found.check([tensor for name in names for tensor in written[name]], fraction)


def recipe_of(trainer: Any | None) -> Recipe:
    """The recipe of a trainer; of a bare model (None) only the command is known."""
    command = _command()
    if trainer is None:
        return Recipe([], None, None, command)
    described = [c for c in trainer.callback_handler.callbacks if isinstance(c, Describes)]
    args = trainer.args.to_dict()
    # Either of the two says how long; the other is then no more than a default.
    unused = "num_train_epochs" if trainer.args.max_steps > 0 else "max_steps"
    training = {name: args[name] for name in _TRAINING if name != unused}
    training |= {"steps_done": trainer.state.global_step, "processes": trainer.args.world_size}
    return Recipe(
        methods=[callback.describe() for callback in described],
        distillation=_distillation(trainer),
        training=training,
        command=command,
    )


def grids_of(trainer: Any | None) -> dict[str, Grid]:
    """The grids that the callbacks of a trainer left weights on, by name; none before the training."""
    return {name: grid for callback in _on_grids(trainer) for name, grid in callback.grids.items()}


def input_grids_of(trainer: Any | None, format: str) -> dict[str, Grid]:
    """The grids on which the model rounds the inputs of its layers, by the name of the weight.

    Raises ValueError where files of `format` could not tell them, so that the scores would be those of
    another model.
    """
    rounding = [callback for callback in _on_grids(trainer) if callback.quantizes_inputs]
    if any(format != "compressed-tensors" or not callback.input_grids for callback in rounding):
        raise ValueError(
            f"the model rounds the inputs of its layers, which files of format {format!r} do not tell: "
            'with `calibration` pass `format="compressed-tensors"`. Or let it have float inputs, by '
            "`remove_hooks()` of the QuantizationCallback, before it is evaluated here."
        )
    return {name: grid for callback in rounding for name, grid in callback.input_grids.items()}


def _on_grids(trainer: Any | None) -> list[TrainsOnGrids]:
    callbacks = [] if trainer is None else trainer.callback_handler.callbacks
    return [callback for callback in callbacks if isinstance(callback, TrainsOnGrids)]


def teacher_of(trainer: Any | None) -> Any | None:
    """The only teacher of a distilling trainer, where that is a model of its own."""
    # Asked of the object: the trainer's class may be one of the user's, mixed with another.
    return None if trainer is None else vars(trainer).get("teacher")


def teachers_of(trainer: Any | None) -> list[Any]:
    """All teachers of a distilling trainer, the base under its student's adapters among them."""
    return [] if trainer is None else vars(trainer).get("teachers", [])


def distils(trainer: Any | None) -> bool:
    """Whether a teacher, or what was kept of its answers, trains with `trainer`."""
    return bool(teachers_of(trainer)) or _kept_answers(trainer) is not None


def _kept_answers(trainer: Any | None) -> Origin | None:
    return None if trainer is None else vars(trainer).get("kept_answers")


def bits_of(model: Any) -> int | None:
    """8 or 4 for a model packed by bitsandbytes, else None."""
    settings = getattr(model.config, "quantization_config", None)
    if not isinstance(settings, BitsAndBytesConfig):
        return None
    return 8 if settings.load_in_8bit else 4


def precision_of(model: Any) -> str:
    bits = bits_of(model)
    return f"{bits} bit" if bits else str(model.dtype).removeprefix("torch.")


def _distillation(trainer: Any) -> dict[str, Any] | None:
    if not distils(trainer):
        return None
    kept = _kept_answers(trainer)
    if kept is not None:
        told = {
            "teacher": hub_id(kept.name) or "a model that was asked before",
            "teacher's precision": kept.precision,
            "teacher's answers": f"kept before ({kept.what})",
        }
    else:
        teachers = teachers_of(trainer)
        names = [hub_id(each.config.name_or_path) or type(each).__name__ for each in teachers]
        told = {
            "teacher": ", ".join(names),
            "teacher's precision": ", ".join(dict.fromkeys(map(precision_of, teachers))),
        }
        revisions = [cached_revision(hub_id(each.config.name_or_path)) for each in teachers]
        if any(revisions):
            told["teacher's revision"] = ", ".join(map(str, revisions))
    if trainer.matching.weights:
        told["matches"] = ", ".join(f"{n} (weight {w:g})" for n, w in trainer.matching.weights.items())
    if trainer.args.on_policy:
        told["part of the steps on the student's own text"] = f"{trainer.args.on_policy:g}"
    return {**told, **trainer.args.make_divergence().describe(), "alpha": trainer.args.alpha}


def _asked(method: Mapping[str, Any], model: PreTrainedModel) -> Iterator[tuple[list[str], float]]:
    """The weights that were to reach a fraction of zeros together."""
    left, asked = list(method.get("weights", ())), method.get("sparsity")
    if not left or asked is None:
        return
    for entry, fraction in asked.items() if isinstance(asked, Mapping) else [(None, asked)]:
        # A weight that several entries match belongs to the first, as when it was pruned.
        matched = find_targets(model, entry).targets if entry is not None else left
        names = [name for name in left if name in matched]
        left = [name for name in left if name not in names]
        alone = method.get("scope") == "layer"
        yield from (([name], fraction) for name in names) if alone else [(names, fraction)]


def _command() -> str | None:
    """The command line, for the working directory it was given in; None where there was none.

    Absolute paths become relative to that directory; of others the last part is left, which is all
    that concerns a reader.
    """
    main = sys.modules["__main__"]
    if "__file__" not in vars(main):  # a notebook, a prompt, or `python -c`
        return None
    launch = ["python"]
    if is_torchelastic_launched():
        launch = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
    program = Path(sys.argv[0])
    if main.__spec__ is not None:
        words = [*launch, "-m", main.__spec__.name.removesuffix(".__main__")]
    elif program.parent == Path(sys.executable).parent:
        words = [program.name]
    else:
        words = [*launch, _relative(sys.argv[0])]
    line = without_tokens(shlex.join([*words, *sys.argv[1:]]))
    return LOCAL_PATH.sub(lambda found: _relative(found[0]), line)


def _relative(path: str) -> str:
    place, here = Path(path).expanduser(), Path.cwd()
    if not place.is_absolute():
        return path
    return str(place.relative_to(here)) if place.is_relative_to(here) else place.name
