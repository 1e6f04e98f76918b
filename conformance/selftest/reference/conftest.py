"""One thread per test process: several run at a time, and threads of one would spin against those of another."""

import torch

torch.set_num_threads(1)
