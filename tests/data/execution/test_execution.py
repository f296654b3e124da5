"""Executors: the same rows wherever the work is done, errors as they were raised, nothing lost when a worker dies."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.execution.base import Executor, LocalExecutor
from cpo_pipe.data.execution.options import open_executor
from tests.support.execution import WORKERS, batches, numbers, work

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", autouse=True)
def _ray_ends_here() -> Iterator[None]:
    yield
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.slow)])
def executor(request: pytest.FixtureRequest) -> Executor:
    if request.param == "local":
        return LocalExecutor()
    pytest.importorskip("ray", reason="Ray is not installed")
    return open_executor("ray", WORKERS, None)


def test_all_rows_of_all_outputs_are_there(executor: Executor, tmp_path: Path) -> None:
    done, meeting = work(tmp_path), tmp_path / "meeting"
    meeting.mkdir()
    if not isinstance(executor, LocalExecutor):
        done = replace(done, meeting=str(meeting))
    executor.run(done, batches(20, 3), "measure", 20)
    assert numbers(done.first) == numbers(done.second) == [float(number) for number in range(20)]
    assert not list(tmp_path.rglob("worklist")), "what was only handed over is gone"
    processes = set(done.first.read([f"e{number}" for number in range(20)])["num_tokens"].to_pylist())
    assert processes == {os.getpid()} if isinstance(executor, LocalExecutor) else len(processes) == WORKERS


@pytest.mark.parametrize(
    ("trouble", "kind", "message"),
    [
        ("input", InputError, r"^field is 7: must be less; lower it$"),
        ("run", RunError, r"^number 7 is not finite$"),
        ("crash", (ZeroDivisionError, RunError), "seven$"),
    ],
)
def test_an_error_is_the_one_that_was_raised_and_rows_before_it_are_kept(
    executor: Executor, tmp_path: Path, trouble: str, kind: Any, message: str
) -> None:
    done = work(tmp_path, trouble)
    with pytest.raises(kind, match=message):
        executor.run(done, batches(20, 20), "measure", 20)
    assert numbers(done.first) == numbers(done.second) == [float(number) for number in range(7)]


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    done = work(tmp_path / "store", str(tmp_path / "died"))
    open_executor("ray", WORKERS, None).run(done, batches(20, 3), "measure", 20)
    assert (tmp_path / "died").exists()
    assert numbers(done.second) == [float(number) for number in range(20)]


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="--workers and --worker-gpus need --executor ray"):
        open_executor("local", 2, None)
    with pytest.raises(InputError, match="--executor slurm: must be local or ray"):
        open_executor("slurm", None, None)


@pytest.mark.slow
def test_gpus_that_are_not_there_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    with pytest.raises(InputError, match=r"^--worker-gpus 99: the cluster has \d+ GPUs; lower it, or add nodes$"):
        open_executor("ray", 1, 99).run(work(tmp_path), batches(1, 1), "measure", 1)


IN_A_PROCESS_OF_ITS_OWN = """
import sys
from tests.support.execution import batches, numbers, work
from cpo_pipe.data.execution.options import open_executor
done = work(sys.argv[1])
try:
    open_executor("ray", 2, None).run(done, batches(20, 2), "measure", 20)
    print(sorted(numbers(done.second)) == list(range(20)))
except Exception as error:
    print(type(error).__name__, error)
"""


def run_with(address: str | None, root: str, folder: Path, **variables: str) -> str:
    """What the command prints, started in a folder of its own."""
    environment = os.environ | ({"RAY_ADDRESS": address} if address else {}) | variables
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN, root]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.stdout or done.stderr[-2000:]


@pytest.mark.slow
def test_a_cluster_of_two_nodes_is_used_by_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the nodes' workers, too
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=2)
        assert run_with(cluster.address, "store", tmp_path) == "True\n", "a relative path, and workers elsewhere"
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_workers_write_to_an_object_store(object_server: str, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    import boto3

    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": object_server, "CPO_PIPE_CACHE": str(tmp_path)}  # fmt: skip
    client = boto3.client("s3", endpoint_url=object_server, region_name="us-east-1",
                          aws_access_key_id="test", aws_secret_access_key="test")  # fmt: skip
    client.create_bucket(Bucket="bucket")
    assert run_with(None, "s3://bucket/store", tmp_path, **keys) == "True\n"
    objects = [found["Key"] for found in client.list_objects_v2(Bucket="bucket")["Contents"]]
    assert not [name for name in objects if "worklist" in name]


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_named(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    said = run_with("127.0.0.1:9", "store", tmp_path)
    assert said == "InputError RAY_ADDRESS 127.0.0.1:9: no Ray cluster answers there; correct it, or unset it\n"
