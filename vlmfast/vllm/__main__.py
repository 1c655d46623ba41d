"""``python -m vlmfast.vllm METHOD MODEL``: the arguments with which vLLM's server serves a reduced model."""

from __future__ import annotations

import sys

from vlmfast.vllm.naming import server_arguments


def main() -> int:
    """Print them for a shell, without spaces within one."""
    if len(sys.argv) != 3:
        print(
            "usage: python -m vlmfast.vllm METHOD MODEL, such as visionzip:54+10 llava-hf/llava-1.5-7b-hf",
            file=sys.stderr,
        )
        return 2
    try:
        print(*(argument.replace(" ", "") for argument in server_arguments(*sys.argv[1:])))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
