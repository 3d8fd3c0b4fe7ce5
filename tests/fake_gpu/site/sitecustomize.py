"""Python imports this at its start, wherever this folder is on PYTHONPATH."""

from importlib import util

if util.find_spec("torch"):  # another Python may be started from within the environment
    from tests.fake_gpu import device

    device.install()
