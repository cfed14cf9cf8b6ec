"""A training step as one CUDA graph, for networks whose kernels take less time than launching them."""

from collections.abc import Callable

import torch
from torch import Tensor

from pipelines.runtime.progress import warn

# Eager steps before the capture: they compile and tune kernels and create the optimizer's state.
WARM_UP_STEPS = 3


class CudaGraphStep:
    """A function of tensors of fixed shapes, with side effects on other tensors such as parameters.

    The first calls run it eagerly; then it is captured, and replayed from then on. Python numbers that it uses keep the
    values they had at the capture: values that change between steps must be tensors on the device. Random numbers of
    the global generator are drawn again in each replay, from the seed and offset that it has when the replay begins.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self.function = function
        self.calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: tuple[Tensor, ...] = ()
        self._refused = False

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The function's outputs; the next call does not overwrite them."""
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
        # Autograd runs on the streams of the forward pass, and the default stream can't be captured.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return outputs

    def _record(self, inputs: tuple[Tensor, ...]) -> bool:
        """Capture the function without running it; False and a warning if CUDA refuses."""
        self._inputs = tuple(given.clone() for given in inputs)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._outputs = self.function(*self._inputs)
        except RuntimeError as error:
            self._refused = True
            self._inputs = ()
            warn(f"CUDA graphs: the step can't be captured ({error}); running it eagerly")
            return False
        self._graph = graph
        return True
