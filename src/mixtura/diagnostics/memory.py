"""How much memory a training step takes, measured.

`live_bytes` counts what stays from step to step, `measure_peak_memory` what one step allocates in addition at its peak;
a machine needs the sum of both. Both are measured the same way for every arm of a comparison.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def measure_peak_memory(step: Callable[[], None], *, device: torch.device | str = "cpu") -> int:
    """Runs `step` once and returns the most bytes of tensors that it had allocated, and not yet freed, at any moment.

    Tensors that existed before do not count: neither as allocated nor, if the step frees them, as freed. Run the step
    once before, so that the optimizer has its state, and call `zero_grad` where the training loop does.

    On a GPU the allocator counts. On the CPU every tensor that an operator returns is followed until its storage dies,
    in the backward pass and in custom autograd functions too; scratch space inside a single operator (a blocked
    softmax, oneDNN's packing) is not seen. The measurement slows the step down: do not time it.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _StorageLedger() as ledger:
        step()
    return ledger.peak_bytes


def live_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of parameters, buffers, gradients and optimizer state; shared storage counts once, shards are our own."""
    tensors = _tensors([*model.parameters(), *model.buffers()])
    tensors += _tensors([p.grad for p in model.parameters() if p.grad is not None])
    if optimizer is not None:
        tensors += _tensors(list(optimizer.state.values()))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class _StorageLedger(TorchDispatchMode):
    """Adds up the bytes of all storages that operators create while the mode is on, until each is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._live_bytes = 0
        # Address of a storage -> a weak reference whose callback runs when it is freed, and the bytes counted for it.
        self._storages: dict[int, weakref.ref] = {}
        self._booked: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operator and books what it returned."""
        kwargs = kwargs or {}
        # A storage that is first seen as an input existed before the step: it is remembered, but not counted.
        for tensor in _tensors((args, kwargs)):
            self._follow(tensor.untyped_storage())
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            # Counted ones are counted again, since an operator with out= may have resized them.
            if self._follow(storage) or storage._cdata in self._booked:
                self._book(storage)
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> bool:
        """Whether the storage is new; if so, a callback is set for when it is freed."""
        key = storage._cdata
        if key in self._storages:
            return False
        self._storages[key] = weakref.ref(storage, lambda _: self._strike(key))
        return True

    def _book(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._live_bytes += size - self._booked.get(key, 0)
        self._booked[key] = size

    def _strike(self, key: int) -> None:
        del self._storages[key]
        self._live_bytes -= self._booked.pop(key, 0)


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested containers that have one storage of their own, which sparse ones lack.

    A tensor made of others, such as 8-bit codes and their scales, stands for these.
    """
    found: list[Tensor] = []
    for leaf in tree_iter(tree):
        if isinstance(leaf, Tensor) and hasattr(leaf, "__tensor_flatten__"):
            parts, _ = leaf.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
            found += _tensors([getattr(leaf, part) for part in parts])
        elif isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            found.append(leaf)
    return found
