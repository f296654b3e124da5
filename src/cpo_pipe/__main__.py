"""`python -m cpo_pipe`, which is also what `accelerate launch -m cpo_pipe train …` starts in each process."""

import sys

from cpo_pipe.cli import main

sys.exit(main())
