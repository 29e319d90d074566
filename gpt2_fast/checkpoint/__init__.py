"""What a checkpoint on disk means. `load` opens any of them; state dicts are named as GPT2LMHeadModel's.

formats     which format a file has, and `load`
hf          Hugging Face folders and hub repositories: config.json and model.safetensors
training    training.safetensors, from which a run resumes to the bit
run_folder  the checkpoints in a run's folder
sealed      safetensors files that know their own SHA-256
plain       state of plain values and tensors as JSON
nanogpt     nanoGPT's ckpt.pt
llmc        llm.c's .bin
convert     from one format to another
state_dict  names and shapes of the tensors of a GPT-2
torch_file  torch.load with no code run
"""

from __future__ import annotations

from gpt2_fast.lazy import exports

_NAMES = {
    "formats": ("Loaded", "load", "source_format"),
    "hf": ("load_pretrained", "save_pretrained"),
    "training": (
        "TrainingState",
        "capture_rng",
        "load_training_state",
        "restore_rng",
        "save_training_state",
    ),
    "nanogpt": ("read_nanogpt", "write_nanogpt"),
    "llmc": ("read_llmc", "write_llmc"),
    "state_dict": ("EMBEDDING", "HEAD", "canonical_state_dict", "expected_shapes"),
}
__getattr__, __dir__, __all__ = exports(__name__, _NAMES)
