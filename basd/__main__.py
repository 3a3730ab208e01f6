"`python -m basd` and `torchrun -m basd` are the `basd` command."
import sys

from basd.training.cli import main

sys.exit(main())
