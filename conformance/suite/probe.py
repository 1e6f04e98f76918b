"""Run as a module: print the visible GPUs as one line of JSON. A process of its own, because it opens the devices."""

from __future__ import annotations

import json
import sys


def gfx_arch(properties: object) -> str:
    """The gfx architecture of a device, without its features; empty on one that is not AMD's."""
    # A CUDA build of torch puts the card's name here.
    name = str(getattr(properties, "gcnArchName", "")).partition(":")[0]
    return name if name.startswith("gfx") else ""


def main() -> int:
    """List devices by position in the caller's visible list."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, _ = torch.cuda.mem_get_info(index)
        found.append(
            {
                "uuid": str(getattr(properties, "uuid", index)),
                "name": properties.name,
                "arch": gfx_arch(properties),
                "free_bytes": free,
            }
        )
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
