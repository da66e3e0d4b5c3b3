"""Writes a JobSet manifest for Kubernetes: an Indexed Job whose pods are the processes of one job."""

import json
import re
import shlex
from dataclasses import dataclass

from shardtrain.errors import REQUEUE, UserError
from shardtrain.guard.token import TOKEN
from shardtrain.launch.cluster import COORDINATOR, JOB, PORTS, PROCESSES, RESTARTS
from shardtrain.launch.command import refuse_no_command, refuse_unprintable

MOUNT = "/runs"
"""The path of the volume for --out in the pods."""


@dataclass(frozen=True)
class KubernetesJob:
    """What a job asks of Kubernetes.

    Attributes:
        name: name of the JobSet.
        image: container image that has shardtrain and the recipe.
        pods: number of pods, each of which runs one process.
        gpus: number of GPUs of each pod, 0 for none.
        cpu, memory: resources of each pod, as Kubernetes writes quantities.
        claim: PersistentVolumeClaim that all pods may write (ReadWriteMany), mounted at `/runs`, since
            checkpoints must outlive pods.
        restarts: how often the job starts again after a failure. Evicted pods and an exit status of `REQUEUE`
            are not failures.
        grace: seconds that pods have to save after SIGTERM.
    """

    name: str
    image: str
    pods: int = 1
    gpus: int = 0
    cpu: str = "4"
    memory: str = "16Gi"
    claim: str | None = None
    restarts: int = 3
    grace: int = 120

    def __post_init__(self) -> None:
        # Pods are named NAME-train-0-INDEX, and host names have 63 characters.
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,39}[a-z0-9])?", self.name):
            raise UserError(
                f"--name {self.name}: use lower case letters, digits and -, at most 41, a letter first"
            )
        if not self.image or " " in self.image or not self.image.isprintable():
            raise UserError(f"--image {self.image!r}: name the container image that has shardtrain in it")
        if self.pods < 1 or self.gpus < 0 or self.restarts < 0 or self.grace < 1:
            raise UserError("launch k8s: use --pods and --grace above 0, --gpus and --restarts from 0")
        if self.claim is not None and not re.fullmatch(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?", self.claim):
            raise UserError(f"--claim {self.claim!r}: use lower case letters, digits, - and .")
        for flag in ("cpu", "memory"):
            value = getattr(self, flag)
            if not re.fullmatch(r"[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?", value) or not re.search("[1-9]", value):
                raise UserError(f"--{flag} {value}: write a quantity above 0, such as 4 or 16Gi")


def manifest(job: KubernetesJob, command: list[str]) -> str:
    """Returns the JobSet that runs a command in every pod of a job.

    Args:
        job: what the job asks of Kubernetes.
        command: program and arguments.

    Raises:
        UserError: if there is no command, or if it cannot be written into a manifest.

    Example:
        >>> text = manifest(KubernetesJob("cnn", "me/cnn:1", pods=2), ["python", "train.py"])
        >>> "completions: 2" in text
        True
    """
    refuse_no_command(command)
    refuse_unprintable(command)
    gpus = f"\n                      nvidia.com/gpu: {job.gpus}" if job.gpus else ""
    mounts = f"\n                    - {{name: runs, mountPath: {MOUNT}}}" if job.claim else ""
    volumes = (
        f"\n                - name: runs  # checkpoints: write them to --out {MOUNT}/..."
        f"\n                  persistentVolumeClaim: {{claimName: {json.dumps(job.claim)}}}"
        if job.claim
        else ""
    )
    # Kubernetes replaces $(NAME) by a variable and reads $$ as $. YAML has JSON's escapes, except surrogate
    # pairs.
    quoted = [json.dumps(word.replace("$", "$$"), ensure_ascii=False) for word in command]
    words = "\n".join(f"                    - {word}" for word in quoted)
    return f"""\
# Written by `shardtrain launch k8s`. It needs JobSet 0.6 or newer in the cluster (https://jobset.sigs.k8s.io):
#     kubectl apply -f FILE; kubectl logs -f -l jobset.sigs.k8s.io/jobset-name={job.name} --prefix
# Runs {shlex.join(command)[:80].splitlines()[0]} in {job.pods} pods.
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {json.dumps(job.name)}
spec:
  network:  # JobSet makes a headless service of its own name, by which pods find each other
    enableDNSHostnames: true
    publishNotReadyAddresses: true
  failurePolicy:
    maxRestarts: {job.restarts}
    rules:  # what podFailurePolicy below lets end the job is no failure, and not counted
      - name: runAgain
        action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: train
      replicas: 1
      template:
        spec:
          completionMode: Indexed  # pods are numbered from 0; number 0 is the coordinator
          parallelism: {job.pods}
          completions: {job.pods}
          backoffLimit: 0  # one pod cannot be replaced alone: all start again, from the last checkpoint
          podFailurePolicy:
            rules:
              - action: FailJob  # "I was told to stop, run me again"
                onExitCodes: {{containerName: train, operator: In, values: [{REQUEUE}]}}
              - action: FailJob  # evicted, preempted, or its node is drained
                onPodConditions: [{{type: DisruptionTarget, status: "True"}}]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: {job.grace}  # from SIGTERM, to save
              automountServiceAccountToken: false  # training asks the cluster for nothing
              securityContext:
                runAsNonRoot: true
                runAsUser: 1000
                runAsGroup: 1000
                fsGroup: 1000
                seccompProfile: {{type: RuntimeDefault}}
              containers:
                - name: train
                  image: {json.dumps(job.image)}
                  command:
{words}
                  env:
                    - name: {COORDINATOR}
                      value: {job.name}-train-0-0.{job.name}:{PORTS[0]}
                    - name: {PROCESSES}
                      value: "{job.pods}"
                    - name: JOBSET_UID  # of this JobSet, and not of an earlier one with its name
                      valueFrom:
                        fieldRef:
                          fieldPath: metadata.annotations['jobset.sigs.k8s.io/jobset-uid']
                    - name: NAMESPACE
                      valueFrom:
                        fieldRef:
                          fieldPath: metadata.namespace
                    - name: {JOB}
                      value: $(NAMESPACE)/{job.name}/$(JOBSET_UID)
                    - name: {TOKEN}  # that no one knows who cannot read the JobSet
                      value: $(JOBSET_UID)
                    - name: {RESTARTS}  # after the first start the run goes on from its checkpoint
                      valueFrom:
                        fieldRef:
                          fieldPath: metadata.annotations['jobset.sigs.k8s.io/restart-attempt']
                    - {{name: HOME, value: /tmp}}
                  ports:
                    - {{name: coordinator, containerPort: {PORTS[0]}}}
                  securityContext:
                    allowPrivilegeEscalation: false
                    capabilities: {{drop: [ALL]}}
                  resources:
                    requests:
                      cpu: {json.dumps(job.cpu)}
                      memory: {job.memory}
                    limits:
                      memory: {job.memory}{gpus}
                  volumeMounts:
                    - {{name: shm, mountPath: /dev/shm}}{mounts}
              volumes:
                - name: shm  # NCCL and data workers share memory; the default is 64 MiB
                  emptyDir: {{medium: Memory}}{volumes}
"""
