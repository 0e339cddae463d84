import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a hub

import torch

torch.set_num_threads(1)  # tests run side by side; results do not depend on the schedule of threads
