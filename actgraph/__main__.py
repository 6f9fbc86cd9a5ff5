"""``python -m actgraph`` is ``actgraph``."""

import sys

from actgraph.cli import main

if __name__ == "__main__":
    sys.exit(main())
