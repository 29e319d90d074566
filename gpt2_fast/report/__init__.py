"""What is told about a machine, a model or a run.

doctor         what runs here and why, what `patch` takes over, machine code of the Triton kernels
available      how much memory a process may still take
machine        processor, cards and versions, and what their products can reach
inspect        tensors, parameters, memory and FLOPs of a model; attention patterns
figures        pictures of a run, and how every picture looks and is saved
model_figures  pictures of a model
measures       what a weight is like, in numbers

State of the process: the speed that `machine.measured_peak` has measured, once for each device and dtype.
"""

from __future__ import annotations

from gpt2_fast.lazy import exports

_NAMES = {
    "doctor": ("check_kernels", "explain_patch"),
    "inspect": ("attention_pattern", "flops_per_token", "parameter_counts"),
    "figures": ("loss_figure", "read_metrics", "save_figure", "save_loss_plot"),
    "measures": ("WeightMeasures", "weight_measures"),
    "model_figures": ("attention_figure", "histograms_figure", "positions_figure", "weight_figure"),
}
__getattr__, __dir__, __all__ = exports(__name__, _NAMES)
