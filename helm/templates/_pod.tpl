{{/* What the pods of head, gateway and workers have in common. Each takes dict "ctx" "group" "component". */}}

{{- define "tandem.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ int64 .Values.security.runAsUser }}
runAsGroup: {{ int64 .Values.security.runAsGroup }}
fsGroup: {{ int64 .Values.security.runAsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "tandem.containerSecurity" -}}
runAsNonRoot: true
runAsUser: {{ int64 .Values.security.runAsUser }}
runAsGroup: {{ int64 .Values.security.runAsGroup }}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* Ray's processes ask each other for this token. */}}
{{- define "tandem.rayEnv" -}}
- name: RAY_AUTH_MODE
  value: token
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ include "tandem.raySecret" . }}
      key: {{ .Values.auth.ray.key }}
{{- end }}

{{- define "tandem.podLabels" -}}
{{ include "tandem.componentLabels" (dict "ctx" .ctx "component" .component) }}
tandem/ray: "true"
{{- if ne .component "head" }}
tandem/transfer: "true"
{{- end }}
{{- with .ctx.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "tandem.scheduling" -}}
{{- with .ctx.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- range $name := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "priorityClassName" "runtimeClassName" }}
{{- with get $.group $name }}
{{ $name }}:
  {{- if kindIs "string" . }} {{ . }}{{ else }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "tandem.volumes" -}}
- name: scratch
  emptyDir:
    sizeLimit: {{ .group.scratch }}
- name: shared-memory
  emptyDir:
    medium: Memory
    sizeLimit: {{ .group.sharedMemory }}
- name: scripts
  configMap:
    name: {{ include "tandem.cluster" .ctx }}-scripts
    {{- if eq .component "head" }}
    optional: true # KubeRay makes the pod that removes a cluster's state from Redis of this one, when the map may be gone
    {{- end }}
{{- if and (eq .component "gateway") .ctx.Values.auth.api.enabled }}
- name: api-keys
  secret:
    secretName: {{ include "tandem.apiSecret" .ctx }}
    defaultMode: 288 # 0440
    items:
      - key: {{ .ctx.Values.auth.api.key }}
        path: api-keys
{{- end }}
{{- if ne .component "head" }}
{{- if eq .ctx.Values.model.source "pvc" }}
- name: model
  persistentVolumeClaim:
    claimName: {{ required "model.source is pvc: name the claim in model.pvc.claimName" .ctx.Values.model.pvc.claimName }}
    readOnly: true
{{- else if eq .ctx.Values.model.source "s3" }}
- name: model
  emptyDir:
    sizeLimit: {{ .ctx.Values.model.s3.sizeLimit }}
{{- end }}
{{- end }}
{{- with .group.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "tandem.mounts" -}}
- name: scratch
  mountPath: /tmp
- name: shared-memory
  mountPath: /dev/shm
- name: scripts
  mountPath: /etc/tandem/scripts
  readOnly: true
{{- if and (eq .component "gateway") .ctx.Values.auth.api.enabled }}
- name: api-keys
  mountPath: /etc/tandem/secrets
  readOnly: true
{{- end }}
{{- if and (ne .component "head") (ne .ctx.Values.model.source "image") }}
- name: model
  mountPath: /models
  readOnly: true
  {{- if and (eq .ctx.Values.model.source "pvc") .ctx.Values.model.pvc.subPath }}
  subPath: {{ .ctx.Values.model.pvc.subPath }}
  {{- end }}
{{- end }}
{{- with .group.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Copies the checkpoint; the gateway needs no weights. */}}
{{- define "tandem.modelInit" -}}
{{- if and (eq .ctx.Values.model.source "s3") (ne .component "head") }}
{{- $s3 := .ctx.Values.model.s3 }}
initContainers:
  - name: model
    image: {{ $s3.image }}
    command:
      - sh
      - /etc/tandem/scripts/copy_model.sh
      - ":s3:{{ required "model.source is s3: name the bucket in model.s3.bucket" $s3.bucket }}/{{ $s3.prefix }}"
      - {{ include "tandem.modelPath" .ctx }}
      {{- if eq .component "gateway" }}
      - --exclude=*.safetensors
      {{- end }}
    env:
      - name: RCLONE_S3_PROVIDER
        value: {{ ternary "Other" "AWS" (ne $s3.endpoint "") }}
      - name: RCLONE_S3_REGION
        value: {{ $s3.region | quote }}
      {{- with $s3.endpoint }}
      - name: RCLONE_S3_ENDPOINT
        value: {{ . | quote }}
      {{- end }}
      {{- range $variable, $key := dict "RCLONE_S3_ACCESS_KEY_ID" "access_key_id" "RCLONE_S3_SECRET_ACCESS_KEY" "secret_access_key" }}
      {{- if $s3.existingSecret }}
      - name: {{ $variable }}
        valueFrom:
          secretKeyRef:
            name: {{ $s3.existingSecret }}
            key: {{ $key }}
      {{- end }}
      {{- end }}
    resources:
      requests: {cpu: 500m, memory: 512Mi}
      limits: {cpu: "2", memory: 1Gi}
    securityContext:
      {{- include "tandem.containerSecurity" .ctx | nindent 6 }}
    volumeMounts:
      - name: model
        mountPath: /models
      - name: scratch
        mountPath: /tmp
      - name: scripts
        mountPath: /etc/tandem/scripts
        readOnly: true
{{- end }}
{{- end }}

{{/* The Ray container: environment, mounts, probes. Ray's start command is KubeRay's. */}}
{{- define "tandem.rayContainer" -}}
{{- $ctx := .ctx -}}
{{- $values := .ctx.Values -}}
name: ray-{{ ternary "head" "worker" (eq .component "head") }}
image: {{ include "tandem.image" (dict "ctx" .ctx "image" .group.image) }}
imagePullPolicy: {{ $values.image.pullPolicy }}
env:
  {{- include "tandem.rayEnv" .ctx | nindent 2 }}
  - name: HOME
    value: /tmp
  - name: RAY_USAGE_STATS_ENABLED
    value: "0"
  - name: RAY_JOB_STOP_WAIT_TIME_S
    value: {{ int $values.gateway.drainSeconds | quote }}
  - name: RAY_health_check_period_ms
    value: "1000"
  - name: RAY_health_check_timeout_ms
    value: "2000"
  - name: RAY_health_check_failure_threshold
    value: "3"
  {{- with .group.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
ports:
  {{- if eq .component "head" }}
  - {name: gcs, containerPort: {{ $values.ray.ports.gcs }}}
  - {name: dashboard, containerPort: {{ $values.ray.ports.dashboard }}}
  {{- end }}
  {{- if eq .component "gateway" }}
  - {name: http, containerPort: {{ $values.gateway.port }}}
  {{- end }}
  - {name: metrics, containerPort: {{ $values.ray.ports.metrics }}}
resources:
  {{- $resources := deepCopy .group.resources }}
  {{- if gt (int (.group.gpus | default 0)) 0 }}
  {{- $gpus := dict .group.gpuResource (int .group.gpus) }}
  {{- $resources = mergeOverwrite $resources (dict "limits" $gpus "requests" $gpus) }}
  {{- end }}
  {{- toYaml $resources | nindent 2 }}
securityContext:
  {{- include "tandem.containerSecurity" .ctx | nindent 2 }}
volumeMounts:
  {{- include "tandem.mounts" . | nindent 2 }}
livenessProbe:
  exec:
    command: [python, /etc/tandem/scripts/probe.py, raylet, --port, {{ $values.ray.ports.agent | quote }}]
  initialDelaySeconds: 30
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 12
{{- if eq .component "gateway" }}
startupProbe:
  exec:
    command:
      - python
      - /etc/tandem/scripts/probe.py
      - canary
      - --port
      - {{ $values.gateway.port | quote }}
      {{- if $values.auth.api.enabled }}
      - --api-key-file
      - /etc/tandem/secrets/api-keys
      {{- end }}
  periodSeconds: 10
  timeoutSeconds: 60
  failureThreshold: {{ max 1 (div (int $values.gateway.startSeconds) 10) }}
readinessProbe:
  httpGet:
    path: /ready
    port: http
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: 2
lifecycle:
  preStop:
    exec:
      command: [python, -m, cluster, stop, --timeout-s, {{ int $values.gateway.drainSeconds | quote }}]
{{- else }}
readinessProbe:
  exec:
    command:
      - python
      - /etc/tandem/scripts/probe.py
      - {{ ternary "head" "raylet" (eq .component "head") }}
      - --port
      - {{ ternary $values.ray.ports.dashboard $values.ray.ports.agent (eq .component "head") | quote }}
  periodSeconds: 5
  timeoutSeconds: 10
  failureThreshold: 10
{{- end }}
{{- end }}

{{- define "tandem.rayPod" -}}
metadata:
  labels:
    {{- include "tandem.podLabels" . | nindent 4 }}
  {{- with .group.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- $needsToken := and (eq .component "head") .ctx.Values.autoscaling.enabled }}
  automountServiceAccountToken: {{ $needsToken }}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add 60 (int .ctx.Values.gateway.drainSeconds) }}
  securityContext:
    {{- include "tandem.podSecurity" .ctx | nindent 4 }}
  {{- range list "tandem.scheduling" "tandem.modelInit" }}
  {{- with include . $ | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- end }}
  containers:
    - {{ include "tandem.rayContainer" . | indent 6 | trim }}
  volumes:
    {{- include "tandem.volumes" . | nindent 4 }}
{{- end }}

{{/* Flags of `ray start` that every node has: fixed ports, so that a network policy can name them. */}}
{{- define "tandem.rayPorts" -}}
{{- $ports := .Values.ray.ports -}}
{{- $first := int $ports.firstNode -}}
node-manager-port: {{ $first | quote }}
object-manager-port: {{ add $first 1 | quote }}
runtime-env-agent-port: {{ add $first 2 | quote }}
dashboard-agent-grpc-port: {{ add $first 3 | quote }}
dashboard-agent-listen-port: {{ $ports.agent | quote }}
metrics-export-port: {{ $ports.metrics | quote }}
min-worker-port: {{ $ports.firstWorker | quote }}
max-worker-port: {{ $ports.lastWorker | quote }}
object-store-memory: {{ int64 .Values.ray.objectStoreBytes | quote }}
{{- end }}
