"""The base of the API's typed structs, and what the API answers instead of an object when something is wrong.

Pure: types for msgspec's decoder.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

Int32 = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""Go's int32 and int64; what is beyond could not go on the wire either."""


class ApiStruct(msgspec.Struct, rename="camel", gc=False):
    """Base: camelCase names; no reference cycles can arise, so the collector need not look."""


class StatusCause(ApiStruct):
    """One of the reasons."""

    reason: str | None = None


class StatusDetails(ApiStruct):
    """What a program can act on."""

    causes: list[StatusCause] | None = None
    retry_after_seconds: Int32 | None = None


class Status(ApiStruct):
    """``metav1.Status``: what the API answers instead of an object when something is wrong."""

    kind: str
    code: Int32 | None = None
    reason: str | None = None
    message: str | None = None
    details: StatusDetails | None = None
