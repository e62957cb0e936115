"""One thread for all arithmetic, as in the benchmark's own processes: tiny networks gain nothing from more, and beside any other
work as many threads as cores are several times slower than one."""

import torch

torch.set_num_threads(1)
