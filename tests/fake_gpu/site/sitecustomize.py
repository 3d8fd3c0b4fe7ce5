"""Python imports this at its start, wherever this folder is on PYTHONPATH.

The GPU appears when torch has been imported, so not in processes that only start others or clean up
after them; and not in the one that a run spawns to hear from the writers of its checkpoints.
"""

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

PATH = os.environ["PYTHONPATH"].split(os.pathsep)
LAUNCHER, RUN = "torch.distributed.run", "moa_megatron.pretrain"


class _WithTorch(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spawned = getattr(sys.modules.get("__mp_main__"), "__spec__", None)
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None or getattr(spawned, "name", None) == RUN:
            return spec
        run = spec.loader.exec_module

        def run_and_install(module: ModuleType) -> None:
            run(module)
            # multiprocessing gives a spawned process the path of its parent.
            sys.path[:0] = [entry for entry in PATH if entry not in sys.path]
            from tests.fake_gpu import device

            device.install()

        spec.loader.exec_module = run_and_install  # type: ignore[method-assign]
        return spec


if LAUNCHER not in sys.orig_argv:
    sys.meta_path.insert(0, _WithTorch())
