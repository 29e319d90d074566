"""What all operations share: which implementation runs, dropout keys and masks, memory, CUDA launches."""
