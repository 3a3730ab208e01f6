"Knowledge distillation for vision models: `create_task` for a loop of your own, `train` and `compare` for recipes"
__version__ = "0.1.0"

import importlib
import os

try: import basd_distill        # a module that this distribution alone has
except ModuleNotFoundError: basd_distill = None     # this folder was copied without it
else: basd_distill.refuse(__file__)

# Threads that wait for each other spin by default, for milliseconds (GNU's OpenMP) or a fifth of a second (Intel's). On a
# machine that others use, the thread that they wait for is not running meanwhile. So they spin briefly, then sleep;
# page 08 says what it is worth. It counts only where torch has not been imported yet, and never against the user's words.
if not {'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME'} & os.environ.keys():
    os.environ |= dict(GOMP_SPINCOUNT='10000', KMP_BLOCKTIME='1')

# What torch has not written for Apple's GPUs runs on the CPU, with a warning in place of an error
os.environ.setdefault('PYTORCH_ENABLE_MPS_FALLBACK', '1')

# public name → where it is defined; imported when it is first used, as torch takes over a second
_public = {
    'create_teacher': 'models.teachers:create_teacher',
    'create_student': 'models.students:create_student',
    'create_task': 'training.task:create_task',
    'tap': 'models.taps:tap',
    'TappedModel': 'models.taps:TappedModel',
    'METHODS': 'core.registry:METHODS',
    'LOSSES': 'core.registry:LOSSES',
    'train': 'cli:train',
    'resume': 'cli:resume',
    'evaluate': 'analysis.reports:evaluate_student',
    'export': 'runs.export:export_run',
    'compare': 'benchmark.compare:compare',
    'load_recipe': 'runs.recipes:load_recipe',
    'Recipe': 'runs.recipes:Recipe',
}
__all__ = list(_public)


def __getattr__(name):
    "A public name, from the module that defines it (PEP 562)"
    if name in _public:
        module, _, attribute = _public[name].partition(':')
        globals()[name] = found = getattr(importlib.import_module(f'basd.{module}'), attribute)
        return found
    if name == 'main' and basd_distill: return basd_distill.other_command       # what that project's command calls
    from difflib import get_close_matches
    near = get_close_matches(name, _public, 1)
    raise AttributeError(f"module 'basd' has no attribute {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")


def __dir__(): return sorted({*globals(), *_public})
