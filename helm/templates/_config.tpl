{{/* What `tandem serve --config` reads, and the numbers it is made of. */}}

{{/* Every worker group of a track with its defaults filled in: {"groups": [{"name", ...}]}. */}}
{{- define "tandem.groups" -}}
{{- $groups := list -}}
{{- range $name := keys .Values.workerGroups | sortAlpha -}}
  {{- with index $.Values.workerGroups $name -}}
    {{- $group := mergeOverwrite (deepCopy $.Values.workerDefaults) (deepCopy .) -}}
    {{- if not $group.offers -}}
      {{- fail (printf "workerGroups.%s.offers is empty: say which role its pods have room for, {language: 1} say" $name) -}}
    {{- end -}}
    {{- $min := ternary $group.replicas $group.minReplicas (lt (int $group.minReplicas) 0) | int -}}
    {{- $max := ternary $group.replicas $group.maxReplicas (lt (int $group.maxReplicas) 0) | int -}}
    {{- if or (gt $min (int $group.replicas)) (lt $max (int $group.replicas)) -}}
      {{- fail (printf "workerGroups.%s.replicas is %d, which is not between minReplicas %d and maxReplicas %d" $name (int $group.replicas) $min $max) -}}
    {{- end -}}
    {{- $groups = append $groups (mergeOverwrite $group (dict "name" $name "min" $min "max" $max)) -}}
  {{- end -}}
{{- end -}}
{{- dict "groups" $groups | toJson -}}
{{- end }}

{{/* dict "ctx" "role": how many workers of a role all groups have room for. */}}
{{- define "tandem.numWorkers" -}}
{{- $total := 0 -}}
{{- range (include "tandem.groups" .ctx | fromJson).groups -}}
  {{- $total = add $total (mul (int .replicas) (int (get .offers $.role | default 0))) -}}
{{- end -}}
{{- $total -}}
{{- end }}

{{- define "tandem.modelPath" -}}
{{- if eq .Values.model.source "image" -}}
{{- .Values.model.path | default "/opt/tandem/demo-model" -}}
{{- else if eq .Values.model.source "pvc" -}}
{{- .Values.model.path | default "/models" -}}
{{- else -}}
/models/{{ base (.Values.model.s3.prefix | default .Values.model.s3.bucket) }}
{{- end -}}
{{- end }}

{{- define "tandem.config" -}}
{{- $model := dict "path" (include "tandem.modelPath" .) -}}
{{- if and (eq .Values.model.source "image") (not .Values.model.path) -}}
  {{- $model = merge $model (dict "served_model_name" "tandem-demo") -}}
{{- end -}}
{{- $workers := dict "placement" "roles" -}}
{{- range $role := list "embedding" "language" "prefill" "decode" -}}
  {{- $count := include "tandem.numWorkers" (dict "ctx" $ "role" $role) | int -}}
  {{- if gt $count 0 -}}
    {{- $_ := set $workers $role $count -}}
  {{- end -}}
{{- end -}}
{{- if and .Values.model.vision (not (hasKey $workers "embedding")) -}}
  {{- fail "no worker group offers room for a worker of the role embedding (model.vision: false is for models that only read text)" -}}
{{- end -}}
{{- $isSplit := or (hasKey $workers "prefill") (hasKey $workers "decode") -}}
{{- if and $isSplit (hasKey $workers "language") -}}
  {{- fail "worker groups offer room for language workers and for prefill or decode workers, which take their place: set workerGroups.language to null" -}}
{{- else if and $isSplit (not (and (hasKey $workers "prefill") (hasKey $workers "decode"))) -}}
  {{- fail "worker groups offer room for prefill or for decode workers: a split cluster needs both" -}}
{{- else if not (or $isSplit (hasKey $workers "language")) -}}
  {{- fail "no worker group offers room for a worker of the role language" -}}
{{- end -}}
{{- $transfer := dict "transport" "tcp" "host" "auto" "ports" (printf "%d-%d" (int .Values.transfer.firstPort) (int .Values.transfer.lastPort)) -}}
{{- $gateway := dict "host" "0.0.0.0" "port" (int .Values.gateway.port) "drain_s" (int .Values.gateway.drainSeconds) -}}
{{- $own := dict "model" $model "workers" $workers "transfer" $transfer "gateway" $gateway -}}
{{- range $section, $settings := .Values.config -}}
  {{- range $name, $_ := $settings -}}
    {{- if and (hasKey $own $section) (hasKey (index $own $section) $name) (ne $name "served_model_name") -}}
      {{- fail (printf "config.%s.%s is set by the chart; see README.md for the value that decides it" $section $name) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- $config := mergeOverwrite $own (deepCopy .Values.config) -}}
{{- range $section := keys $config -}}
  {{- if not (index $config $section) -}}{{- $_ := unset $config $section -}}{{- end -}}
{{- end -}}
{{- toYaml $config -}}
{{- end }}
