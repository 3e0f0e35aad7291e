"""Times every layer family against dense, one large product and other libraries: `mixtura bench` from a checkout.

The table is printed, and stored with a plot under benchmarks/results/. `python benchmarks/layers.py --help` has the
options.
"""

import sys
from pathlib import Path

from mixtura.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench", "--out", str(Path(__file__).parent / "results")]
    main()
