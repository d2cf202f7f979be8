# The Tandem chart

Runs Tandem on Kubernetes: a [KubeRay](https://docs.ray.io/en/latest/cluster/kubernetes/index.html) RayCluster whose
worker groups each have room for one role (or several), a serve job that starts Tandem on it, and what goes with it.
The KubeRay operator (1.4 or later) must be installed; `kubectl get crd rayclusters.ray.io` tells.

This page is written by `python helm/generate.py` from `values.yaml`.

## Install

```console
$ docker build --target cpu --tag REGISTRY/tandem:0.1.0 . && docker push REGISTRY/tandem:0.1.0
$ helm install tandem helm/ --set image.repository=REGISTRY/tandem       # the small demo model, on CPUs
$ helm test tandem                                                        # waits until a prompt of one word got its token
```

`helm install` prints the commands that ask the first question. Values for the common cases lie in `examples/`:

| file | what it sets up |
|---|---|
| `cpu.yaml` | the demo model on CPUs, small |
| `gpu.yaml` | one GPU for each worker, the checkpoint on a volume |
| `colocated.yaml` | both roles in one pod: embeddings go through shared memory |
| `text.yaml` | a model that only reads text |
| `split.yaml` | prefill and decode on pods of their own |
| `s3.yaml` | the checkpoint from an S3-compatible store |
| `autoscaling.yaml` | Ray's autoscaler starts and ends pods |
| `redis.yaml` | Ray's state in Redis: the cluster outlives its head |
| `existing-secrets.yaml` | your own API keys and Ray token |
| `ingress.yaml`, `gateway-api.yaml` | reachable from outside |
| `media.yaml` | images by URL, from listed hosts |
| `monitoring.yaml` | ServiceMonitor, alerts, Grafana dashboard |
| `blue-green.yaml` | two clusters side by side |
| `scheduling.yaml` | node selectors, taints, spread, priorities, extra volumes |

## How it fits together

```
client ─> Service ─> gateway pod ── blocks and calls ──> embedding pods, language (or prefill and decode) pods
                        │ driver of the serve job                │
serve-job pod ─> head (jobs, state) <──────── Ray ───────────────┘
```

* Every pod of the RayCluster offers Ray resources named after roles (`tandem-embedding`, `tandem-language`,
  `tandem-prefill`, `tandem-decode`, `tandem-gateway`), and the configuration says `workers.placement: roles`: so each process runs in the group that you
  sized for it. The number of workers is the sum over the groups of `replicas` times `offers`.
* The **serve job** is a Deployment whose only container submits `tandem serve --config tandem.yaml` to Ray and follows
  its log (`kubectl logs deployment/RELEASE-tandem-serve`). When the job ends, Kubernetes submits it again. When the pod is
  moved, or the head is away for a while, the job goes on and is taken over. `tandem.yaml` travels with the job: a changed
  configuration, or `kubectl rollout restart deployment RELEASE-tandem-serve`, stops the job, which drains, and submits it
  again. New keys for clients take effect that way, too.
* A checkpoint from **S3** is copied to each pod before Ray starts: safetensors only where there are any, since stores often
  hold the same weights in other formats beside them; the gateway's pod takes no weights. From a **claim** nothing is
  copied, and several nodes read it (ReadOnlyMany or ReadWriteMany).
* **Autoscaling** is Ray's (`autoscaling.enabled`; a RayCluster has no scale subresource for an HPA). The number of workers
  is fixed while a serve job runs, so what it does is to start the pods that those workers and batch jobs ask for, and to end
  those that nobody uses, between `minReplicas` and `maxReplicas`; for more workers change `replicas`.
* The **gateway pod** is ready when a canary prompt got its token (startup) and as long as a worker of every kind lives
  (`/ready`). Before it ends it drains: `tandem stop`.
* A **worker pod** that ends leaves its unfinished requests to another worker, which computes them again
  (docs/operating.md, When a worker dies). Budgets keep evictions from taking more than `maxUnavailable` of a group's `replicas` at a time.
* **Secrets** are generated at the first installation, kept by upgrades and not deleted with the release. Keys of the
  encrypted transfer are no secrets of Kubernetes: each process draws its own and only ever shows the public half.
  Keeping them takes a look at the cluster, which tools that only render (`helm template`, Argo CD, kustomize) do not
  have: they would get new secrets at every sync, and new pods could not join. There, name secrets of your own
  (`examples/existing-secrets.yaml`).

## Upgrades

`helm upgrade` with another configuration restarts the serve job: running requests end, the model loads, about that long
nobody is served. KubeRay does not replace pods whose image or resources changed, unless (KubeRay 1.6 or later)
`ray.upgradeStrategy: Recreate` lets it end all pods and start new ones. For both, and without a pause, run two clusters
and switch the Service:

```console
$ helm upgrade tandem helm/ --values helm/examples/blue-green.yaml --set blueGreen.green.enabled=true --set blueGreen.green.overrides.image.tag=0.1.1
$ kubectl port-forward service/tandem-green 8001:80                       # try it beside the old one
$ helm upgrade tandem helm/ --values helm/examples/blue-green.yaml --set blueGreen.green.enabled=true --set blueGreen.green.overrides.image.tag=0.1.1 --set blueGreen.active=green
$ helm upgrade tandem helm/ --values helm/examples/blue-green.yaml --set blueGreen.green.enabled=true --set blueGreen.green.overrides.image.tag=0.1.1 --set blueGreen.active=green --set blueGreen.blue.enabled=false
```

A RayService would do the switch by itself, but it watches Ray Serve applications, and Tandem's gateway is not one: a Serve
proxy before it costs several milliseconds per first byte (docs/performance.md).

## Security

Every pod fits the "restricted" Pod Security Standard: no root, no capabilities, a read-only root file system (`/tmp` and
`/dev/shm` are `emptyDir`s with limits), the runtime's seccomp profile. No pod has a service account's token, but for the
head while `autoscaling.enabled`: Ray's autoscaler asks the Kubernetes API for pods. The network policies admit:

| from | to | ports |
|---|---|---|
| `networkPolicy.clients`, `networkPolicy.monitoring`, the test pod | gateway | `gateway.port` |
| gateway and worker pods of one cluster | each other | `transfer.firstPort` to `lastPort` |
| pods of one RayCluster | each other | `ray.ports`: node services, agent, metrics, worker processes |
| pods of one RayCluster | head | `ray.ports.gcs`, `dashboard` |
| serve job, `networkPolicy.jobs` | head | `ray.ports.dashboard` |
| every pod | `networkPolicy.dns` | `networkPolicy.dnsPorts` |
| gateway and worker pods | `model.s3.cidr`, where the model comes from S3 | `model.s3.port` |
| gateway pod | with `config.gateway.media_hosts`: public addresses | 80, 443 |
| gateway pod | `config.gateway.media_private_networks` | all |
| head | the Kubernetes API, with autoscaling; Redis, with fault tolerance | as set |

## Values

{{values}}
