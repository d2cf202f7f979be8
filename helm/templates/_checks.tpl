{{/* What cannot work, refused while it is rendered: a pod that waits for ever tells nobody why. */}}

{{- define "tandem.checks" -}}
{{- include "tandem.checkModel" . -}}
{{- include "tandem.checkPorts" . -}}
{{- include "tandem.checkLabels" . -}}
{{- $pods := dict "head" .Values.head "gateway" .Values.gateway -}}
{{- range (include "tandem.groups" . | fromJson).groups -}}
  {{- $_ := set $pods (printf "workerGroups.%s" .name) . -}}
  {{- include "tandem.checkRoom" (dict "ctx" $ "group" .) -}}
{{- end -}}
{{- range $where, $pod := $pods -}}
  {{- include "tandem.checkPod" (dict "ctx" $ "where" $where "pod" $pod) -}}
{{- end -}}
{{- end }}

{{/* Labels by which the objects find each other are the chart's. */}}
{{- define "tandem.checkLabels" -}}
{{- range $name, $_ := .Values.commonLabels -}}
  {{- if or (regexMatch "^(tandem|ray[.]io|helm[.]sh)/" $name) (regexMatch "^app[.]kubernetes[.]io/(name|instance|component|version|managed-by|created-by)$" $name) -}}
    {{- fail (printf "commonLabels.%s is a label by which objects find each other: choose another name" $name) -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{/* dict "ctx" "where" "pod": limits that Ray counts, an object store that fits, and mounts of volumes that are there. */}}
{{- define "tandem.checkPod" -}}
{{- $where := .where -}}
{{- $limits := get (.pod.resources | default dict) "limits" | default dict -}}
{{- range list "cpu" "memory" -}}
  {{- if not (get $limits .) -}}
    {{- fail (printf "%s.resources.limits.%s is not set: Ray counts what a pod has by its limits, and its autoscaler ends without them" $where .) -}}
  {{- end -}}
{{- end -}}
{{- $store := float64 .ctx.Values.ray.objectStoreBytes -}}
{{- if ge $store (include "tandem.bytes" .pod.sharedMemory | float64) -}}
  {{- fail (printf "ray.objectStoreBytes is %.0f and %s.sharedMemory only %s: Ray would put its objects on the disk" $store $where .pod.sharedMemory) -}}
{{- end -}}
{{- $names := list "scratch" "shared-memory" "scripts" "api-keys" "model" -}}
{{- range .pod.extraVolumes -}}
  {{- if has .name $names -}}
    {{- fail (printf "%s.extraVolumes: the pod has a volume %s already: choose another name" $where (toJson .name)) -}}
  {{- end -}}
  {{- $names = append $names .name -}}
{{- end -}}
{{- $paths := list "/tmp" "/dev/shm" "/etc/tandem/scripts" "/etc/tandem/secrets" "/models" -}}
{{- range .pod.extraVolumeMounts -}}
  {{- if not (has .name $names) -}}
    {{- fail (printf "%s.extraVolumeMounts: there is no volume %s: add it to extraVolumes" $where (toJson .name)) -}}
  {{- end -}}
  {{- if has .mountPath $paths -}}
    {{- fail (printf "%s.extraVolumeMounts: something is mounted at %s already" $where .mountPath) -}}
  {{- end -}}
  {{- $paths = append $paths .mountPath -}}
{{- end -}}
{{- end }}

{{/* A quantity such as 512Mi as a number of bytes. */}}
{{- define "tandem.bytes" -}}
{{- $factors := dict "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 -}}
{{- $unit := regexFind "[A-Za-z]+$" . -}}
{{- mulf (trimSuffix $unit . | float64) (get $factors $unit | default 1.0) -}}
{{- end }}

{{- define "tandem.checkModel" -}}
{{- $model := .Values.model -}}
{{- if and (eq $model.source "pvc") $model.path (not (regexMatch "^/models(/|$)" $model.path)) -}}
  {{- fail (printf "model.path is %s, but the claim appears as /models: name a folder below it" $model.path) -}}
{{- end -}}
{{- if and (eq $model.source "s3") $model.path -}}
  {{- fail (printf "model.path is %s, but where the model comes from S3 its folder is named after model.s3.prefix: leave it out" $model.path) -}}
{{- end -}}
{{- end }}

{{/* One port serves one purpose: processes of a pod share its address, and the network policies name flows by port. */}}
{{- define "tandem.checkPorts" -}}
{{- $ports := .Values.ray.ports -}}
{{- $node := int $ports.firstNode -}}
{{- $taken := list
  (list "gateway.port" .Values.gateway.port .Values.gateway.port)
  (list "ray.ports.gcs" $ports.gcs $ports.gcs)
  (list "ray.ports.dashboard" $ports.dashboard $ports.dashboard)
  (list "ray.ports.agent" $ports.agent $ports.agent)
  (list "ray.ports.metrics" $ports.metrics $ports.metrics)
  (list "ray.ports.firstNode" $node (add $node 3))
  (list "ray.ports.firstWorker to lastWorker" $ports.firstWorker $ports.lastWorker)
  (list "transfer.firstPort to lastPort" .Values.transfer.firstPort .Values.transfer.lastPort)
-}}
{{- range $i, $one := $taken -}}
  {{- if gt (int (index $one 1)) (int (index $one 2)) -}}
    {{- fail (printf "%s: the first is %d, which is beyond the last, %d" (index $one 0) (int (index $one 1)) (int (index $one 2))) -}}
  {{- end -}}
  {{- range $other := slice $taken (int (add $i 1)) -}}
    {{- if and (le (int (index $one 1)) (int (index $other 2))) (le (int (index $other 1)) (int (index $one 2))) -}}
      {{- fail (printf "%s and %s both take port %d: give each its own" (index $one 0) (index $other 0) (max (int (index $one 1)) (int (index $other 1)))) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{/* dict "ctx" "group": the workers that a pod offers room for fit its ports, CPUs and GPUs. */}}
{{- define "tandem.checkRoom" -}}
{{- $values := .ctx.Values -}}
{{- $name := .group.name -}}
{{- $workers := $values.config.workers | default dict -}}
{{- $numGpus := get $workers "num_gpus" | default -1 | float64 -}}
{{- if and (hasKey $workers "num_gpus") (eq (float64 $workers.num_gpus) 0.0) -}}{{- $numGpus = 0.0 -}}{{- end -}}
{{- $hasGpus := false -}}
{{- range (include "tandem.groups" .ctx | fromJson).groups -}}
  {{- if gt (int .gpus) 0 -}}{{- $hasGpus = true -}}{{- end -}}
{{- end -}}
{{- $count := 0 -}}
{{- $gpus := 0.0 -}}
{{- range $role, $offered := .group.offers -}}
  {{- $count = add $count (int $offered) -}}
  {{- $section := get $values.config (ternary "embedding" "language" (eq $role "embedding")) | default dict -}}
  {{- $device := get $section "device" | default (get ($values.config.model | default dict) "device") | default "auto" -}}
  {{- $each := ternary $numGpus (ternary 1.0 0.0 (or (hasPrefix "cuda" $device) (and (eq $device "auto") $hasGpus))) (ge $numGpus 0.0) -}}
  {{- $gpus = addf $gpus (mulf $each (float64 $offered)) -}}
{{- end -}}
{{- $room := div (add1 (sub (int $values.transfer.lastPort) (int $values.transfer.firstPort))) 2 | int -}}
{{- if gt (int $count) $room -}}
  {{- fail (printf "transfer.firstPort to lastPort is room for %d processes of a pod (two ports each), and workerGroups.%s offers %d" $room $name (int $count)) -}}
{{- end -}}
{{- $limits := get .group.resources "limits" | default dict -}}
{{- with get $limits "cpu" -}}
  {{- $cpus := ternary (divf (trimSuffix "m" (toString .)) 1000) (toString . | float64) (hasSuffix "m" (toString .)) | ceil -}}
  {{- $asked := mulf (float64 $count) (ternary (get $workers "num_cpus") 1.0 (hasKey $workers "num_cpus") | float64) -}}
  {{- if gt $asked $cpus -}}
    {{- fail (printf "workerGroups.%s: the workers of a pod ask for %v CPUs and Ray counts %v there: raise resources.limits.cpu, or lower config.workers.num_cpus or offers" $name $asked $cpus) -}}
  {{- end -}}
{{- end -}}
{{- if gt $gpus (float64 .group.gpus) -}}
  {{- fail (printf "workerGroups.%s: the workers of a pod ask for %v GPUs and it has %d: set gpus, a share as config.workers.num_gpus (0.5, say), or config.embedding.device (language.device) to cpu" $name $gpus (int .group.gpus)) -}}
{{- end -}}
{{- end }}
