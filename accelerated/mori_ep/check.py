"""Run as a module: import MoRI and print the architecture it detects. A process of its own, for what a bad build does.

A library that imports is not proven to work: no kernel is compiled or launched.
"""

from __future__ import annotations

from accelerated.mori_ep.library import LibraryError, load_mori


def main() -> None:
    """Import the library and ask it for the device's architecture; whatever it raises ends the process."""
    try:
        library = load_mori()
    except LibraryError as error:
        # The library's own traceback says where; what to do about it is the caller's to say.
        raise (error.__cause__ or error) from None
    print(library.detect_gpu_arch())


if __name__ == "__main__":
    main()
