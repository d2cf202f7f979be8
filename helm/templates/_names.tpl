{{/* Names and labels. */}}

{{- define "tandem.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 36 | trimSuffix "-" -}}
{{- end }}

{{/* At most 35 characters: with -green and KubeRay's -head-svc it is 50, beyond which KubeRay cuts from the front. */}}
{{- define "tandem.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 35 | trimSuffix "-" -}}
{{- else if contains (include "tandem.name" .) .Release.Name -}}
{{- .Release.Name | replace "." "-" | trunc 35 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "tandem.name" .) | replace "." "-" | trunc 35 | trimSuffix "-" -}}
{{- end -}}
{{- if and (not .Values.fullnameOverride) (regexMatch "^[0-9]" .Release.Name) -}}
{{- fail (printf "the release's name, %s, begins with a digit, which the name of a service must not: set fullnameOverride" .Release.Name) -}}
{{- end -}}
{{- end }}

{{/* The cluster of one track: the release's name, with the colour where there are two. */}}
{{- define "tandem.cluster" -}}
{{- include "tandem.fullname" . -}}{{- if .Values.blueGreen.enabled }}-{{ .track }}{{ end -}}
{{- end }}

{{- define "tandem.matchLabels" -}}
app.kubernetes.io/name: {{ include "tandem.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "tandem.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "tandem.matchLabels" . }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Labels that single out one track's pods of a component: dict "ctx" "component". */}}
{{- define "tandem.componentLabels" -}}
{{ include "tandem.matchLabels" .ctx }}
app.kubernetes.io/component: {{ .component }}
tandem/track: {{ .ctx.track }}
{{- end }}

{{- define "tandem.apiSecret" -}}
{{- .Values.auth.api.existingSecret | default (printf "%s-api" (include "tandem.fullname" .)) -}}
{{- end }}

{{- define "tandem.raySecret" -}}
{{- .Values.auth.ray.existingSecret | default (printf "%s-ray" (include "tandem.fullname" .)) -}}
{{- end }}

{{/* dict "ctx" "image": the group's image over the chart's. */}}
{{- define "tandem.image" -}}
{{- $image := mergeOverwrite (deepCopy .ctx.Values.image) (.image | default dict) -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default .ctx.Chart.AppVersion }}
{{- end -}}
{{- end }}

{{/*
What the templates of one cluster see, for each track that runs: {"tracks": [{"track", "Values"}]}. Without blue-green
there is one, "main".
*/}}
{{- define "tandem.tracks" -}}
{{- $tracks := list -}}
{{- if .Values.blueGreen.enabled -}}
  {{- range $name := list "blue" "green" -}}
    {{- $track := index $.Values.blueGreen $name -}}
    {{- if $track.enabled -}}
      {{- $values := mergeOverwrite (deepCopy $.Values) (deepCopy ($track.overrides | default dict)) -}}
      {{- $tracks = append $tracks (dict "track" $name "Values" $values) -}}
    {{- end -}}
  {{- end -}}
  {{- if not (index .Values.blueGreen .Values.blueGreen.active).enabled -}}
    {{- fail (printf "blueGreen.active is %s, which is not enabled: nobody would answer" .Values.blueGreen.active) -}}
  {{- end -}}
{{- else -}}
  {{- $tracks = append $tracks (dict "track" "main" "Values" .Values) -}}
{{- end -}}
{{- dict "tracks" $tracks | toJson -}}
{{- end }}
