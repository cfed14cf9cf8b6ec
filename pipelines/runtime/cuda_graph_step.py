"""A training step as one recorded CUDA graph: for networks so small that launching kernels takes longer than they."""

from collections.abc import Callable

import torch
from torch import Tensor

from pipelines.runtime.progress import warn

# Steps that are made as usual first: in them kernels are compiled and tuned, and the optimizer makes its state.
WARM_UP_STEPS = 3


class CudaGraphStep:
    """A function of tensors of fixed shapes that changes what it is made of, such as parameters.

    The first calls run it as it is; then it is recorded, and from then on replayed. Numbers of Python's that it uses
    stay as they were when it was recorded: whatever changes from step to step must be a tensor on the device. Random
    numbers of the global generator are drawn anew, from the seed and the offset that it has when a replay begins.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self.function = function
        self.calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: tuple[Tensor, ...] = ()
        self._refused = False

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The function's outputs, which the next call leaves alone."""
        self.calls += 1
        if self._refused:
            return self.function(*inputs)
        if self.calls <= WARM_UP_STEPS:
            return self._on_another_stream(inputs)
        if self._graph is None and not self._record(inputs):
            return self.function(*inputs)
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given)
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)

    def _on_another_stream(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Autograd remembers the stream of what it has seen; the default one can't be recorded.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return outputs

    def _record(self, inputs: tuple[Tensor, ...]) -> bool:
        """Record the function, which doesn't run it; False, and a warning, where CUDA refuses."""
        self._inputs = tuple(given.clone() for given in inputs)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._outputs = self.function(*self._inputs)
        except RuntimeError as error:
            self._refused = True
            self._inputs = ()
            warn(f"CUDA graphs: the step can't be recorded ({error}); it goes on launch by launch")
            return False
        self._graph = graph
        return True
