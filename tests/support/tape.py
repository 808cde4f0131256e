"""A stand-in for a CUDA graph on the CPU: a tape of the operations that a call makes.

Like a graph it repeats them with the addresses, shapes and Python numbers of the recording, and
runs no Python of the model's; and like one it cannot record what waits for a tensor's value.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Tape(TorchDispatchMode):
    """A `Capture`: records operations while they run, then puts back what they changed."""

    def __init__(self) -> None:
        super().__init__()
        self.num_recordings, self.num_replays = 0, 0
        self._operations: list[tuple[Any, Any, Any, list[Any]]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: set[int] = set()

    def __call__(
        self, run: Callable[[], None], generators: Sequence[torch.Generator]
    ) -> Callable[[], None]:
        self._operations, self._before, self._made = [], {}, set()
        states = [generator.get_state() for generator in generators]
        with self:
            run()
        for tensor, held in self._before.values():
            tensor.copy_(held)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        operations = self._operations
        self.num_recordings += 1

        def again() -> None:
            self.num_replays += 1
            play(operations)

        return again

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        tensors = tensors_in((args, kwargs))
        self._hold(tensors)
        given = {storage_of(x) for x in tensors}
        found = func(*args, **kwargs)
        outputs = tensors_in(found)
        self._made |= {storage_of(x) for x in outputs} - given
        self._operations.append((func, args, kwargs, outputs))
        return found

    def _hold(self, tensors: Sequence[Tensor]) -> None:
        """Copy what was there before: batch norm changes what its schema does not name."""
        for x in tensors:
            if storage_of(x) not in self._made | set(self._before):
                whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
                self._before[storage_of(x)] = whole, whole.clone()


def storage_of(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def tensors_in(tree: Any) -> list[Tensor]:
    return [x for x in tree_flatten(tree)[0] if isinstance(x, Tensor)]


def play(operations: Sequence[tuple[Any, Any, Any, list[Any]]]) -> None:
    """Do recorded operations again: in what they make this time, and else in the same places."""
    now: dict[int, Tensor] = {}  # by the storage that the recording made: what stands for it

    def current(x: Any) -> Any:
        if not isinstance(x, Tensor) or storage_of(x) not in now:
            return x
        place = now[storage_of(x)].untyped_storage()
        view = torch.empty(0, dtype=x.dtype)
        return view.set_(place, x.storage_offset(), x.shape, x.stride())

    with torch.no_grad():
        for func, args, kwargs, outputs in operations:
            given = {storage_of(x) for x in tensors_in((args, kwargs))}
            found = tensors_in(func(*tree_map(current, args), **tree_map(current, kwargs)))
            for old, new in zip(outputs, found, strict=True):
                if storage_of(old) not in given:
                    now[storage_of(old)] = new
