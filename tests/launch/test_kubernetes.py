"""The JobSet manifest: as Kubernetes' own schemas and Kubeflow's model of JobSet see it."""

import re

import pytest
import yaml

from shardtrain import UserError
from shardtrain.launch import detect, restarts
from shardtrain.launch.kubernetes import KubernetesJob, manifest

COMMAND = ["python", "recipes/train_cnn.py", "--mesh", "data=-1", "--out", "/runs/no: 'yes' #1"]
JOBS = {
    "small": KubernetesJob("cnn", "me/cnn:1"),
    "large": KubernetesJob("no", "registry:5000/me/cnn:1", 4, 8, "500m", "64Gi", "runs", 5, 300),
}


def read(job, command=COMMAND):
    jobset = yaml.safe_load(manifest(job, command))
    pods = jobset["spec"]["replicatedJobs"][0]["template"]
    return jobset, pods, pods["spec"]["template"]["spec"]


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_what_it_says(job):
    jobset, pods, pod = read(job)
    assert jobset["metadata"]["name"] == job.name  # "no" is a name too
    assert pods["spec"]["parallelism"] == pods["spec"]["completions"] == job.pods
    (box,) = pod["containers"]
    assert box["command"] == COMMAND
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert [pod["securityContext"][name] for name in ("runAsUser", "runAsGroup", "fsGroup")] == [1000] * 3
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == job.grace
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == job.restarts
    assert jobset["spec"]["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    assert box["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert pod["automountServiceAccountToken"] is False
    assert box["resources"]["requests"] == {"cpu": job.cpu, "memory": job.memory}
    assert box["resources"]["limits"]["memory"] == job.memory
    assert box["resources"]["limits"].get("nvidia.com/gpu", 0) == job.gpus
    mounts = {mount["name"] for mount in box["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert ("runs" in mounts) == (job.claim is not None)


def test_the_command_arrives_word_for_word():
    """Kubernetes replaces $(NAME) in a command, and reads $$ as $."""
    words = ["python", "$(HOME)", "$$", "$", "\U0001f600", "\u00e9", 'a "b"', "two\nlines", "\\", "no", ""]
    found = read(JOBS["small"], words)[2]["containers"][0]["command"]
    assert all(re.fullmatch(r"([^$]|\$\$)*", word) for word in found)
    assert [word.replace("$$", "$") for word in found] == words


def test_a_pod_finds_its_place():
    job = JOBS["large"]
    _, _, pod = read(job)
    (again,) = (entry for entry in pod["containers"][0]["env"] if entry["name"] == "SHARDTRAIN_RESTARTS")
    source = again["valueFrom"]["fieldRef"]["fieldPath"]
    assert source == "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']"
    env = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
    # Kubernetes sets the index in pods of Indexed Jobs, JobSet the annotation that the manifest refers to.
    env |= {"JOB_COMPLETION_INDEX": "3", "SHARDTRAIN_RESTARTS": "2", "JOBSET_UID": "b1d5", "NAMESPACE": "a"}
    place = detect(env)
    assert (place.coordinator, place.processes, place.process_id) == ("no-train-0-0.no:61440", 4, 3)
    assert restarts(env) == 2
    assert all(isinstance(value, str) for value in env.values())


def test_a_jobset_of_the_same_name_is_another_job():
    """Kubernetes puts the values of entries further up into the place of `$(NAME)`."""
    _, _, pod = read(JOBS["large"])
    entries = pod["containers"][0]["env"]
    names = [entry["name"] for entry in entries]
    job_name = entries[names.index("SHARDTRAIN_JOB")]["value"]
    used = re.findall(r"\$\((\w+)\)", job_name)
    assert used == ["NAMESPACE", "JOBSET_UID"]
    assert max(map(names.index, used)) < names.index("SHARDTRAIN_JOB")
    source = entries[names.index("JOBSET_UID")]["valueFrom"]["fieldRef"]["fieldPath"]
    assert source == "metadata.annotations['jobset.sigs.k8s.io/jobset-uid']"


def test_75_restarts_all_and_is_not_counted():
    jobset, pods, _ = read(JOBS["small"])
    assert pods["spec"]["backoffLimit"] == 0
    codes, evicted = pods["spec"]["podFailurePolicy"]["rules"]
    assert codes["action"] == evicted["action"] == "FailJob"
    assert codes["onExitCodes"]["values"] == [75]
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]


@pytest.mark.parametrize("version", ["1.31", "1.37"])
@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_kubernetes_takes_the_job_in_it(job, version):
    check = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate (108 MB)")
    _, pods, pod = read(job)
    check.validate(
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, **pods}, version, strict=True
    )
    pod["containers"][0]["comand"] = []
    with pytest.raises(check.ValidationError):
        check.validate(
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, **pods}, version, strict=True
        )


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_jobset_takes_it(job):
    api = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install kubeflow-trainer-api")
    jobset, _, _ = read(job)
    model = api.JobsetV1alpha2JobSet.from_dict(jobset)
    back = model.to_dict()
    assert lost(jobset, back) == []  # the model drops what JobSet does not know
    jobset["spec"]["failurePolicy"]["maxRestarts"] = "many"
    with pytest.raises(ValueError, match=r"maxRestarts|max_restarts"):
        api.JobsetV1alpha2JobSet.from_dict(jobset)


def lost(before, after, path=""):
    """The entries of a tree that another lacks."""
    if isinstance(before, dict):
        names = [name for name in before if name not in after]
        kept = [name for name in before if name in after]
        return [f"{path}.{name}" for name in names] + [
            gone for name in kept for gone in lost(before[name], after[name], f"{path}.{name}")
        ]
    if isinstance(before, list):
        return [gone for a, b in zip(before, after, strict=True) for gone in lost(a, b, f"{path}[]")]
    return []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"name": "My_Job"}, "lower case"),
        ({"name": "a" * 42}, "at most 41"),
        ({"image": ""}, "name the container image"),
        ({"pods": 0}, "above 0"),
        ({"memory": "16 GB"}, "--memory 16 GB"),
        ({"claim": ""}, "--claim '': use lower case"),
        ({"claim": "my runs"}, "--claim 'my runs'"),
    ],
)
def test_mistakes_are_sentences(more, message):
    with pytest.raises(UserError, match=message):
        KubernetesJob(**({"name": "cnn", "image": "me/cnn:1"} | more))
    with pytest.raises(UserError, match="write it after --"):
        manifest(JOBS["small"], [])
    with pytest.raises(UserError, match="cannot be written down"):
        manifest(JOBS["small"], ["python", "\x7f"])
