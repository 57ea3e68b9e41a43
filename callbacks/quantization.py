"""Trains the weights of any Trainer on an integer grid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_compress.calibration.batches import Batch, check_calibration
from hf_compress.callbacks.constraining import ConstrainingCallback
from hf_compress.constraint import constrain
from hf_compress.distributed import local
from hf_compress.quantization.activations import InputQuantizer, check_inputs
from hf_compress.quantization.calibrated import InputGrids, calibrated_grids, check_no_grids
from hf_compress.quantization.grids import Grid, GroupSize, check_bits, fake_quantize, grouped
from hf_compress.quantization.plan import QuantizationPlan
from hf_compress.quantization.quantizer import Quantizer
from hf_compress.targets import Selection, Target, find_targets

logger = logging.get_logger(__name__)


class QuantizationCallback(ConstrainingCallback):
    """Quantization-aware training inside an unmodified `Trainer`.

    bits, group_size, grid, symmetric, start, end, interval, learn_scale, grids: see
        `hf_compress.quantization.quantizer.Quantizer`. From `end` on the grid is fixed. With `grids`
        what `quantize_oneshot_` has found is trained on from exactly there: the middle of the cells,
        which weights leave where the learning rate is about 1 % of a scale.
    activations: 8 (or 2 to 8) to train with the inputs of the targeted layers as integers of so many
        bits too, from `start` on: see `hf_compress.quantization.activations.InputQuantizer`.
    calibration: batches, mappings of tensors as the model's forward takes them, some 32 rows. With them
        the inputs of a layer share one affine grid, which covers those of the batches; without, each
        token has a grid of its own. The model runs through them when training begins, when its weights
        get new bits, and at `end`, from where on these grids are fixed too. They are held in memory.
    targets, ignore: class names, module names or "re:" patterns, see
        `hf_compress.targets.find_targets`. By default the Linear and Conv1D layers and experts of the
        backbone; never embeddings, heads, norms, biases, adapters.

    Logs `bits`, those of the targeted weights: of their dtype before `start`. From `start` on every
    evaluation and every checkpoint sees weights of the grid, as floats that plain `from_pretrained`
    loads; no checkpoint counts as the best before `end`. Resuming from a checkpoint gives the same
    weights as never having stopped. With a `PruningCallback` on the same weights, in any order, what is
    pruned stays zero.

    After training `grids` tells the scale and zero point of each weight, by name; with `calibration`
    `input_grids` tells those of the inputs of its layer. The inputs stay quantized, so that an
    evaluation still tells what was trained: `remove_hooks()` ends it.

    Raises ValueError when made with a value out of range or an empty `calibration`, TypeError for one
    that is not made of tensors; and ValueError when training begins: for targets that match nothing, a
    `group_size` that does not divide, weights that are not finite, a calibration that does not reach a
    layer, `grids` of another kind, a schedule that cannot finish, a checkpoint without its state, or
    with fixed grids for inputs where `calibration` is missing, FSDP1, DeepSpeed, layer-wise or
    schedule-free optimizers, models packed by bitsandbytes or whose weights are frozen under adapters.
    """

    def __init__(
        self,
        bits: int | Sequence[int],
        *,
        group_size: GroupSize = None,
        grid: str = "mse",
        symmetric: bool = True,
        start: int | float = 0.0,
        end: int | float = 0.6,
        interval: int | None = None,
        learn_scale: bool = False,
        grids: Mapping[str, Grid] | None = None,
        activations: int | None = None,
        calibration: Iterable[Batch] | None = None,
        targets: str | Sequence[str] | None = None,
        ignore: str | Sequence[str] | None = None,
    ) -> None:
        self.bits = bits
        self.group_size = group_size
        self.grid = grid
        self.symmetric = symmetric
        self.start = start
        self.end = end
        self.interval = interval
        self.learn_scale = learn_scale
        self.activations = activations
        self.targets = targets
        self.ignore = ignore
        self.given_grids = grids
        self.grids: dict[str, Grid] = {}
        self.input_grids: dict[str, Grid] = {}
        self._selection = Selection()
        self._inputs: InputQuantizer | None = None
        self._kept: InputGrids | None = None
        self._phase: tuple[int | None, bool] = (None, False)
        if activations is not None:
            check_bits("activations", activations)
        elif calibration is not None:
            raise ValueError(
                "`calibration` finds grids for inputs: pass `activations=8` with it, or leave it out."
            )
        self._batches = [] if calibration is None else check_calibration(calibration)
        # Wrong settings are told here rather than when the training begins.
        self._quantizer = self._constraint({})

    @property
    def finished(self) -> bool:
        return self._quantizer.finished

    @property
    def quantizes_inputs(self) -> bool:
        """Whether the model now rounds the inputs of its layers, after the training too."""
        return self._inputs is not None

    def measurements(self) -> dict[str, float]:
        bits = self._quantizer.width
        if bits is None:
            widths = [8 * param.element_size() for param in self._selection.parameters.values()]
            bits = max(widths, default=0)
        return {"bits": bits}

    def describe(self) -> dict[str, object]:
        return {
            "method": "quantization-aware training",
            "paper": "arXiv:1902.08153" if self.learn_scale else "arXiv:1712.05877",
            "bits": self.bits if isinstance(self.bits, int) else list(self.bits),
            "group_size": self.group_size,
            "grid": self.grid,
            "symmetric": self.symmetric,
            "start": self.start,
            "end": self.end,
            "interval": self.interval,
            "learn_scale": self.learn_scale,
            "given_grids": self.given_grids is not None,
            "activations": self.activations,
            "calibration_batches": len(self._batches),
            "quantized": {name: grid.bits for name, grid in self.grids.items()},
            "skipped": self._selection.skipped,
        }

    def dry_run(self, model: Any) -> QuantizationPlan:
        """What would be quantized, what not and why, and its size. Print it; nothing is changed.

        Raises ValueError for targets that match nothing, that `group_size` does not divide or that are
        not finite.
        """
        selection = find_targets(model, self.targets, self.ignore)
        quantizer = self._constraint(selection.targets)
        quantizer.check(selection.parameters)
        if self.activations is not None:
            check_inputs(selection.targets)
        return QuantizationPlan.of(model, selection, quantizer.scheme)

    def remove_hooks(self) -> None:
        """Let the layers see their inputs as they are again."""
        if self._inputs is not None:
            self._inputs.remove()
            self._inputs = None

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: object,
    ) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if self._inputs is None:
            return
        phase = (self._quantizer.width, self._quantizer.finished)
        if self._kept is not None and phase != self._phase:
            self._phase, self._inputs.enabled = phase, False
            self._inputs.grids = self.input_grids = self._calibrated(model, self._kept)
            self._kept.keep(self.input_grids)
        self._inputs.enabled = self._quantizer.width is not None

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: object,
    ) -> None:
        self.grids = self._quantizer.grids
        self._detach()
        astray = [name for name, grid in self.grids.items() if not self._lies_on(name, grid)]
        if astray:
            logger.warning(
                f"{len(astray)} weights are not on the grid they were trained on, {astray[0]} among "
                "them: something changed them after the last step."
            )
        if not self.finished:
            bits = self._quantizer.bits[-1]
            logger.warning(
                f"the weights have {self.measurements()['bits']} bits, and their grid of {bits} is not "
                f"final: training ended at step {state.global_step} of {state.max_steps}, before `end`."
            )

    def _lies_on(self, name: str, grid: Grid) -> bool:
        target = self._selection.targets[name]
        weight = local(target.param.detach())
        groups = grouped(weight, input_dim=target.input_dim, group_size=self.group_size)
        return fake_quantize(groups, grid).equal(groups)

    def _constraint(self, targets: Mapping[str, Target]) -> Quantizer:
        return Quantizer(
            self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            grid=self.grid,
            start=self.start,
            end=self.end,
            interval=self.interval,
            learn_scale=self.learn_scale,
            grids=self.given_grids,
            targets=targets,
        )

    def _attach(self, state: TrainerState, model: Any, optimizer: Any) -> None:
        self.remove_hooks()
        self._selection = find_targets(model, self.targets, self.ignore)
        self._quantizer = quantizer = self._constraint(self._selection.targets)
        parameters = self._selection.parameters
        self.input_grids, self._kept = {}, None
        if self.activations is not None:
            check_inputs(self._selection.targets)
            if self._batches:
                self._kept = InputGrids(self.activations)
        if self._kept is None:
            check_no_grids(optimizer, parameters)
        else:
            self._constraints = constrain(optimizer, parameters, self._kept)
            # Before the weights are changed, since it may refuse.
            self.input_grids = self._kept.grids or self._calibrated(model, self._kept)
        self._constrain(state, optimizer, parameters, quantizer, method="this quantization")
        if self._kept is not None:
            if quantizer.begun and not self._kept.grids:
                raise ValueError(
                    f"the checkpoint of step {state.global_step} holds no grids for the inputs: resume "
                    "with the `activations` and `calibration` that it was trained with."
                )
            self._kept.keep(self.input_grids)
        self._phase = (quantizer.width, quantizer.finished)
        if self.activations is not None:
            self._inputs = InputQuantizer(
                model, self._selection.targets, bits=self.activations, grids=self.input_grids
            )
            self._inputs.enabled = quantizer.width is not None

    def _calibrated(self, model: Any, kept: InputGrids) -> dict[str, Grid]:
        return calibrated_grids(model, self._selection.targets, self._batches, bits=kept.bits)
