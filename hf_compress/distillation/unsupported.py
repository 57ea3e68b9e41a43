"""What a distilling Trainer would ignore, or do wrong: refused when it is built."""

from __future__ import annotations

from typing import Any

from transformers.trainer_utils import has_length


def refuse_unsupported(trainer: Any) -> None:
    """Raises where the Trainer that distillation is built on is set up for something else."""
    args, parallelism = trainer.args, trainer.accelerator.parallelism_config
    if args.deepspeed or trainer.is_deepspeed_enabled:
        raise NotImplementedError(
            "Distillation under DeepSpeed is not supported: ZeRO would shard the student but not the "
            "teacher. Use DDP or FSDP2 (accelerate launch --use_fsdp --fsdp_version 2)."
        )
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise NotImplementedError(
            "Distillation under FSDP1 is not supported: its flat parameters hold no teacher, and hide "
            "the student's output layer. Use FSDP2 (accelerate launch --use_fsdp --fsdp_version 2)."
        )
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        raise NotImplementedError(
            "Distillation knows data parallelism only, not tensor, context or sequence parallelism."
        )
    if args.n_gpu > 1:
        raise NotImplementedError(
            f"{args.n_gpu} GPUs in one process would be used through nn.DataParallel, where the items "
            "cannot be counted. Use `accelerate launch`, or show one GPU with CUDA_VISIBLE_DEVICES."
        )
    if callable(trainer.compute_loss_func):  # before transformers 5.19 trl keeps a mere string there
        raise ValueError(
            "`compute_loss_func` would be ignored: the task's own loss is computed from the logits."
        )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} would be ignored; set it to 0. A "
            "teacher's soft labels do its work."
        )
    # SFTConfig alone has it.
    if (loss_type := vars(args).get("loss_type", "nll")) != "nll":
        raise ValueError(f"loss_type={loss_type!r} would be ignored; set it to 'nll'.")
    for name, dataset in (("train", trainer.train_dataset), ("eval", trainer.eval_dataset)):
        parts = dataset.items() if isinstance(dataset, dict) else [(name, dataset)]
        for part, rows in parts:
            if rows is not None and has_length(rows) and len(rows) == 0:
                raise ValueError(f"The {part} dataset is empty: there is nothing to learn from.")


def refuse_together(
    *, routed: bool, translated: bool, chosen: bool, weighted: bool, compared: bool
) -> None:
    """Raises ValueError for what does not go together: teachers of single rows, of another tokenizer,
    in the precision that is chosen, weighted, and compared inside."""
    if routed and (translated or chosen or weighted):
        raise ValueError(
            "`teacher_column` goes with neither `teacher_weights`, `teacher_processing_class` nor "
            "teacher_bits='auto', since one of several teachers answers each row: leave them out."
        )
    if translated and (chosen or compared):
        raise ValueError(
            "`teacher_processing_class` goes with neither `matches` nor teacher_bits='auto', which "
            "ask the teacher about the student's tokens: leave them out."
        )
