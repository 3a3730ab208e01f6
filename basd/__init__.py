__version__ = "0.1.0"

import os

# Threads that wait for each other spin by default, for milliseconds (GNU's OpenMP) or a fifth of a second (Intel's). On a
# machine that others use, the thread that they wait for is not running meanwhile. So they spin briefly, then sleep;
# page 08 says what it is worth. It counts only where torch has not been imported yet, and never against the user's words.
if not {'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME'} & os.environ.keys():
    os.environ |= dict(GOMP_SPINCOUNT='10000', KMP_BLOCKTIME='1')
