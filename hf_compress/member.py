"""A parameter under constraints, and the tensors that are kept for it in the optimizer's state."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

PREFIX = "hf_compress_"


class Member:
    """One constrained parameter with the tensors kept for it, by name: "latent", "mask", ...

    Before the parameter's first step the tensors wait here, since optimizers initialise a
    parameter whose state is empty; from then on they are in `optimizer.state[param]`. They have
    the parameter's shape, placement and dtype: `Optimizer.load_state_dict` would cast any other
    dtype to it, so resuming would change them (masks come back as floats, and are made bool again).
    """

    def __init__(self, name: str, param: nn.Parameter, optimizer: Optimizer) -> None:
        self.name = name
        self.param = param
        self._optimizer = optimizer
        self._pending: dict[str, Tensor] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._pending or PREFIX + key in self._optimizer.state.get(self.param, {})

    def __getitem__(self, key: str) -> Tensor:
        if key in self._pending:
            return self._pending[key]
        return self._optimizer.state[self.param][PREFIX + key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        if self.stepped:
            self._optimizer.state[self.param][PREFIX + key] = value
        else:
            self._pending[key] = value

    def __delitem__(self, key: str) -> None:
        if key in self._pending:
            del self._pending[key]
        else:
            del self._optimizer.state[self.param][PREFIX + key]

    def keys(self) -> set[str]:
        """The names of the tensors that are kept."""
        state = self._optimizer.state.get(self.param, {})
        names = {str(key).removeprefix(PREFIX) for key in state if str(key).startswith(PREFIX)}
        return names | set(self._pending)

    @property
    def stepped(self) -> bool:
        """Whether the optimizer has stepped on this parameter, before a resume or since."""
        return bool(self._optimizer.state.get(self.param))

    @property
    def latent(self) -> Tensor:
        """The weight that is trained: the parameter itself where no latent copy is needed."""
        if "latent" in self:
            return self["latent"]
        return self.param

    @property
    def momenta(self) -> list[Tensor]:
        """The optimizer's running means of this parameter's gradients; none where it keeps them in
        8 bit."""
        state = self._optimizer.state.get(self.param, {})
        return [state[key] for key in ("momentum_buffer", "exp_avg") if state.get(key) is not None]

    def move_into_state(self) -> None:
        """Hand what waited here to the optimizer, once it has stepped on this parameter."""
        if self._pending and self.param.grad is not None:
            pending, self._pending = self._pending, {}
            state = self._optimizer.state[self.param]
            state.update({PREFIX + key: value for key, value in pending.items()})

    def forget(self) -> None:
        self._pending.clear()
        state = self._optimizer.state.get(self.param, {})
        for key in [key for key in state if str(key).startswith(PREFIX)]:
            del state[key]
