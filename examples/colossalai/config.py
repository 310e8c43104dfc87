"""Accumulate four micro-batches per update. Upper-case names are the script's own hyper-parameters."""

BATCH_SIZE = 128
NUM_EPOCHS = 200
gradient_accumulation = 4
