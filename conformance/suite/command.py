"""What runs in the place of a run (``--capabilities``, ``--hazards``): one console, and exit codes that mean the same.

Python's own exit code after an exception is 1, which would say that the product failed; here it is the suite's failure.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable

import pytest
from rich.console import Console

from conformance.verdicts import ExitCode

#: Columns of a report that is written to a file.
_FILE_WIDTH = 160


def answered(answer: Callable[[Console], ExitCode]) -> int:
    """Exit code of a command that writes to the console it is given.

    Raises:
        pytest.UsageError: the options ask for what this machine does not have; pytest tells it.
    """
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    try:
        return answer(console).value
    except pytest.UsageError:
        raise
    except pytest.exit.Exception as error:
        console.print(error.msg, markup=False)
        return int(error.returncode or ExitCode.INFRASTRUCTURE)
    except Exception:  # noqa: BLE001  whatever failed, it is not the product
        console.print(f"INFRA: the suite failed, the report is not complete: {traceback.format_exc()}", markup=False)
        return ExitCode.INFRASTRUCTURE.value
