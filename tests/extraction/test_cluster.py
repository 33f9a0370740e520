"""Stage one on dask: the same bytes wherever they are made, and the promised end whatever happens to workers.

One own cluster of two CPU workers is started for all quick tests; a run joins it, as it would any other.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import dask.config
import numpy as np
import psutil
import pytest
import torch
from distributed import Client
from PIL import Image

from mmdiff_cache.cli.app import run
from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.datasets.registry import DATASETS
from mmdiff_cache.errors import ClusterError, ClusterRefused, ConfigError, ExtractionError, StorageError
from mmdiff_cache.extraction import crew
from mmdiff_cache.extraction.cluster import own_cluster
from mmdiff_cache.extraction.crew import DaskCrew
from mmdiff_cache.extraction.identity import surroundings
from mmdiff_cache.extraction.placement import open_cluster
from mmdiff_cache.extraction.plan import plan
from mmdiff_cache.extraction.profile import PARTS, Profile
from mmdiff_cache.extraction.remote import Job, digest
from mmdiff_cache.extraction.run import extract
from tests.extraction import strange_data

PRELOAD = {"distributed.worker.preload": [str(Path(strange_data.__file__))]}
SEED = 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[Client]:
    """Two workers that know the strange data sets."""
    with dask.config.set(PRELOAD), own_cluster(2, ()) as client:
        yield client


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "strange", strange_data.ENTRY)  # type: ignore[arg-type]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve small pictures that take their time: six partitions of two."""
    return draw(tmp_path / "pictures", [f"{number:02d}-slow.png" for number in range(12)])


@pytest.fixture
def strange(config: ExtractConfig, pictures: Path) -> ExtractConfig:
    """Twelve slow pictures through a tiny FLUX."""
    return replace(config, dataset="strange", data_root=str(pictures), splits=None, limit=None)


def draw(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    for number, name in enumerate(names):
        noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    return folder


def files(config: ExtractConfig) -> dict[str, bytes]:
    """Every file of a store but its logs and lock."""
    root = Path(str(config.store))
    names = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return {str(name): (root / name).read_bytes() for name in names if name.parts[0] not in ("logs", "lock")}


def inline(config: ExtractConfig) -> dict[str, bytes]:
    """The files that the same run leaves when it takes place in this process."""
    aside = replace(config, store=f"{config.store}-inline")
    extract(aside, workers=0)
    return files(aside)


def torch_threads(number: int) -> int:
    """How many threads torch has in one of the threads in which tasks run."""
    time.sleep(0.05)
    return torch.get_num_threads()


def is_worker(process: psutil.Process) -> bool:
    """Whether it is a process of a nanny, and there still."""
    with suppress(psutil.NoSuchProcess):
        return "spawn_main" in " ".join(process.cmdline())
    return False


def pids(client: Client) -> list[int]:
    return sorted(client.run(os.getpid).values())


def test_two_workers_give_the_bytes_of_one_process(cluster: Client, config: ExtractConfig) -> None:
    """And each is told: how many are done, how fast, on how many workers."""
    told: list[tuple[int, int, str]] = []
    profile = Profile()
    store = extract(config, lambda *tell: told.append(tell), client=cluster, profile=profile)
    assert store.samples_done == 5
    assert files(config) == inline(config)
    assert {part for part in PARTS if not profile.seconds[part]} == {"encoders"}, "as workers told"
    assert profile.seconds["transformer"] < profile.wall
    assert told[0] == (0, 5, "loading tiny-flux on 2 workers")
    assert sorted(done for done, _, _ in told) == [done for done, _, _ in told]
    assert told[-1][:2] == (5, 5)
    assert "samples/s" in told[-1][2]
    assert "MB/s on 2 workers" in told[-1][2]
    log = (store.path / "logs" / "extract.log").read_text()
    assert "partition val-000002 is complete" in log
    assert "loading tiny-flux from" in log, "what workers log comes here too"
    assert len(pids(cluster)) == 2, "who joins a cluster does not end it"


def test_what_a_cluster_measured_is_a_source_for_plans(cluster: Client, config: ExtractConfig) -> None:
    """Its sizes are anyone's; its speed is that of processes which share a CPU."""
    extract(config, client=cluster)
    assert plan(config).ratios is not None
    measured = json.loads((Path(str(config.store)) / "logs" / "measured.json").read_text())
    assert measured["samples"] == 5
    assert measured["operations_per_second"] > 0
    assert measured["machine"] == f"cpu, 2 processes of {torch.get_num_threads()} threads"
    assert plan(config).cost.speed is None


def test_a_finished_store_is_left_alone(cluster: Client, config: ExtractConfig) -> None:
    extract(config, client=cluster)
    before = files(config)
    told: list[int] = []
    extract(config, lambda done, total, state: told.append(done), client=cluster)
    assert files(config) == before
    assert told == []


def test_workers_round_as_this_process_does(cluster: Client, config: ExtractConfig) -> None:
    """dask sets one thread in its workers; a sum divided among two is another sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        extract(config, client=cluster)
        asked = [cluster.submit(torch_threads, number, pure=False) for number in range(8)]
        assert set(cluster.gather(asked)) == {before + 1}
        assert files(config) == inline(config)
    finally:
        torch.set_num_threads(before)


def test_only_the_loopback_interface_listens(cluster: Client) -> None:
    this = psutil.Process()
    listening = [
        connection.laddr.ip
        for process in [this, *this.children(recursive=True)]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 4, "scheduler, dashboard, two workers"
    assert {ip for ip in listening if not ip.startswith("127.")} == set()


def test_the_command_joins_a_scheduler(
    cluster: Client, config: ExtractConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = tmp_path / "config.json"
    wanted.write_text(json.dumps(config.to_json()))
    line = ["extract", "--config", str(wanted), "--scheduler", cluster.scheduler.address]
    assert run(line) == 0
    assert files(config) == inline(config)
    assert run([*line, "--workers", "2"]) == 2
    assert "choose one of them" in capfd.readouterr().err
    assert len(pids(cluster)) == 2


def test_text_encoders_that_do_not_fit_beside_the_transformer_go_first(
    cluster: Client, config: ExtractConfig
) -> None:
    """As they do by default on small GPUs: on one worker, for all of them; and in each run anew."""
    first = replace(config, text_pass="first", prompts="scene")
    told: list[str] = []
    for part in (replace(first, limit=2), first):
        store = extract(part, lambda done, total, state: told.append(state), client=cluster, append=True)
    assert files(first) == inline(first)
    assert told[0].startswith("encoding the prompts on one worker")
    assert (store.path / "logs" / "extract.log").read_text().count(" prompts and 2 concepts before") == 2
    assert list((store.path / "staging").iterdir()) == []


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced(
    cluster: Client, config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers the scheduler all the while, as one does whose GPU's driver hangs."""
    monkeypatch.setattr(crew, "HUNG_SECONDS", 20.0)  # a new process has to load first
    before = set(pids(cluster))
    folder = draw(tmp_path / "pictures", [f"{number}{'-hang' * (number == 5)}.png" for number in range(8)])
    hanging = replace(config, dataset="strange", data_root=str(folder), splits=None, limit=None)
    with pytest.raises(ExtractionError, match=r"1 of 4 partitions .*all-000002: .*hung"):
        extract(hanging, client=cluster)
    there = sorted(path.stem for path in (Path(str(config.store)) / "partitions").iterdir())
    assert there == [f"all-{number:06d}" for number in (0, 1, 3)]
    assert list((Path(str(config.store)) / "staging").iterdir()) == []
    cluster.wait_for_workers(2, timeout=60)
    assert set(pids(cluster)) != before


def test_a_sample_that_cannot_be_read_fails_alone(cluster: Client, strange: ExtractConfig) -> None:
    picture = Path(str(strange.data_root)) / "03-slow.png"
    picture.write_bytes(picture.read_bytes()[:100])
    store = extract(strange, client=cluster)
    assert list(store["all"].failed) == [3]
    assert files(strange) == inline(strange)


def test_other_versions_are_refused_before_anything_is_begun(
    cluster: Client, config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process finds the metadata of another numcodecs before the real one; the workers do not."""
    (tmp_path / "numcodecs-99.0.dist-info").mkdir()
    (tmp_path / "numcodecs-99.0.dist-info" / "METADATA").write_text("Name: numcodecs\nVersion: 99.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ClusterRefused, match=r"has numcodecs .*, this run 99\.0; .*same versions") as caught:
        extract(config, client=cluster)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not Path(str(config.store)).exists()


def test_a_worker_without_the_data_set_is_refused(
    cluster: Client, strange: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATASETS, "here", strange_data.ENTRY)  # type: ignore[arg-type]
    with pytest.raises(ClusterRefused, match=r"cannot make the plan .*'here' is not known"):
        extract(replace(strange, dataset="here"), client=cluster)


def test_a_worker_that_does_not_see_the_store_is_refused(cluster: Client, config: ExtractConfig) -> None:
    """A folder with the same manifest, as an older copy on a disk of its own would be, but not this run's."""
    planned = plan(replace(config, limit=1))
    store = extract(planned, workers=0)
    job = Job(
        config=planned.config,
        counts={"val": 1},
        manifest_sha256=hashlib.sha256((store.path / "manifest.json").read_bytes()).hexdigest(),
        plan_sha256=digest(planned),
        mark="staging/file-1-00000000",
        where=surroundings("cpu"),
        profile=False,
        text=None,
    )
    with pytest.raises(ClusterRefused, match=r"does not see the store .* file system that all"):
        DaskCrew(cluster, job).prepare()


def test_ctrl_c_lets_partitions_end_and_the_next_run_goes_on(cluster: Client, strange: ExtractConfig) -> None:
    states: list[tuple[int, str]] = []

    def press_ctrl_c(done: int, total: int, state: str) -> None:
        if done and not any(told for told, _ in states):
            os.kill(os.getpid(), signal.SIGINT)
        states.append((done, state))

    with pytest.raises(KeyboardInterrupt):
        extract(strange, press_ctrl_c, client=cluster)
    done = plan(strange).done
    assert 2 < done < 12, "what was under way has ended, nothing more was begun"
    assert any("stopping: " in state for _, state in states)
    assert list((Path(str(strange.store)) / "staging").iterdir()) == []
    assert extract(strange, client=cluster).samples_done == 12
    assert files(strange) == inline(strange)


def test_a_full_disk_ends_the_run_and_the_next_one_goes_on(
    cluster: Client, strange: ExtractConfig, tmp_path: Path
) -> None:
    """A real one: a file system of 8 MB that something else fills in the middle of the run."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can make a small file system")
    small = replace(strange, store=str(disk / "store"))

    def fill(done: int, total: int, state: str) -> None:
        if done == 2 and not (disk / "filler").exists():
            try:
                (disk / "filler").write_bytes(bytes(8_000_000))
            except OSError:
                return

    try:
        with pytest.raises(StorageError, match="no space left on the device; free some space") as caught:
            extract(small, fill, client=cluster)
        assert caught.value.exit_code == 4
        (disk / "filler").unlink()
        assert 2 <= plan(small).done < 12
        assert extract(small, client=cluster).samples_done == 12
        assert files(small) == inline(strange)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_wrong_requests_are_refused(cluster: Client, config: ExtractConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give one of them"):
        extract(config, workers=1, client=cluster)
    (tmp_path / "broken.json").write_text("{")
    for nowhere in ("nowhere", str(tmp_path / "broken.json")):
        with pytest.raises(ClusterRefused, match="neither an address"), open_cluster(config, None, nowhere):
            pass


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_either_worker_may_be_killed_at_any_moment(
    cluster: Client, strange: ExtractConfig, victim: int
) -> None:
    """Three times each, at random moments of the run, from its first second on."""
    moments = random.Random(SEED + victim)
    expected = inline(strange)
    for number in range(3):
        again = replace(strange, store=f"{strange.store}-{number}")
        killed: list[int] = []

        def kill(delay: float, killed: list[int] = killed) -> None:
            time.sleep(delay)
            killed.append(pids(cluster)[victim])
            os.kill(killed[0], signal.SIGKILL)

        assassin: list[threading.Thread] = []

        def begin(done: int, total: int, state: str, assassin: list[threading.Thread] = assassin) -> None:
            if not assassin and "loading" not in state:
                assassin.append(threading.Thread(target=kill, args=(moments.uniform(0, 1),)))
                assassin[0].start()

        store = extract(again, begin, client=cluster)
        assassin[0].join()
        assert killed
        assert store.samples_done == 12
        assert files(again) == expected
        cluster.wait_for_workers(2, timeout=60)


@pytest.mark.slow
def test_a_poison_sample_fails_its_partition_and_no_other(
    cluster: Client, config: ExtractConfig, tmp_path: Path
) -> None:
    names = [f"{number:02d}.png" for number in range(12)]
    names[7] = "07-poison.png"
    folder = draw(tmp_path / "pictures", names)
    poisoned = replace(config, dataset="strange", data_root=str(folder), splits=None, limit=None)
    with pytest.raises(
        ExtractionError, match=r"1 of 6 partitions .*all-000003: .*died or hung each time"
    ) as caught:
        extract(poisoned, client=cluster)
    assert caught.value.exit_code == 3
    there = sorted(path.stem for path in (Path(str(config.store)) / "partitions").iterdir())
    assert there == [f"all-{number:06d}" for number in (0, 1, 2, 4, 5)]
    (folder / "07-poison.png").rename(folder / "07.png")
    cluster.wait_for_workers(2, timeout=60)


@pytest.mark.slow
def test_a_broken_gpu_costs_a_process_and_not_the_run(
    cluster: Client, config: ExtractConfig, tmp_path: Path
) -> None:
    """After an error of CUDA each call of a process fails: it must not go on to fail other partitions."""
    before = set(pids(cluster))
    folder = draw(tmp_path / "pictures", [f"{number}{'-gpu' * (number == 5)}.png" for number in range(8)])
    broken = replace(config, dataset="strange", data_root=str(folder), splits=None, limit=None)
    with pytest.raises(ExtractionError, match=r"1 of 4 partitions .*all-000002"):
        extract(broken, client=cluster)
    cluster.wait_for_workers(2, timeout=60)
    assert set(pids(cluster)) != before


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_an_own_cluster_gives_the_same_bytes_and_leaves_nothing(config: ExtractConfig, workers: int) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    assert extract(config, workers=workers).samples_done == 5
    assert files(config) == inline(config)
    left = {p.pid for p in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(p.cmdline())}
    assert left <= before


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_all_processes_and_stops_one(strange: ExtractConfig) -> None:
    """A terminal interrupts the whole group; partitions under way must end all the same."""
    scenes = replace(strange, dataset="scenes", data_root=None, splits=("val",), limit=30, partition_size=2)
    wanted = Path(f"{scenes.store}.json")
    wanted.write_text(json.dumps(scenes.to_json()))
    line = [sys.executable, "-m", "mmdiff_cache", "extract", "--config", str(wanted), "--workers", "2"]
    records = Path(str(scenes.store)) / "partitions"
    with subprocess.Popen(line, start_new_session=True, stderr=subprocess.PIPE, text=True) as command:
        while len(list(records.glob("*"))) < 3 and command.poll() is None:
            time.sleep(0.05)
        os.killpg(command.pid, signal.SIGINT)
        said = command.communicate()[1]
    assert command.returncode == 130, said
    assert "The same command continues:" in said
    assert "Traceback" not in said
    assert 3 <= plan(scenes).done / 2 < 15
    assert list((Path(str(scenes.store)) / "staging").iterdir()) == []
    extract(scenes, workers=0)
    assert files(scenes) == inline(scenes)


@pytest.mark.slow
def test_a_second_ctrl_c_cuts_what_is_under_way(
    strange: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One partition never ends. The first press waits for it, the second does not; nothing is left behind."""
    pictures = draw(tmp_path / "hanging", [f"{n:02d}{'-hang' * (n == 7)}.png" for n in range(12)])
    hanging = replace(strange, data_root=str(pictures))
    wanted = tmp_path / "config.json"
    wanted.write_text(json.dumps(hanging.to_json()))
    main = "import sys; from tests.extraction import strange_data; from mmdiff_cache.cli.app import run; "
    main += "strange_data.dask_setup(None); sys.exit(run(sys.argv[1:]))"
    line = [sys.executable, "-c", main, "extract", "--config", str(wanted), "--workers", "2"]
    preload = {"DASK_DISTRIBUTED__WORKER__PRELOAD": json.dumps(PRELOAD["distributed.worker.preload"])}
    records = Path(str(hanging.store)) / "partitions"
    with subprocess.Popen(
        line, start_new_session=True, stderr=subprocess.PIPE, text=True, env={**os.environ, **preload}
    ) as command:
        while len(list(records.glob("*"))) < 4 and command.poll() is None:
            time.sleep(0.05)
        processes = psutil.Process(command.pid).children(recursive=True)
        os.killpg(command.pid, signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            command.wait(timeout=3)
        os.killpg(command.pid, signal.SIGINT)
        said = command.communicate(timeout=60)[1]
    assert command.returncode == 130, said
    assert "The same command continues:" in said
    assert "Traceback" not in said
    assert len(processes) >= 2
    left = psutil.wait_procs(processes, timeout=10)[1]
    assert [process for process in left if process.status() != psutil.STATUS_ZOMBIE] == []
    monkeypatch.setattr(strange_data, "HANG_SECONDS", 0.0)
    assert 4 <= plan(hanging).done <= 10, "all but the one that hangs, and perhaps one beside it"
    extract(hanging, workers=0)
    assert files(hanging) == inline(hanging)


@pytest.mark.slow
def test_a_worker_may_be_killed_while_it_loads_the_backbone(cluster: Client, config: ExtractConfig) -> None:
    killed: list[int] = []

    def kill(done: int, total: int, state: str) -> None:
        if "loading" in state:
            killed.append(pids(cluster)[0])
            os.kill(killed[0], signal.SIGKILL)

    store = extract(config, kill, client=cluster)
    assert len(killed) == 1
    assert files(config) == inline(config)
    assert "died while it got ready" in (store.path / "logs" / "extract.log").read_text()
    cluster.wait_for_workers(2, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("each", [False, True])
def test_a_worker_may_be_killed_while_it_starts(config: ExtractConfig, each: bool) -> None:
    """Before it has said that it is there. Where each of them dies, the run ends instead of waiting."""
    before = set(psutil.Process().children(recursive=True))
    killed: set[psutil.Process] = set()
    over = threading.Event()

    def kill() -> None:
        while not over.is_set() and (each or not killed):
            born = set(psutil.Process().children(recursive=True)) - before - killed
            for process in [one for one in born if is_worker(one)][: None if each else 1]:
                process.kill()
                killed.add(process)

    assassin = threading.Thread(target=kill)
    assassin.start()
    try:
        if each:
            with pytest.raises(ClusterRefused, match="in each of 3 attempts a worker process died"):
                extract(config, workers=2)
        else:
            extract(config, workers=2)
            assert files(config) == inline(config)
    finally:
        over.set()
        assassin.join()
    assert killed


@pytest.mark.slow
def test_a_scheduler_that_dies_is_said_so_and_the_next_run_goes_on(
    strange: ExtractConfig, tmp_path: Path
) -> None:
    """Scheduler and worker by hand, as a cluster of others; the worker has no nanny and many threads."""
    address_file = tmp_path / "scheduler.json"
    module = [sys.executable, "-m"]
    hand = ["--scheduler-file", str(address_file), "--host", "127.0.0.1"]
    scheduler = [*module, "distributed.cli.dask_scheduler", *hand, "--port", "0", "--no-dashboard"]
    worker = [*module, "distributed.cli.dask_worker", *hand, "--no-nanny", "--nthreads", "6"]
    worker += ["--preload", str(Path(strange_data.__file__)), "--no-dashboard"]
    with subprocess.Popen(scheduler) as head, subprocess.Popen(worker) as hands:
        while not address_file.exists():
            time.sleep(0.1)

        def kill(done: int, total: int, state: str) -> None:
            if done:
                head.kill()

        try:
            with (
                pytest.raises(ClusterError, match="run the same command again") as caught,
                Client(scheduler_file=str(address_file)) as client,
            ):
                extract(strange, kill, client=client)
        finally:
            head.kill()
            hands.kill()
    assert caught.value.exit_code == 5
    assert extract(strange, workers=0).samples_done == 12
    assert files(strange) == inline(strange)
