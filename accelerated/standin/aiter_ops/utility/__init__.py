"""Double of ``aiter.utility``. A pass against it proves nothing about AITER."""
