"""Python imports this at its start, wherever this folder is on PYTHONPATH."""

from tests.fake_gpu import device

device.install()
