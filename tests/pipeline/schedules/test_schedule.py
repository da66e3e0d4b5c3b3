"""Schedules as data: files, checks, and the classical ones."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardtrain import UserError
from shardtrain.pipeline import NAMES, Action, Schedule, forward_only, make, validate
from shardtrain.pipeline.schedules import actions, schedule

from .. import tables

seeds = st.integers(0, 2**32)
many = settings(max_examples=2000, deadline=None)


def refused(one):
    try:
        validate(one)
    except UserError as error:
        return str(error)
    return ""


# --- random tables ----------------------------------------------------------------------------------------


def legal_is_accepted(seed):
    one = tables.legal(seed)
    assert tables.complete(one)
    assert not tables.stuck(one, seed)
    assert not refused(one)
    assert Schedule.from_csv(one.to_csv(), one.name) == one
    assert not refused(one.with_split() if seed % 2 else one.with_fused())


def illegal_is_refused(seed):
    one, about = tables.mutated(seed)
    message = refused(one)
    if tables.complete(one):
        deadlock_is_seen(one, message, seed)
    else:
        assert any(re.search(rf"(?<![0-9-]){re.escape(str(a))}(?![0-9])", message) for a in about), message
        assert re.search(r"rank \d", message)


def deadlock_is_seen(one, message, seed):
    left = tables.stuck(one, seed)
    assert bool(left) == tables.cyclic(one) == bool(message)
    named = [Action.parse(cell) for cell in re.findall(r"\b\d+[FBIW]\d+\b", message)]
    assert left.issuperset(named)
    assert bool(named) == bool(left)


def deadlock_of_shuffled_is_seen(seed):
    one = tables.shuffled(seed)
    assert tables.complete(one)
    deadlock_is_seen(one, refused(one), seed)


@many
@given(seeds)
def test_every_legal_table_is_accepted(seed):
    legal_is_accepted(seed)


@many
@given(seeds)
def test_every_illegal_table_is_refused_by_name(seed):
    illegal_is_refused(seed)


@many
@given(seeds)
def test_a_brute_force_executor_agrees_about_deadlock(seed):
    deadlock_of_shuffled_is_seen(seed)


def test_random_tables_are_of_all_sorts():
    few = [tables.mutated(seed)[0] for seed in range(400)]
    bad = [not tables.complete(one) for one in few]
    assert 200 < sum(bad) < 380
    waiting = [bool(tables.stuck(tables.shuffled(seed))) for seed in range(400)]
    assert 100 < sum(waiting) < 300


def test_advice_about_a_deadlock_is_about_two_actions_of_one_rank():
    for seed in range(300):
        one = tables.shuffled(seed)
        if found := re.search(r"put (\w+) before (\w+) on rank (\d+)$", refused(one)):
            order = one.orders[int(found[3])]
            assert order.index(Action.parse(found[1])) > order.index(Action.parse(found[2]))


# --- validators that ignore a rule ------------------------------------------------------------------------


def ignoring(phrase):
    right = schedule._misplaced

    def misplaced(*args):
        problem = right(*args)
        return "" if phrase in problem else problem

    return {"schedule._misplaced": misplaced}


def without(kind, other):
    right = actions.needs
    return {
        "actions.needs": lambda action, stages: [
            need
            for need in right(action, stages)
            if not (action.kind == kind and need.kind == other and need.stage != action.stage)
        ]
    }


MUTANTS = {
    "accepts doubles": ignoring(" twice"),
    "accepts any rank": ignoring(" is on rank "),
    "accepts B next to I and W": ignoring("leave out either"),
    "accepts any microbatch": ignoring("only microbatches"),
    "accepts any stage": ignoring("only stages"),
    "accepts any kind": ignoring("only the kinds"),
    "misses nothing": {"schedule._missing": lambda *args: None},
    "forwards wait for nobody": without("F", "F"),
    "backwards wait for nobody": without("I", "I") | without("B", "I"),
    "nobody waits": {"actions.needs": lambda action, stages: []},
    "B does not count as I": {"actions.gives": lambda action: action},
}


def all_agree(seeds):
    for seed in seeds:
        legal_is_accepted(seed)
        illegal_is_refused(seed)
        deadlock_of_shuffled_is_seen(seed)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_validator_that_ignores_a_rule_is_noticed(mutant, monkeypatch):
    for place, wrong in MUTANTS[mutant].items():
        monkeypatch.setattr(f"shardtrain.pipeline.schedules.{place}", wrong)
    with pytest.raises((AssertionError, IndexError, KeyError, StopIteration)):
        all_agree(range(500))


# --- sentences --------------------------------------------------------------------------------------------

BAD = [
    ("", "schedule 'mine' is empty; write a row of actions such as 0F0,0B0 for each rank"),
    ("0F0,0B0\n,,x", "row 2, column 3: 'x' is no action; write stage, one of F B I W, microbatch, such as 2F0"),
    ("0F0,0B0\n\n1F0,0B1", "row 3, column 2: 0B1 belongs to stage 0, which already stands in row 1; keep a stage in one row"),
    ("0F0,0B0\n2F0,2B0", "has a stage 2 (2F0 in row 2, column 1) and no stage 1; number stages from 0"),
    ("0F0,0I0,0B0,0W0", "rank 0 does 0B0 and 0I0; leave out either B, or I and W"),
    ("0F0,0B0,0W0", "rank 0 does 0W0 before 0I0; put 0I0 first"),
    ("0B0,0F0", "rank 0 does 0B0 before 0F0; put 0F0 first"),
    ("0F0,0F0,0B0", "rank 0 does 0F0 twice; leave one out"),
    ("0F0\n1F0,1B0", "0I0 (or 0B0 for both halves) is missing; add it to rank 0"),
    ("0F0,0I0\n1F0,1B0", "0W0 is missing; add it to rank 0"),
    ("0F0,0B0,0F2,0B2", "0F1 is missing; add it to rank 0"),
    ("0F0,0B0,0F999999999,0B999999999", "0F1 is missing; add it to rank 0"),
    ("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1", "deadlocks: rank 0 waits at 0B0 for 1B0 of rank 1, rank 1 waits at 1F1 for 0F1 of rank 0; put 0F1 before 0B0 on rank 0"),
    ("1F0,0F0,1B0,0B0", "deadlocks: rank 0 waits at 1F0 for 0F0 of rank 0; put 0F0 before 1F0 on rank 0"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "sentence"), BAD)
def test_what_is_wrong_with_a_table_is_one_sentence(text, sentence):
    with pytest.raises(UserError, match=re.escape(sentence) + "$"):
        validate(Schedule.from_csv(text, "mine"))


@pytest.mark.parametrize("cell", ["2G0", "F0", "2F", "-1F0", "2f0", "2F0x", "2 F0", "٢F0", "2F" + "1" * 5000])
def test_what_is_no_action_is_refused(cell):
    with pytest.raises(UserError, match="is no action; write stage"):
        Action.parse(cell)


def test_a_schedule_made_by_hand_is_checked_too():
    forward = (Action(0, "F", 0),)
    for bad in [
        Schedule("x", (0, 1), 1, (forward,)),
        Schedule("x", (0, -1), 1, (forward,)),
        Schedule("x", (), 1, ()),
        Schedule("x", (0,), 0, ((),)),
        Schedule("x", (0, 0), 1, (forward, ())),
    ]:
        with pytest.raises(UserError, match=r"; (use 1 or more of each|leave it out)"):
            validate(bad)
    with pytest.raises(UserError, match="rank 0 waits at 1F0 for 0F0, which rank 0 never does; add it there"):
        Schedule("x", (0, 0), 1, ((Action(1, "F", 0),),)).sequence()


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_files_come_back_as_they_were(name, tmp_path):
    one = make(name, 4, 6)
    one.save(tmp_path / name)
    assert Schedule.load(tmp_path / name) == one


def test_a_file_of_a_spreadsheet_is_read(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_bytes('\ufeff0F0, ,0F1,,0B0,0B1,\r\n,"1F0","1B0", "1F1",1B1,,\r\n,,,,,,\r\n'.encode())
    one = make(str(path), ranks=2, microbatches=2)
    assert one.orders == make("1f1b", 2, 2).orders
    assert (one.name, one.ranks_of, one.microbatches) == ("mine.csv", (0, 1), 2)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_other_separators_and_endings_in_capitals_are_read(separator, tmp_path):
    path = tmp_path / "MINE.CSV"
    path.write_text(make("1f1b", 2, 4).to_csv().replace(",", separator) + 3 * separator + "\n")
    assert make(str(path), 2, 4).orders == make("1f1b", 2, 4).orders


def test_what_is_wrong_with_a_file_is_one_sentence(tmp_path):
    path = tmp_path / "mine.csv"
    with pytest.raises(UserError, match=r"cannot be read \(No such file or directory\); name a CSV file"):
        Schedule.load(path)
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\); name a CSV file"):
        Schedule.load(tmp_path)
    with pytest.raises(UserError, match=r"cannot be written \(No such file or directory\); name one"):
        make("1f1b", 2, 2).save(tmp_path / "no" / "mine.csv")
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="is no text; name a CSV file"):
        Schedule.load(path)
    make("zb-v", 2, 4).save(path)
    with pytest.raises(
        UserError, match="is for 2 ranks, 4 microbatches and 2 chunks on a rank, not for 4 ranks and 4 mic"
    ):
        make(str(path), 4, 4)
    with pytest.raises(
        UserError, match="not for 2 ranks and 4 microbatches in 1 chunks; ask for what it has"
    ):
        make(str(path), 2, 4, chunks=1)
    # What is illegal is named where the file is otherwise of the right size, and the size where it is not.
    path.write_text(make("1f1b", 2, 4).to_csv().replace("1F3", "1F7"))
    with pytest.raises(UserError, match="rank 1 does 1F7, and there are only microbatches 0 to 3; leave it"):
        make(str(path), 2, 4)
    for ranks, microbatches in ((2, 8), (2, 3), (4, 4)):
        path.write_text(make("1f1b", ranks, microbatches).to_csv())
        with pytest.raises(
            UserError,
            match=rf"for {ranks} ranks, {microbatches} micro.* has \(pipe={ranks} and {microbatches} micro",
        ):
            make(str(path), 2, 4)
    path.write_text(make("1f1b", 2, 8).to_csv().replace("1F3", "1F4"))
    with pytest.raises(UserError, match=r"is for 2 ranks, 8 microbatches .* not for 2 ranks and 4 micro"):
        make(str(path), 2, 4)
    path.write_text("0F0,0B0\n1B0,1F0")
    with pytest.raises(UserError, match=r"'mine\.csv': rank 1 does 1B0 before 1F0; put 1F0 first"):
        make(str(path), 2, 1)


# --- the classical ones -----------------------------------------------------------------------------------

TEXTS = {
    ("gpipe", 2, 2, None): "0F0,0F1,0B0,0B1\n1F0,1F1,1B0,1B1\n",
    ("1f1b", 3, 3, None): "0F0,0F1,0F2,0B0,0B1,0B2\n1F0,1F1,1B0,1F2,1B1,1B2\n2F0,2B0,2F1,2B1,2F2,2B2\n",
    ("interleaved", 2, 2, 2): "0F0,0F1,2F0,2F1,2B0,2B1,0B0,0B1\n1F0,1F1,3F0,3B0,3F1,3B1,1B0,1B1\n",
    ("zb-h1", 2, 3, None): "0F0,0F1,0I0,0W0,0F2,0I1,0W1,0I2,0W2\n1F0,1I0,1F1,1I1,1W0,1F2,1I2,1W1,1W2\n",
    ("zb-v", 1, 2, None): "0F0,1F0,1I0,1W0,0F1,0I0,0W0,1F1,1I1,1W1,0I1,0W1\n",
}  # fmt: skip


@pytest.mark.parametrize("sizes", TEXTS)
def test_small_ones_are_the_textbook_s(sizes):
    assert make(*sizes).to_csv() == TEXTS[sizes]


@pytest.mark.parametrize("name", NAMES)
def test_all_sizes_are_legal(name):
    """`make` validates; here by the judges of the tests."""
    for ranks, microbatches in itertools.product((1, 2, 3, 5, 8), (1, 2, 3, 4, 7, 9, 16)):
        for chunks in (1, 2, 3) if name == "interleaved" else (None,):
            one = make(name, ranks, microbatches, chunks)
            assert tables.complete(one)
            assert not tables.stuck(one)
            assert one.split == (name in ("zb-h1", "zb-v"))
            halves = {a.kind for order in one.with_split().orders for a in order}
            wholes = {a.kind for order in one.with_fused().orders for a in order}
            assert (halves, wholes) == (set("FIW"), set("FB"))


def test_interleaved_with_one_chunk_is_1f1b():
    assert make("interleaved", 4, 8, 1).orders == make("1f1b", 4, 8).orders


def test_zb_h1_is_1f1b_where_weights_do_not_count():
    assert make("zb-h1", 4, 9).with_fused().orders == make("1f1b", 4, 9).orders


@pytest.mark.parametrize("ranks_of", [(0,), (0, 1, 2), (0, 1, 0, 1), (0, 1, 2, 2, 1, 0), (1, 0, 0)])
def test_forwards_alone(ranks_of):
    for microbatches in (1, 2, 5):
        one = forward_only(ranks_of, microbatches)
        assert sorted(a for o in one.orders for a in o) == [
            Action(s, "F", i) for s in range(len(ranks_of)) for i in range(microbatches)
        ]
        assert not tables.stuck(one)
        with pytest.raises(UserError, match=r"0I0 \(or 0B0 for both halves\) is missing"):
            validate(one)


def test_names_and_sizes_that_do_not_exist_are_refused():
    for args, sentence in [
        (("foo", 2, 2), "there is no schedule 'foo'; there are gpipe, 1f1b, interleaved, zb-h1, zb-v, or name a .csv file"),
        (("1f1b", 0, 2), "of 0 ranks and 2 microbatches; use 1 or more of each"),
        (("gpipe", 2, 0), "of 2 ranks and 0 microbatches; use 1 or more of each"),
        (("1f1b", 2, 2, 3), "'1f1b' with 3 chunks on each rank; 1f1b has 1, interleaved takes any number"),
        (("zb-v", 2, 2, 3), "'zb-v' with 3 chunks on each rank; zb-v has 2"),
        (("interleaved", 2, 2, 0), "'interleaved' with 0 chunks on each rank; interleaved has 1 or more, 2 by"),
        (("interleaved", 2, 2, -1), "with -1 chunks on each rank; interleaved has 1 or more"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=re.escape(sentence)):
            make(*args)
    with pytest.raises(UserError, match="schedule 'forward' has 0 microbatches"):
        forward_only((0, 1), 0)
    with pytest.raises(UserError, match="rank 1 holds no stage"):
        forward_only((0, 2), 1)
