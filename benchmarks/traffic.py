"""The bytes that the kernels were counted to move."""


def counted(op: str, backend: str) -> float | None:
    return None
