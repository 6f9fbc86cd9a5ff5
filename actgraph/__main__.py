"""``python -m actgraph`` is ``actgraph``."""

from actgraph.cli import main

if __name__ == "__main__":
    main()
