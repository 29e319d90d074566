"""A GPT-2 as a GGUF file, which llama.cpp loads: tensor names and fields as its own converter writes them."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor

from gpt2_fast.config import GPT2Config

TYPES = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16,
         "q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}  # fmt: skip
FILE_TYPES = {"float32": gguf.LlamaFileType.ALL_F32, "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
              "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0}  # fmt: skip
LAYER = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


def rounded(matrix: np.ndarray, kind: str) -> np.ndarray:
    """The matrix [N, K] that its blocks of 32 inputs in `kind` mean, float32."""
    return gguf.quants.dequantize(gguf.quants.quantize(matrix, TYPES[kind]), TYPES[kind])


def _renamed(name: str) -> str:
    name = name.removeprefix("transformer.")
    if name.startswith("h."):
        _, layer, rest = name.split(".", 2)
        module, _, kind = rest.rpartition(".")
        return f"blk.{layer}.{LAYER[module]}.{kind}"
    module, _, kind = name.rpartition(".")
    return {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}[module] + "." + kind


def write(path: Path, config: GPT2Config, state: dict[str, Tensor], tokenizer_folder: Path, kind: str) -> None:
    """Matrices in `kind`; LayerNorms, biases and positions in float32, as llama.cpp's own quantizer leaves them."""
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner_)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(FILE_TYPES[kind])
    _add_vocabulary(writer, tokenizer_folder)
    for name, tensor in state.items():
        if name == "lm_head.weight":  # tied: llama.cpp takes token_embd
            continue
        array = tensor.detach().float().numpy()
        is_matrix = array.ndim == 2 and "wpe" not in name
        if is_matrix and "wte" not in name:
            array = np.ascontiguousarray(array.T)
        to = TYPES[kind] if is_matrix else TYPES["float32"]
        if kind == "float32" or not is_matrix:
            writer.add_tensor(_renamed(name), array)
        else:
            writer.add_tensor(_renamed(name), gguf.quants.quantize(array, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, folder: Path) -> None:
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges([line for line in merges if line and not line.startswith("#")])
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
