"""Python imports this at its start, wherever this folder is on PYTHONPATH."""

import sys
from importlib import util

# These start others, or clean up after them: the import would be a third of a short run's time.
BYSTANDERS = ("multiprocessing.resource_tracker", "torch.distributed.run")

bystander = any(name in word for name in BYSTANDERS for word in sys.orig_argv)
if util.find_spec("torch") and not bystander:  # another Python may be started from within
    from tests.fake_gpu import device

    device.install()
