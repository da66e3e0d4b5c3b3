"""A run resumes on any mesh as if it had not stopped, and damage is found before anything is restored."""

import contextlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from forked_process import ForkedProcess
from pipelined_models import Small, close, trainer, wide
from recipe_process import environment

import shardtrain as st
from shardtrain import Checkpoints, UserError, versions
from shardtrain.checkpoint import manifest
from shardtrain.checkpoint.storage import Handler, Restore
from shardtrain.launch.local import free_port

BATCH = 16
_random = np.random.default_rng(0)
ARRAYS = st.data.Arrays(
    _random.random((96, 4, 4, 2), np.float32), _random.integers(0, 5, 96).astype(np.int32)
)


def make(mesh):
    """A net with batch norm and dropout, and an optimizer with moments, a schedule and a mask."""
    rate = optax.warmup_cosine_decay_schedule(1e-3, 3e-2, 5, 40)
    optimizer = optax.adamw(rate, mask=lambda params: {name: "kernel" in name for name in params})
    return trainer(mesh, optimizer, wide(Small()))


def go_on(one, steps, **kwargs):
    """The losses of more steps, from the run's position in the data."""
    feed = st.data.train_batches(ARRAYS, BATCH, seed=3, start=one.examples // BATCH)
    rows = one.fit(feed, steps=int(one.state.step) + steps, progress=False, **kwargs)
    return [row["loss"] for row in rows]


def whole(one):
    return jax.tree.map(np.array, one._named())


@pytest.fixture(scope="module")
def straight():
    """36 steps on one device without a stop."""
    one = make("data=1")
    return go_on(one, 36), whole(one)


def test_the_resume_matrix(straight, tmp_path):
    """8, 4, 2, 1 and 8 devices, pixels, channels and stages cut in turn; then the next 20 steps."""
    losses = []
    before = None
    for mesh in ("data=2,height=2,channel=2", "pipe=2,data=2", "height=2", "data=1", "pipe=4,data=2"):
        one = make(mesh)
        with Checkpoints(tmp_path) as checkpoints:
            if before is not None:
                assert one.restore(checkpoints) == len(losses)
                close(one._named(), before, 0)  # parameters, statistics, streams and optimizer, leaf by leaf
            losses += go_on(one, 20 if mesh.startswith("pipe=4") else 4, checkpoints=checkpoints)
        assert one.examples == len(losses) * BATCH
        before = whole(one)
    np.testing.assert_allclose(losses, straight[0], rtol=1e-9)
    close(before, straight[1], 1e-7)  # adam makes steps of rounding errors


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints after 2, 4 and 6 steps on one device."""
    folder = tmp_path_factory.mktemp("saved")
    one = make("data=1")
    with Checkpoints(folder, every=2, manifest={"flags": {"seed": 3}}) as checkpoints:
        go_on(one, 6, checkpoints=checkpoints)
    return folder


@pytest.fixture(scope="module")
def other():
    return make("data=2")


@pytest.mark.parametrize("forgotten", ["examples", "opt_state", "model_state", "params", "nothing"])
def test_what_a_restore_forgets_is_seen_in_the_losses(forgotten, straight, saved, other, monkeypatch):
    """Every part of the tree matters: a restore that leaves out one part gives other losses."""
    fresh = make("data=2")
    start = {key: getattr(fresh.state, key) for key in ("opt_state", "model_state", "params")}
    start["examples"] = fresh.state.extra
    right = Checkpoints.restore

    def wrong(self, *args):
        step, tree = right(self, *args)
        field = {"examples": "extra"}.get(forgotten, forgotten)
        return step, tree | ({} if forgotten == "nothing" else {field: start[forgotten]})

    monkeypatch.setattr(Checkpoints, "restore", wrong)
    assert other.restore(saved) == 6
    equal = np.allclose(go_on(other, 3), straight[0][6:9], rtol=1e-9)
    assert equal == (forgotten == "nothing")


def test_steps_go_on_while_a_checkpoint_is_written(other, tmp_path):
    """The state is written as it was, although the next step reuses its memory."""
    go_on(other, 1)
    before = whole(other)
    examples = other.examples
    with Checkpoints(tmp_path) as checkpoints:
        other.save(checkpoints)
        go_on(other, 3)
    assert other.restore(tmp_path) == int(before.step)
    close(other._named(), before, 0)
    assert other.examples == examples


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no priorities of their own")
def test_threads_that_write_take_only_cores_that_are_idle(other, tmp_path):
    def policies():
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended by now
                name, _, fields = (task / "stat").read_text().partition("(")[2].rpartition(")")
                yield name, int(fields.split()[38])

    with Checkpoints(tmp_path) as checkpoints:
        other.save(checkpoints)
    found = list(policies())
    assert {policy for name, policy in found if name == "ts_pool_worker"} == {os.SCHED_IDLE}
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    assert os.SCHED_OTHER in {policy for name, policy in found if name != "ts_pool_worker"}


def test_the_manifest_says_what_the_run_was(saved):
    found = json.loads((saved / "6" / "default" / "manifest.json").read_text())
    assert (found["step"], found["examples"], found["mesh"]) == (6, 96, "data=1")
    assert found["flags"] == {"seed": 3}
    assert found["versions"]["jax"] == jax.__version__
    assert set(found["versions"]) >= {"python", "flax", "optax", "orbax-checkpoint", "shardtrain"}
    assert found["metrics"]["loss"] > 0


def test_the_revision_is_that_of_the_program(tmp_path):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True)

    assert versions.revision(tmp_path) is None
    (tmp_path / "program.py").write_text("1\n")
    for words in (["init"], ["add", "."], ["commit", "-m", "first"]):
        git(*words)
    head = git("rev-parse", "HEAD").stdout.strip()
    assert versions.revision(tmp_path) == head
    (tmp_path / "program.py").write_text("2\n")
    assert versions.revision(tmp_path) == f"{head}-dirty"


def test_arrays_of_another_type_are_refused(tmp_path):
    """Orbax would convert them."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": np.arange(6.0)})
        checkpoints.wait()
        with pytest.raises(UserError, match="x is of float64 there and of float32 here"):
            checkpoints.restore({"x": np.zeros(6, np.float32)})


def data_file(folder):
    """The largest file."""
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def truncated(folder):
    os.truncate(data_file(folder), data_file(folder).stat().st_size // 2)


def flipped(folder):
    file = data_file(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edited(folder):
    file = folder / "default" / "manifest.json"
    file.write_text(file.read_text().replace('"seed": 3', '"seed": 4'))


def of_another_step(folder):
    shutil.copytree(folder.with_name("4"), folder, dirs_exist_ok=True)
    for file in {f.relative_to(folder) for f in folder.rglob("*") if f.is_file()}:
        if not (folder.with_name("4") / file).exists():
            (folder / file).unlink()


def naming(name, *, size=2000):
    """A change of the manifest that names a file, with a checksum of its own that is right."""

    def change(folder):
        file = folder / "default" / "manifest.json"
        found = json.loads(file.read_text())
        del found["crc32"]
        found["files"] = {name: [size, 0], **found["files"]}
        found["crc32"] = manifest._own_crc(found)
        file.write_text(json.dumps(found))

    return change


def linking(target):
    """A change that makes a file of the checkpoint a link to another one."""

    def change(folder):
        file = data_file(folder)
        file.unlink()
        file.symlink_to(target)

    return change


def pipe(name):
    def change(folder):
        (folder / "default" / name).unlink(missing_ok=True)
        os.mkfifo(folder / "default" / name)

    return change


OUTSIDE = "which is no file of this checkpoint"

LIES = {
    "a file above it": (naming("../../../../../../../../etc/passwd"), OUTSIDE),
    "a file of the system": (naming("/etc/passwd"), OUTSIDE),
    "a device": (naming("/dev/zero"), OUTSIDE),
    "no name": (naming(""), OUTSIDE),
    "a zero in a name": (naming("a\0b"), OUTSIDE),
    "no length": (naming("a", size=None), "no length and checksum of 'a'"),
    "a length that is none": (naming("a", size="1"), "no length and checksum of 'a'"),
    "a link out of it": (linking("/etc/passwd"), OUTSIDE),
    "a link to a device": (linking("/dev/zero"), "is no regular file"),
    "a pipe": (pipe("_METADATA"), "_METADATA is no regular file"),
    "a pipe that nobody names": (pipe("ours"), "ours is no regular file"),
    "a pipe for a manifest": (pipe("manifest.json"), "manifest.json cannot be read .it is no regular file"),
    "a manifest of brackets": (
        lambda folder: (folder / "default" / "manifest.json").write_text(100_000 * "["),
        "it is nested too deeply",
    ),
    "a manifest without an end": (
        lambda folder: os.truncate(folder / "default" / "manifest.json", manifest.MOST_BYTES + 1),
        "it has more than 268,435,456 bytes",
    ),
}
"""What a checkpoint from elsewhere may hold."""


@pytest.mark.parametrize("lie", LIES)
def test_a_checkpoint_that_names_what_is_not_its_own_gives_way(lie, saved, tmp_path, caplog):
    folder = shutil.copytree(saved, tmp_path / "copy")
    spoil, message = LIES[lie]
    spoil(folder / "6")
    assert Checkpoints(folder).newest()[0] == 4
    assert f"DAMAGED CHECKPOINT: {folder / '6'}: " in caplog.text
    assert re.search(message, caplog.text)


DAMAGES = {
    "a truncated file": (truncated, "of .* bytes"),
    "a flipped bit": (flipped, "not as it was written"),
    "a missing file": (lambda folder: data_file(folder).unlink(), "cannot be read"),
    "an empty index": (lambda folder: os.truncate(folder / "default" / "_METADATA", 0), "has 0 of"),
    "no manifest": (
        lambda folder: (folder / "default" / "manifest.json").unlink(),
        "manifest.json is missing",
    ),
    "half a manifest": (
        lambda folder: os.truncate(folder / "default" / "manifest.json", 100),
        "cannot be read",
    ),
    "an edited manifest": (edited, "manifest.json is not as it was written"),
    "another step's": (of_another_step, "manifest.json is of step 4"),
    "nothing in it": (lambda folder: shutil.rmtree(folder / "default"), "manifest.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(
    damage, saved, other, straight, tmp_path, caplog
):
    folder = shutil.copytree(saved, tmp_path / "copy")
    spoil, message = DAMAGES[damage]
    spoil(folder / "6")
    with Checkpoints(folder, every=2) as checkpoints:
        assert other.restore(checkpoints) == 4
        (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert warning.getMessage().startswith(f"DAMAGED CHECKPOINT: {folder / '6'}: ")
        assert re.search(message, warning.getMessage())
        np.testing.assert_allclose(go_on(other, 4, checkpoints=checkpoints), straight[0][4:8], rtol=1e-9)
    assert checkpoints.steps() == [4, 6, 8]
    assert [f.name for f in (folder / "aside").iterdir()] == ["6"]  # nothing is thrown away
    assert Checkpoints(folder).newest()[0] == 8


def test_what_lies_outside_of_a_checkpoint_is_not_told(saved, tmp_path):
    """Neither its size nor whether it is there."""
    secret = tmp_path / "secret"
    secret.write_text(1234 * "x")
    folder = shutil.copytree(saved, tmp_path / "copy")
    said = set()
    for name in ("../../../secret", "../../../none"):
        naming(name)(folder / "6")
        with pytest.raises(UserError) as told:
            Checkpoints(folder).manifest(6)
        said.add(str(told.value).replace(name, "NAME"))
    assert len(said) == 1
    assert "1,234" not in said.pop()


def test_a_checkpoint_of_a_newer_version_says_so(tmp_path):
    for there, named in (
        ({"shardtrain": "7.1"}, "it was written by shardtrain 7.1, which is newer than"),
        ({"jax": "99.0.1.dev2"}, "it was written by jax 99.0.1.dev2, which is newer than"),
        ({"jax": "0.0.1"}, ""),
        ({"jax": None}, ""),
    ):
        folder = tmp_path / str(there)
        with Checkpoints(folder, manifest={"versions": there}) as checkpoints:
            checkpoints.save(1, {"x": np.arange(6.0)}, about={"versions": versions.versions() | there})
        with pytest.raises(
            UserError, match=r"does not fit this model and optimizer \(y is not in it"
        ) as told:
            Checkpoints(folder).restore({"x": np.zeros(6), "y": np.zeros(6)})
        assert named in str(told.value)
        assert ("which is newer" in str(told.value)) is bool(named)


@pytest.mark.parametrize("there", ["7.1", "0.0.1"])
def test_a_checkpoint_that_cannot_be_read_says_who_wrote_it(there, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(
            1, {"x": np.arange(6.0)}, about={"versions": versions.versions() | {"shardtrain": there}}
        )
    index = tmp_path / "1" / "default" / "_METADATA"
    index.write_text("another format")
    folder = tmp_path / "1" / "default"
    manifest.seal(folder, {k: v for k, v in manifest.read(folder).items() if k != "files"})
    with pytest.raises(UserError, match="is whole but cannot be read") as told:
        Checkpoints(tmp_path).restore({"x": np.zeros(6)})
    assert ("by shardtrain 7.1, which is newer" if there == "7.1" else "by orbax-checkpoint") in str(
        told.value
    )


def test_orbax_alone_restores_a_flipped_bit(tmp_path, monkeypatch):
    """The reason for checksums; when this test fails, Orbax has its own and ours are not needed."""
    state = {"x": np.arange(100_000.0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    flipped(tmp_path / "1")
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
        Checkpoints(tmp_path).restore(state)
    monkeypatch.setattr(manifest, "verify", lambda *_: None)
    _, found = Checkpoints(tmp_path).restore(state)
    assert (found["x"] != state["x"]).sum() == 1


def test_where_all_are_damaged_nothing_is_restored(saved, other, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    for step in (2, 4, 6):
        truncated(folder / str(step))
    before = whole(other)
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged \(2, 4, 6\)"):
        other.restore(folder)
    close(whole(other), before, 0)
    with pytest.raises(UserError, match=r"6 is damaged .*name another one"):
        other.restore(folder, step=6)


def test_an_unfinished_folder_is_named_and_cleared_away(saved, other, tmp_path, caplog):
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / "6").rename(folder / "6.orbax-checkpoint-tmp")
    with Checkpoints(folder) as checkpoints:
        assert other.restore(checkpoints) == 4
        assert "6.orbax-checkpoint-tmp was never finished" in caplog.text
        go_on(other, 2, checkpoints=checkpoints)
    assert sorted(f.name for f in folder.iterdir()) == ["2", "4", "6"]


def test_one_step_can_be_named(saved, other):
    assert other.restore(saved, step=2) == 2
    assert other.examples == 2 * BATCH
    with pytest.raises(UserError, match=r"no checkpoint of step 3 in .*there are 2, 4, 6"):
        other.restore(saved, step=3)


def test_what_was_restored_is_not_saved_again(saved, other, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    with Checkpoints(folder) as checkpoints:
        other.restore(checkpoints)
        other.save(checkpoints)
    assert not (folder / "aside").exists()


STATE = {"x": np.arange(6.0)}


def scored(folder, scores, **kwargs):
    with Checkpoints(folder, best="score", **kwargs) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(step, STATE, {"score": score})
    return checkpoints


def test_the_last_ones_and_the_best_one_are_kept(tmp_path):
    for mode, best in (("max", 2), ("min", 3)):
        folder = tmp_path / mode
        scores = {1: 0.5, 2: 0.9, 3: 0.1, 4: float("nan"), 5: 0.6, 6: 0.7}
        assert scored(folder, scores, keep=2, mode=mode).steps() == [best, 5, 6]
        again = scored(folder, {7: 0.8, 8: 0.2}, keep=2, mode=mode)  # another process of the same run
        assert again.steps() == [best, 7, 8]
        assert again.best() == best
        shutil.rmtree(folder / str(best))  # a user makes room
        assert again.best() == (7 if mode == "max" else 8)
    with Checkpoints(tmp_path / "last", keep=2) as checkpoints:
        for step in range(5):
            checkpoints.save(step, STATE)
    assert checkpoints.steps() == [3, 4]


def test_arguments_that_cannot_be(tmp_path):
    for wrong in ({"every": 0}, {"keep": 0}, {"mode": "most"}):
        with pytest.raises(UserError, match=r"Checkpoints: \w+="):
            Checkpoints(tmp_path, **wrong)
    with (
        pytest.raises(UserError, match="no metric 'accuracy'; there are loss"),
        Checkpoints(tmp_path, best="accuracy") as checkpoints,
    ):
        checkpoints.save(1, STATE, {"loss": 1.0})


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"could not be written to .*file/run .*the earlier ones"):
        Checkpoints(tmp_path / "file" / "run").save(1, STATE)


def python(program, *args, **kwargs):
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


FULL = """
import resource, sys
import numpy as np
from shardtrain import Checkpoints, UserError
state = {"x": np.arange(200_000.0)}
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, state)
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
checkpoints.save(2, state)
try:
    checkpoints.wait()
except UserError as error:
    print(error)
"""


def test_a_full_disk_is_one_sentence_and_the_earlier_one_stays(tmp_path):
    """A limit on the size of a file stands for the disk: the same error on the same write."""
    job = python(FULL, tmp_path)
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 0
    assert "could not be written" in out
    assert "File too large" in out
    assert "the earlier ones are as they were: 1" in out
    assert Checkpoints(tmp_path).newest()[0] == 1


SAVES = """
import itertools, sys
import numpy as np
from shardtrain import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=2)
start = checkpoints.newest()[0] if checkpoints.steps() else 0
for step in itertools.count(start + 1):
    checkpoints.save(step, {"x": np.full(1_000_000, step, np.float32), "y": np.full(7, step)})
    print(step, flush=True)
"""


def test_a_kill_while_saving_leaves_a_whole_one(tmp_path):
    """Killed again and again, at other moments of a save; a writer that is not atomic loses some."""
    like = {"x": np.zeros(1_000_000, np.float32), "y": np.zeros(7, np.int64)}
    folder, program = tmp_path / "run", tmp_path / "saves.py"
    program.write_text(SAVES)
    last = 0
    for delay in (0.0, 0.004, 0.013, 0.037):
        os.mkfifo(pipe := tmp_path / f"out of {delay}")
        job = ForkedProcess(program, [folder], pipe, os.devnull)
        with pipe.open() as out:
            for _ in range(2):
                out.readline()
            time.sleep(delay)
            job.kill()
            job.wait()
        step, state = Checkpoints(folder).restore(like)
        assert step > last
        assert (state["x"] == step).all()
        assert (state["y"] == step).all()
        last = step


def test_reading_a_checkpoint_runs_no_code(saved, tmp_path):
    """Python tells of every unpickling and every program that is compiled; reading causes neither."""
    audit = """
import sys
import numpy as np
import pickle
from shardtrain import Checkpoints
from shardtrain.checkpoint import export
like = {"x": np.zeros(6), "y": {"z": np.zeros(2, np.int32)}}
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(1, {"x": np.arange(6.0), "y": {"z": np.ones(2, np.int32)}})
Checkpoints(sys.argv[1]).restore(like)  # imports what it needs
seen = []
watching = True
sys.addaudithook(lambda event, args: seen.append((event, args)) if watching and event in (
    "pickle.find_class", "exec", "compile", "marshal.loads", "ctypes.dlopen", "os.system", "subprocess.Popen") else None)
step, state = Checkpoints(sys.argv[1]).restore(like)
print(step, state["x"].sum(), [(e, str(a)[:200]) for e, a in seen])
pickle.loads(pickle.dumps(Checkpoints))
watching = False
print([event for event, _ in seen])
"""
    out, err = python(audit, tmp_path).communicate(timeout=120)
    assert out.splitlines() == ["1 15.0 []", "['pickle.find_class']"], err


# Two processes.

WORKER = Path(__file__).parent / "checkpoint_worker.py"


def job(processes, mesh, folder, steps):
    """Results of every process of a job on four devices."""
    port = free_port()
    outs = [folder.with_name(f"out{rank}") for rank in range(processes)]
    errors = [folder.with_name(f"err{rank}") for rank in range(processes)]
    folder.parent.mkdir(exist_ok=True)
    jobs = [
        ForkedProcess(
            WORKER,
            [port, processes, rank, 4 // processes, mesh, folder, steps, outs[rank]],
            os.devnull,
            errors[rank],
        )
        for rank in range(processes)
    ]
    statuses = [one.wait(200) for one in jobs]
    assert statuses == [0] * processes, [error.read_text() for error in errors]
    return [json.loads(out.read_text()) for out in outs]


def arrays(folder):
    """Every leaf of a checkpoint by its name."""
    handler = Handler()
    tree = handler.metadata(folder / "default").tree
    whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    found = handler.restore(folder / "default", args=Restore(restore_args=whole))
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(found)}


@pytest.mark.parametrize(
    "two",
    [
        pytest.param(["data=2,height=2"], marks=pytest.mark.slow),
        pytest.param(["pipe=2,data=2"], marks=pytest.mark.slow),
        pytest.param(["pipe=2,data=2", "data=4", "data=2,pipe=2"], marks=pytest.mark.slow),
    ],
    ids=["pixels", "stages", "stages and back"],
)
def test_two_processes_take_up_what_one_left_and_back(two, tmp_path):
    """Each job saves; every array of each of its checkpoints is that of the run that never stopped."""
    parts, alone = tmp_path / "parts" / "run", tmp_path / "alone" / "run"
    jobs = [(1, "data=4", 3), *((2, mesh, 3) for mesh in two), (1, "data=1", 20)]
    losses = []
    for processes, mesh, steps in jobs:
        results = job(processes, mesh, parts, len(losses) + steps)
        assert {result["start"] for result in results} == {len(losses)}
        assert {result["examples"] for result in results} == {32 * (len(losses) + steps)}
        assert all(result["losses"] == results[0]["losses"] for result in results)
        losses += results[0]["losses"]
    (straight,) = job(1, "data=4", alone, len(losses))
    np.testing.assert_allclose(losses, straight["losses"], rtol=1e-9)
    for step in (3, 3 * len(two) + 3, len(losses)):
        ours, theirs = arrays(parts / str(step)), arrays(alone / str(step))
        assert ours.keys() == theirs.keys()
        assert any("opt_state" in name and "mu" in name for name in ours)
        for name, x in ours.items():
            np.testing.assert_allclose(x, theirs[name], rtol=1e-7, atol=1e-9, err_msg=name)
