"""How the demo's scripts begin and end; to be imported before the package."""

import logging
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Callable, Optional

logging.disable(logging.INFO)  # fairseq's and matplotlib's notes when they are imported


def run(main: Callable[[], None], hint: str = "; run it again to continue") -> None:
    """Run a script; what the user can mend ends it with one line, and so does Ctrl-C.

    Args:
        main: the script.
        hint: what to say of an interrupted one.
    """
    name = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"{name}: {error}") from None
    except KeyboardInterrupt:
        print(f"{name}: interrupted{hint}", file=sys.stderr)
        raise SystemExit(130) from None


def _interrupt(signum: int, frame: Optional[FrameType]) -> None:
    raise KeyboardInterrupt
