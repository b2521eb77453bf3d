"""What holds for the whole suite: no network, one thread per process."""

import os

# Constants of huggingface_hub are read when it is imported. Tests of the Hub run clients in their own processes.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import torch

torch.set_num_threads(1)
