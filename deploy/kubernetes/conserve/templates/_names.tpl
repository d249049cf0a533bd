{{/* Services begin with a letter and have no dots, which a release may be called otherwise. */}}
{{- define "conserve.name" -}}
{{- $name := .Release.Name | replace "." "-" -}}
{{- if regexMatch "^[0-9]" $name -}}{{- $name = printf "conserve-%s" $name -}}{{- end -}}
{{- if not (contains "conserve" $name) -}}{{- $name = printf "%s-conserve" $name -}}{{- end -}}
{{- trunc 52 $name | trimSuffix "-" -}}
{{- end }}

{{/* What a Deployment, its Service and its pods are known by; it must never change. */}}
{{- define "conserve.selector" -}}
app.kubernetes.io/name: conserve
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "conserve.labels" -}}
{{ include "conserve.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "conserve.account" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "conserve.name" .) }}
{{- else -}}
{{ .Values.serviceAccount.name | default "default" }}
{{- end -}}
{{- end }}

{{/* The name of a claim, of (root, claim, end of the name). */}}
{{- define "conserve.claim" -}}
{{- $root := index . 0 -}}
{{- (index . 1).existing | default (printf "%s-%s" (include "conserve.name" $root) (index . 2)) -}}
{{- end }}
