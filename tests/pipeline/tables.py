"""Random schedules, and judges of them that share nothing with the ones they judge."""

import itertools
import random
from collections import Counter
from graphlib import CycleError, TopologicalSorter

from shardtrain.pipeline import Action, Schedule


def links(actions, stages):
    """Pairs (first, later) that the network itself demands, for any set of actions."""
    there = set(actions)
    pairs = []
    for s in range(stages):
        for i in {a.microbatch for a in there}:
            backs = [Action(s, kind, i) for kind in "BI"]
            pairs += [(Action(s, "F", i), Action(s + 1, "F", i))]
            pairs += [(Action(s, "F", i), back) for back in backs]
            pairs += [(Action(s + 1, kind, i), back) for kind in "BI" for back in backs]
            pairs += [(Action(s, "I", i), Action(s, "W", i))]
    return [(a, b) for a, b in pairs if a in there and b in there]


def legal(seed, split=None, placed=None):
    """A random placement, and a random order in which everything could be done one at a time.

    With `placed`, the ranks of the stages and the number of microbatches, only the order is random.
    """
    draw = random.Random(seed)
    ranks, chunks, microbatches = draw.randint(1, 4), draw.choice([1, 1, 2, 3]), draw.randint(1, 4)
    ranks_of = [*range(ranks), *(draw.randrange(ranks) for _ in range((chunks - 1) * ranks))]
    draw.shuffle(ranks_of)
    if placed:
        ranks_of, microbatches = placed
        ranks = max(ranks_of) + 1
    halves = draw.choice(["B", "IW", "both"]) if split is None else split
    actions = []
    for s in range(len(ranks_of)):
        for i in range(microbatches):
            back = draw.choice(["B", "IW"]) if halves == "both" else halves
            actions += [Action(s, kind, i) for kind in "F" + back]
    graph = TopologicalSorter({a: () for a in actions})
    for first, later in links(actions, len(ranks_of)):
        graph.add(later, first)
    graph.prepare()
    orders = [[] for _ in range(ranks)]
    ready = []
    while graph.is_active():
        ready += sorted(graph.get_ready())
        action = ready.pop(draw.randrange(len(ready)))
        orders[ranks_of[action.stage]].append(action)
        graph.done(action)
    return table(ranks_of, microbatches, orders)


def table(ranks_of, microbatches, orders):
    return Schedule("random", tuple(ranks_of), microbatches, tuple(map(tuple, orders)))


def mutated(seed):
    """A legal table with one thing changed, and the actions that the change is about."""
    draw = random.Random(seed)
    old = legal(seed)
    orders = [list(order) for order in old.orders]
    rank = draw.randrange(old.ranks)
    at = draw.randrange(len(orders[rank]))
    action = orders[rank][at]
    change = draw.choice(["drop", "duplicate", "swap", "move", "stage", "microbatch", "kind", "stray"])
    about = {action}
    if change == "drop":
        del orders[rank][at]
    elif change == "duplicate":
        orders[rank].insert(draw.randint(0, len(orders[rank])), action)
    elif change == "swap":
        other = draw.randrange(len(orders[rank]))
        about.add(orders[rank][other])
        orders[rank][at], orders[rank][other] = orders[rank][other], action
    elif change == "move":
        del orders[rank][at]
        target = draw.randrange(old.ranks)
        orders[target].insert(draw.randint(0, len(orders[target])), action)
    else:
        field = "microbatch" if change == "stray" else change
        value = draw.choice("FBIWX") if field == "kind" else getattr(action, field) + draw.choice([-1, 1])
        if change == "stray":
            field, value = draw.choice([("stage", -1), ("stage", old.stages), ("microbatch", -1)]
                                       + [("microbatch", old.microbatches)] + [("kind", k) for k in "BIWX"])  # fmt: skip
        new = action._replace(**{field: value})
        about.add(new)
        if field == "kind":  # its other half, too
            about |= {action._replace(kind=kind) for kind in "FBIW"}
        if change == "stray":
            orders[rank].insert(draw.randint(0, len(orders[rank])), new)
        else:
            orders[rank][at] = new
    return table(old.ranks_of, old.microbatches, orders), about


def shuffled(seed):
    """A table that is right for every rank alone, in an order that may wait for itself."""
    draw = random.Random(seed)
    old = legal(seed)
    orders = []
    for order in old.orders:
        order = list(order)
        for _ in range(draw.randint(0, 2)):
            at, to = sorted(draw.randrange(len(order)) for _ in range(2))
            action = order[to]
            mine = [
                k for k, a in enumerate(order) if (a.stage, a.microbatch) == (action.stage, action.microbatch)
            ]
            at = max([at, *(k + 1 for k in mine if k < to)])
            order.insert(at, order.pop(to))
        orders.append(order)
    return table(old.ranks_of, old.microbatches, orders)


def complete(schedule):
    """Whether everything is there once, and on its rank."""
    expected = Counter()
    there = Counter((rank, a) for rank, order in enumerate(schedule.orders) for a in order)
    for s, rank in enumerate(schedule.ranks_of):
        for i in range(schedule.microbatches):
            whole = (rank, Action(s, "B", i)) in there
            expected.update((rank, Action(s, kind, i)) for kind in ("FB" if whole else "FIW"))
    return there == expected


def cyclic(schedule):
    """Whether the orders of the ranks and the demands of the network contradict each other."""
    graph = TopologicalSorter()
    for first, later in links([a for order in schedule.orders for a in order], schedule.stages):
        graph.add(later, first)
    for order in schedule.orders:
        for first, later in itertools.pairwise(order):
            graph.add(later, first)
    try:
        graph.prepare()
    except CycleError:
        return True
    return False


def stuck(schedule, seed=0):
    """What is left when any rank whose next action can run runs it, in random turns, until none can."""
    draw = random.Random(seed)
    before = {}
    for first, later in links([a for order in schedule.orders for a in order], schedule.stages):
        before.setdefault(later, set()).add(first)
    left = [list(order) for order in schedule.orders]
    done = set()
    while able := [order for order in left if order and before.get(order[0], set()) <= done]:
        done.add(draw.choice(able).pop(0))
    return {a for order in left for a in order}
