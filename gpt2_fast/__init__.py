"""GPT-2, exact to Hugging Face's, through fused kernels."""
