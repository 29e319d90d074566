"""GPT-2, exact to Hugging Face's, through fused kernels."""

from pathlib import Path

import torch  # noqa: F401  (first: the extension then shares torch's OpenMP runtime)

# In a source tree the Triton kernels lie beside this folder, in kernels/.
if not (Path(__file__).parent / "kernels").exists():
    __path__.append(str(Path(__file__).parent.parent))
