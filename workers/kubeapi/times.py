"""Times as the API writes them.

Pure: numbers in, text out.
"""

from __future__ import annotations

import datetime


def rfc3339(seconds: float) -> str:
    """Unix seconds as ``metav1.Time``."""
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def micro_time(seconds: float) -> str:
    """Unix seconds as ``metav1.MicroTime``."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
