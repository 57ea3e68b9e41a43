"""The one mechanism: the optimizer trains latent weights, the model sees their projection.

Two hooks on the torch optimizer surround every step:

    before   observe(latent, gradient), then   weight <- latent
    step     any optimizer; its momentum and weight decay act on the latent weight
    after    latent <- weight, then            weight <- projection(latent)

The gradient of the projected weight is applied to the latent one: the straight-through estimator,
exactly. The module tree, the names and the storage of the parameters never change, and every
checkpoint at every moment holds projected weights.

Latent weights, scores and masks live in `optimizer.state[param]`, so that the optimizer's own
checkpoint carries them, sharded or not. After an fp16 overflow the torch optimizer did not step,
hence nothing happened here either.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer

from hf_compress.member import PREFIX, Member
from hf_compress.optimizers import check_parameters, torch_optimizer

_ATTACHED = "_hf_compress_constraints"


class Constraint(abc.ABC):
    """A set that weights must lie in. Members come as a group, so that a threshold can be global."""

    order: int
    """Constraints on one optimizer act by rising order: masks (0) before integer grids (1)."""

    @property
    @abc.abstractmethod
    def needs_latent(self) -> bool:
        """Whether the projection loses something that training may want back."""

    @abc.abstractmethod
    def begin(self, members: Sequence[Member]) -> None:
        """Set up what is missing in the members' state; after a resume nothing is."""

    @abc.abstractmethod
    def observe(self, members: Sequence[Member]) -> None:
        """Before a step: `member.latent`, `member.param` (projected) and `member.param.grad`."""

    @abc.abstractmethod
    def update(self, members: Sequence[Member]) -> None:
        """After a step, while `member.param` holds the new latent weight: rank or fit anew."""

    @abc.abstractmethod
    def project_(self, members: Sequence[Member]) -> None:
        """Put the latent weight that `member.param` holds onto the set, in place."""


class TimedConstraint(Constraint):
    """A constraint that follows a schedule: it is told the time before each step."""

    _step = _max_steps = 0

    def at(self, step: int, max_steps: int) -> None:
        """The coming optimizer step is number `step` (from 1) of `max_steps`."""
        self._step, self._max_steps = step, max_steps

    @property
    def begun(self) -> bool:
        """Whether there must be state of an earlier step now, which a resumed run cannot make up."""
        return False

    def _check_time(self) -> None:
        if self._max_steps == 0:
            name = type(self).__name__
            raise RuntimeError(
                f"tell the {name} the time before each step: `{name.lower()}.at(step, max_steps)`."
            )


class Constraints:
    """All constraints of one optimizer, and the hooks that apply them. Made by `constrain`."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._members: dict[nn.Parameter, Member] = {}
        self._groups: list[tuple[Constraint, list[Member]]] = []
        self._hooks = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    @torch.no_grad()
    def add(self, parameters: Mapping[str, nn.Parameter], constraint: Constraint) -> None:
        members = [
            self._members.setdefault(param, Member(name, param, self._optimizer))
            for name, param in parameters.items()
        ]
        for other, others in self._groups:
            if other.order == constraint.order and not {*members}.isdisjoint(others):
                name = next(member.name for member in members if member in others)
                raise ValueError(
                    f"{name} already has a {type(other).__name__} on this optimizer: one of a kind "
                    "for each weight. Use one with all settings, or give them other targets."
                )
        before = {member: member.keys() for member in members}
        # First, since it may refuse: then nothing stays attached.
        constraint.begin(members)
        self._groups.append((constraint, members))
        self._groups.sort(key=lambda group: group[0].order)
        for member in members:
            if constraint.needs_latent and "latent" not in member:
                member["latent"] = member.param.detach().clone()
        # After a resume nothing is new, and the weights are as all constraints left them: projecting
        # them now would undo what those that come later did, and hide it from their checks.
        new = {member for member in members if not member.stepped or member.keys() != before[member]}
        self._show_latents(new)
        self._project(new)

    @torch.no_grad()
    def remove(self) -> None:
        """Detach from the optimizer and free its state of ours; the weights stay projected.

        A second time it does nothing, though the optimizer may have got other constraints by then.
        """
        if vars(self._optimizer).get(_ATTACHED) is not self:
            return
        for hook in self._hooks:
            hook.remove()
        for member in self._members.values():
            member.forget()
        delattr(self._optimizer, _ATTACHED)

    @torch.no_grad()
    def _before(self, *_: object) -> None:
        if not self._overflowed():
            for constraint, members in self._groups:
                constraint.observe([m for m in members if m.param.grad is not None])
        self._show_latents(self._members.values())

    @torch.no_grad()
    def _after(self, *_: object) -> None:
        for member in self._members.values():
            member.move_into_state()
            if "latent" in member:
                member["latent"].copy_(member.param)
        if not self._overflowed():
            for constraint, members in self._groups:
                constraint.update(members)
        self._drop_latents()
        self._project(self._members.values())

    def _overflowed(self) -> bool:
        # A fused optimizer is called after an fp16 overflow too, and skips the update in its kernel.
        found_inf = vars(self._optimizer).get("found_inf")
        return found_inf is not None and bool(found_inf.item())

    def _show_latents(self, members: Iterable[Member]) -> None:
        for member in members:
            if "latent" in member:
                member.param.copy_(member["latent"])

    def _project(self, chosen: Iterable[Member]) -> None:
        chosen = {*chosen}
        for constraint, members in self._groups:
            constraint.project_([member for member in members if member in chosen])

    def _drop_latents(self) -> None:
        needed = {m for constraint, members in self._groups if constraint.needs_latent for m in members}
        for member in self._members.values():
            if "latent" in member and member not in needed:
                del member["latent"]


def constrain(
    optimizer: Optimizer | AcceleratedOptimizer,
    parameters: Mapping[str, nn.Parameter],
    constraint: Constraint,
) -> Constraints:
    """Keep `parameters` (by name) in the set of `constraint` through every step of `optimizer`.

    Works with any torch optimizer and with one that Accelerate prepared, on whole parameters and on
    FSDP2 shards. Further calls on the same optimizer add constraints, which share one latent weight
    for each parameter. When resuming, load the optimizer's state first. Memory: one copy of each
    parameter while a constraint needs latent weights, besides what the constraint keeps.

    Returns the `Constraints` of the optimizer, whose `remove()` ends the constraining.
    Raises ValueError where it could not be right: packed or frozen parameters, parameters that the
    optimizer does not train, FSDP1's flat parameters, DeepSpeed, layer-wise and schedule-free
    optimizers.
    """
    optimizer = torch_optimizer(optimizer)
    check_parameters(optimizer, parameters)
    constraints = vars(optimizer).get(_ATTACHED)
    if constraints is None:
        constraints = Constraints(optimizer)
        setattr(optimizer, _ATTACHED, constraints)
    constraints.add(parameters, constraint)
    return constraints


def is_constrained(
    optimizer: Optimizer | AcceleratedOptimizer, parameters: Mapping[str, nn.Parameter]
) -> bool:
    """Whether the optimizer holds state of a constraint on any of `parameters`: after a resume, whether
    its checkpoint did."""
    state = torch_optimizer(optimizer).state
    return any(str(key).startswith(PREFIX) for p in parameters.values() for key in state.get(p, {}))


def check_loaded(name: str, astray: int, claim: str) -> None:
    """Raises ValueError where `name` has something `astray` from what the state of the optimizer
    claims of it, after a resume."""
    if astray > 0:
        # Trainer (transformers 5.23) does so where a model's tensors have other names in files.
        raise ValueError(
            f"{name} is not {claim}: its weights were not loaded. Make the model by "
            "`from_pretrained(checkpoint)`, and resume then."
        )
