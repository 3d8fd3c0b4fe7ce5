"""Megatron on the host, by being imported: what the fork server of forks.py starts with."""

from tests.helpers.pool import megatron_on_host

megatron_on_host()
