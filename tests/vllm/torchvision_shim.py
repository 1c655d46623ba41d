"""Let torchvision of PyPI, a CUDA build, be imported beside torch +cpu, where its C++ ops cannot be loaded.

It registers fakes of two ops, which must exist; its transforms are Python. `make test-vllm` and `make
test-lmms-eval` put it into their environments: python torchvision_shim.py install.
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any


class Declaring(importlib.abc.MetaPathFinder):
    """Declare the ops when torchvision is first imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if not torch.version.cuda:
            self.library = torch.library.Library("torchvision", "FRAGMENT")
            sys.modules[__name__].kept = self.library  # type: ignore[attr-defined]  # ops live as long as it does
            for op in ("nms", "qnms"):
                self.library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


if __name__ == "__main__" and sys.argv[1:] == ["install"]:
    import shutil
    import sysconfig
    from pathlib import Path

    packages = Path(sysconfig.get_path("purelib"))
    shutil.copy(__file__, packages / "torchvision_shim.py")
    (packages / "torchvision_shim.pth").write_text("import torchvision_shim\n")
elif __name__ != "__main__":
    sys.meta_path.insert(0, Declaring())
