"The list of mutants applies to the current code; `mutate.py` checks that tests detect them"
from collections import Counter

import mutate
import pytest

MUTANTS = mutate.mutants()


@pytest.mark.parametrize("module", sorted({m["module"] for m in MUTANTS}))
def test_each_applies(module):
    for m in MUTANTS:
        if m["module"] == module: mutate.changed(m, mutate.ROOT)


def test_the_list_is_what_it_should_be():
    rooms = {f"{room}.{p.stem}" for room in mutate.ROOMS for p in (mutate.ROOT/"basd"/room).glob("[!_]*.py")}
    rooms = (rooms | mutate.ELSEWHERE) - mutate.UNTOUCHED
    assert {m["module"] for m in MUTANTS} == rooms, "a module without mutants, or the other way round"
    assert not [x for x, n in Counter((m["module"], m["old"], m["new"]) for m in MUTANTS).items() if n > 1]
    assert all(m["why"] for m in MUTANTS) and len(MUTANTS) >= 120
    assert all(mutate.page(m["module"]) in mutate.concerned(m)[:2] for m in MUTANTS)
