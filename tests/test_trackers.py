"""Runs in trackers: the recipe once, each row once also after a kill and a resume, a failing tracker is off. Stand-ins for
the packages record what is called; where the real ones are installed, they take a run, too, without a network"""
import json
import sqlite3
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from conftest import NO_MODEL, TINY

from basd.methods.base import Callback
from basd.runs.metrics import TRACKERS, Trackers, read_metrics
from basd.runs.recipes import load_recipe
from basd.training.build import build_trainer

CE = [*(w for w in TINY if not w.startswith("method.")), *NO_MODEL, "method.name=ce", "train.epochs=2", "train.ema=null",
      "data.train_size=128", "train.log_every=1"]     # a checkpoint after every fourth step


class Killed(Exception): "In place of a machine that fails"


class Kill(Callback):
    order = 99
    def __init__(self, at): self.at = at
    def end_step(self, t):
        if t.step == self.at: raise Killed


def run(folder, *words, kill=None, resume=False):
    t = build_trainer(load_recipe("basd_cifar10", [*CE, *words])[""], folder, "cpu", resume, bars=False)
    if kill: t.listen([*t.callbacks, Kill(kill)])
    return t.fit()


class Stand:
    "A package that records runs as `id → (config, status, [(step, values)])`"
    def __init__(self): self.runs, self.fails = {}, False
    def begin(self, id, config):
        if id not in self.runs: self.runs[id] = SimpleNamespace(configs=[], rows=[], status=None)
        if config: self.runs[id].configs.append(config)
        return self.runs[id]
    def row(self, id, step, values):
        if self.fails: raise ConnectionError("no\nanswer")
        self.runs[id].rows.append((step, values))
    def end(self, id, status): self.runs[id].status = status


def stand_in(name, seen):
    "A module with the part of a package that a tracker calls"
    m = ModuleType(name)
    if name == "wandb":
        def init(project, dir, name, id, resume, config):
            assert resume == "allow" and project == "basd"
            seen.begin(id, config)
            return SimpleNamespace(define_metric=lambda *a, **k: None, finish=lambda exit_code: seen.end(id, not exit_code),
                                   log=lambda v: seen.row(id, v["step"], {k: x for k, x in v.items() if k != "step"}))
        m.init = init
    if name == "trackio":
        def init(project, name, resume, config, embed):
            assert resume == "allow" and project == "basd"
            seen.begin(name, config).configs[:] = [config or {}]         # the last one holds
            return SimpleNamespace(log=lambda v, step: seen.row(name, step, v), finish=lambda: seen.end(name, True))
        m.init = init
    if name == "mlflow":
        def batch(id, metrics=(), params=()):
            assert len(params) <= 100 and len({p.key for p in params}) == len(params)
            seen.begin(id, {p.key: p.value for p in params})
            if metrics: seen.row(id, metrics[0].step, {m.key: m.value for m in metrics})
        def create(experiment, run_name):
            seen.begin("m1", None)
            return SimpleNamespace(info=SimpleNamespace(run_id="m1"))
        m.MlflowClient = lambda: SimpleNamespace(create_run=create, update_run=lambda id, status: seen.runs[id], log_batch=batch,
                                                 set_terminated=lambda id, status: seen.end(id, status == "FINISHED"))
        m.set_experiment = lambda name: SimpleNamespace(experiment_id="0")
        m.entities = SimpleNamespace(Metric=lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step),
                                     Param=lambda key, value: SimpleNamespace(key=key, value=value))
    return m


@pytest.fixture(params=["wandb", "trackio", "mlflow"])
def tracker(request, monkeypatch):
    seen, name = Stand(), request.param
    for variable in ("WANDB_PROJECT", "TRACKIO_PROJECT", "MLFLOW_EXPERIMENT_NAME"): monkeypatch.delenv(variable, raising=False)
    monkeypatch.setitem(sys.modules, name, stand_in(name, seen))
    monkeypatch.setattr("basd.runs.metrics.find_spec", lambda module: True)
    return name, seen


def numbers(folder):
    "What a tracker should have of a run: (step, names of its values)"
    return [(r["step"], {f"{r['kind']}/{k}" for k, v in r.items() if type(v) in (int, float) and k != "step"})
            for r in read_metrics(folder) if r["kind"] != "finding"]


def test_a_killed_run_is_appended_to(tracker, tmp_path):
    "Killed at step 7, three after its checkpoint, and again at step 6: one run, one recipe, each row once"
    name, seen = tracker
    with pytest.raises(Killed): run(tmp_path/"run", f"train.log={name}", kill=7)
    (one,) = seen.runs.values()
    assert not one.status or name == "trackio"
    with pytest.raises(Killed): run(tmp_path/"run", f"train.log={name}", kill=6, resume=True)
    assert run(tmp_path/"run", f"train.log={name}", resume=True)
    assert list(seen.runs.values()) == [one] and one.status and len(one.configs) == 1
    config = one.configs[0]
    assert (config["train.epochs"] if name == "mlflow" else str(config["train"]["epochs"])) == "2"
    assert [(s, set(v)) for s, v in one.rows] == numbers(tmp_path/"run") and len(one.rows) == 11
    written = {r["step"]: r["loss"] for r in read_metrics(tmp_path/"run", "step")}
    assert {s: v["step/loss"] for s, v in one.rows if "step/loss" in v} == written


def test_a_tracker_that_fails_is_off(tracker, tmp_path, capsys):
    "One warning that names it, and the run ends as it would; resumed, a tracker gets the rest"
    name, seen = tracker
    seen.fails = True
    assert run(tmp_path/"run", f"train.log=[jsonl, {name}]")
    lines = [l for l in capsys.readouterr().err.splitlines() if name in l]
    assert len(lines) == 1 and "failed to log (ConnectionError: no answer)" in lines[0]
    assert len(read_metrics(tmp_path/"run", "step")) == 8 and all(not r.rows for r in seen.runs.values())


@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_what_is_not_installed(name, tmp_path, monkeypatch):
    "One sentence names the extra, before a run directory is made; the extra exists"
    monkeypatch.setattr("basd.runs.metrics.find_spec", lambda module: None)
    with pytest.raises(ValueError, match=rf"pip install 'basd-distill\[{name}\]', or leave {name} out"):
        run(tmp_path/"run", f"train.log={name}")
    assert not (tmp_path/"run").exists()
    setup = Path(__file__).parents[1]/"setup.py"
    assert f'"{name}": ["{name}"]' in setup.read_text()


@pytest.mark.parametrize("text", ['{"wandb": 3}', "[]", "", '{"wandb": {"id": "a", "sent": 5}}'])
def test_a_damaged_list_of_what_was_sent(text, tmp_path):
    (tmp_path/"trackers.json").write_text(text)
    with pytest.raises(ValueError, match="trackers.json is damaged; delete it"): Trackers(tmp_path, ["wandb"], {}, step=4)


def stored(name, home, run_dir):
    "(step, loss) of all step rows that an installed tracker has of its one run, from its own files"
    id = json.loads((run_dir/"trackers.json").read_text())[name]["id"]
    if name == "mlflow":
        import mlflow
        client = mlflow.MlflowClient()
        assert client.get_run(id).info.status == "FINISHED" and client.get_run(id).data.params["train.epochs"] == "2"
        return [(m.step, m.value) for m in client.get_metric_history(id, "step/loss")]
    if name == "trackio":
        with sqlite3.connect(home/"basd.db") as db:
            (config,), = db.execute("select config from configs where run_name = ?", [id])
            assert json.loads(config)["train"]["epochs"] == 2
            rows = [(step, json.loads(values)) for step, values in db.execute("select step, metrics from metrics where run_name = ?", [id])]
        return sorted((step, v["step/loss"]) for step, v in rows if "step/loss" in v)
    found = []
    for file in sorted((run_dir/"wandb").glob("offline-run-*/*.wandb")):
        assert file.stem == f"run-{id}"
        found += [(row["step"], row["step/loss"]) for row in offline_rows(file.read_bytes()) if "step/loss" in row]
    return found


def offline_rows(data):
    "Rows of a file of wandb: a header, then blocks of 32 KiB with records, each behind checksum, length and kind of piece"
    from wandb.proto.wandb_internal_pb2 import Record
    at, whole = 7, b""
    while at + 7 <= len(data):
        size, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        if 2**15 - at % 2**15 < 7 or not kind: at += 2**15 - at % 2**15; continue
        whole, at = whole + data[at + 7:at + 7 + size], at + 7 + size
        if kind in (1, 4):          # a whole record, or the last piece of one
            record = Record.FromString(whole)
            whole = b""
            if record.history.item: yield {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_installed(name, tmp_path, monkeypatch):
    "The real package, offline: a run that was killed is in its files once"
    if find_spec(name) is None: pytest.skip(f"{name} is not installed")
    home = tmp_path/"home"; home.mkdir()
    for k, v in dict(WANDB_MODE="offline", WANDB_SILENT="true", MLFLOW_TRACKING_URI=f"sqlite:///{home}/mlflow.db",
                     TRACKIO_DIR=str(home), TRACKIO_TELEMETRY="0").items(): monkeypatch.setenv(k, v)
    for k in ("WANDB_PROJECT", "TRACKIO_PROJECT", "MLFLOW_EXPERIMENT_NAME"): monkeypatch.delenv(k, raising=False)
    monkeypatch.chdir(home)
    with pytest.raises(Killed): run(tmp_path/"run", f"train.log={name}", kill=7)
    assert run(tmp_path/"run", f"train.log={name}", resume=True)
    assert stored(name, home, tmp_path/"run") == [(r["step"], pytest.approx(r["loss"])) for r in read_metrics(tmp_path/"run", "step")]
