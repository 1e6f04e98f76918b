"""Run as a module: print the visible GPUs as one line of JSON. A process of its own, because it opens the devices."""

from __future__ import annotations

import json
import sys


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
                "arch": str(getattr(properties, "gcnArchName", "")).partition(":")[0],
                "free_bytes": free,
            }
        )
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
