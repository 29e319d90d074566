"""What logits that are computed after a forward pass depend on, and whether it is still as it was."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

SAMPLED = 256  # rows of a head, at most


def version_of(tensor: Tensor) -> int | None:
    """How often it was changed in place; None of an inference tensor, which counts nothing, and in torch.compile."""
    if torch.compiler.is_compiling() or not isinstance(tensor, Tensor) or tensor.is_inference():
        return None  # no tensor: what somebody's tree_map left in its place
    return tensor._version


def has_changed(tensor: Tensor, version: int | None) -> bool:
    """Whether it was changed in place since `version_of` said `version`; an inference tensor's changes are not seen."""
    return version is not None and tensor._version != version


def hidden_changed(whose: str) -> RuntimeError:
    """The error, one line that begins with `whose`, for hidden states that logits can no longer be computed from."""
    return RuntimeError(
        f"{whose}: the hidden states have changed since this output was computed, in place; read .logits before that, "
        "or call the model again"
    )


def _sample(weight: Tensor) -> Tensor | None:
    """A number each of rows of weight [V, C], evenly apart, the last among them: a copy where the weight is.

    Two views and a copy, as every training step makes one: `generate.decoders` looks closer at what it packs. None
    where no numbers are at hand: in an export, of meta and fake tensors, within torch.func's transforms and where a
    mode sees each operator (make_fx), and while a CUDA graph is captured, which a later look would have to wait for.
    """
    if torch.compiler.is_exporting() or weight.is_meta or weight.numel() == 0:
        return None
    if not torch.compiler.is_compiling():
        if type(weight) not in (Tensor, nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(weight):
            return None
        if torch._C._len_torch_dispatch_stack():
            return None
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
    V, C = weight.shape
    step = -(-V // min(V, C, SAMPLED))
    return weight.detach()[(V - 1) % step :: step].diagonal().clone(memory_format=torch.contiguous_format)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two vectors hold the same bits: a NaN is itself."""
    return (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


class Seen:
    """The weight of a head in one forward pass, which logits that are computed later must find as it was.

    It is known by its version counter and its address, and by a sample of its numbers: a write through `.data` or a raw
    pointer moves no counter, and in torch.compile there is none. Such a write of single rows may not be seen.

    sharded: whether `fully_shard` manages it. It then puts other values into the same memory in every pass, which no
    version counter shows, so the passes of the head are counted.
    """

    def __init__(self, head: nn.Module, sharded: bool = False):
        compiling = torch.compiler.is_compiling()
        self.head, self.weight = head, head.weight
        self.version = version_of(self.weight)
        self.grad = None if compiling else (torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        # A sharded weight lies elsewhere in every pass, and is found by its count.
        self.place = None if compiling or sharded else self._place()
        self.sample, self.sharded = None, sharded
        self.call = None
        if sharded and not compiling:
            self.call = head.__dict__["_passes"] = head.__dict__.get("_passes", 0) + 1

    def _place(self) -> tuple | None:
        """Where the weight lies; None of one that has no memory, as within torch.func's transforms."""
        try:
            return self.weight.shape, self.weight.dtype, self.weight.device, self.weight.data_ptr()
        except RuntimeError:
            return None

    def sampled(self) -> Seen:
        """This, for logits that are computed after the call: those within it need no look, and a GPU no wait."""
        self.sample = None if self.sharded else _sample(self.weight)
        return self

    def _has_moved(self) -> bool:
        known = self.place is not None and not torch.compiler.is_compiling()
        return known and self._place() not in (None, self.place)

    def _has_other_numbers(self) -> bool:
        """Waits for a GPU, as logits are read once."""
        if self.sample is None or torch.compiler.is_compiling():
            return False
        now = _sample(self.weight)
        return now is not None and not _same_bits(now, self.sample)

    def mode(self) -> contextlib.ExitStack:
        """Within it gradients are on or off as they were in the forward pass, wherever the logits are asked for."""
        modes = contextlib.ExitStack()
        if self.grad is not None and not torch.compiler.is_compiling():
            inference, grad = self.grad
            if inference != torch.is_inference_mode_enabled():
                modes.enter_context(torch.inference_mode(inference))
            if grad != torch.is_grad_enabled():
                modes.enter_context(torch.set_grad_enabled(grad))
        return modes

    def check(self, whose: str) -> None:
        """Raises RuntimeError, one line that begins with `whose`, where the weight is another one now."""
        if hasattr(self.head.weight, "device_mesh") and not hasattr(self.weight, "device_mesh"):
            raise RuntimeError(
                f"{whose}: the head is sharded again since this output was computed; read .logits before backward with "
                "reshard_after_forward=False, or under torch.no_grad(), or call the model without labels"
            )
        if self._has_moved() or has_changed(self.weight, self.version) or self._has_other_numbers():
            raise RuntimeError(
                f"{whose}: the head has changed since this output was computed, by an optimizer step perhaps; read "
                ".logits before the step, or call the model again"
            )
        if self.call is not None and self.head.__dict__["_passes"] != self.call:
            raise RuntimeError(
                f"{whose}: the sharded model was called again since this output was computed; read .logits before that"
            )
