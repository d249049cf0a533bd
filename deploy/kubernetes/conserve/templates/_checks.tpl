{{/* What no schema can say: values that do not go together. */}}
{{- define "conserve.checks" -}}
{{- $v := .Values -}}
{{- $many := or (gt (int $v.replicas) 1) (and $v.autoscaling.enabled (gt (int $v.autoscaling.maxReplicas) 1)) -}}
{{- $shared := $v.storage.claim.existing | or (eq $v.storage.claim.accessMode "ReadWriteMany") -}}
{{- if not $v.image.repository -}}
  {{- fail "image.repository: name the image that you built of deploy/container." -}}
{{- end -}}
{{- if and $v.batches.enabled $many (not $v.secrets.database.name) -}}
  {{- fail "secrets.database.name: several replicas share their batches in one PostgreSQL; name the Secret with its URL, or set batches.enabled to false." -}}
{{- end -}}
{{- if and $v.batches.enabled $v.secrets.database.name (not $v.storage.filesUrl) (not $v.storage.claim.enabled) -}}
  {{- fail "storage.filesUrl: a database outlives pods, and so must the files; name an fsspec URL such as s3://bucket/folder, or set storage.claim.enabled." -}}
{{- end -}}
{{- if and $v.batches.enabled $many (not $v.storage.filesUrl) (not $shared) -}}
  {{- fail "storage.claim.accessMode: several replicas share one claim; it must be ReadWriteMany, or name storage.filesUrl." -}}
{{- end -}}
{{- if and $many $v.modelCache.claim.enabled (not $v.modelCache.claim.existing) (ne $v.modelCache.claim.accessMode "ReadWriteMany") -}}
  {{- fail "modelCache.claim.accessMode: several replicas share one claim; it must be ReadWriteMany, or set modelCache.claim.enabled to false." -}}
{{- end -}}
{{- if and (eq "0" ($v.update.maxSurge | toString | trimSuffix "%")) (eq "0" ($v.update.maxUnavailable | toString | trimSuffix "%")) -}}
  {{- fail "update.maxUnavailable: with update.maxSurge it may not be 0, too: nothing could be updated." -}}
{{- end -}}
{{- if $v.autoscaling.enabled -}}
  {{- if not $v.autoscaling.prometheusUrl -}}
    {{- fail "autoscaling.prometheusUrl: name the Prometheus that scrapes these servers, such as http://prometheus-operated.monitoring:9090." -}}
  {{- end -}}
  {{- if gt (int $v.autoscaling.minReplicas) (int $v.autoscaling.maxReplicas) -}}
    {{- fail (printf "autoscaling.minReplicas: %d is above autoscaling.maxReplicas, which is %d." (int $v.autoscaling.minReplicas) (int $v.autoscaling.maxReplicas)) -}}
  {{- end -}}
  {{- if not (or $v.batches.enabled $v.autoscaling.chatsPerReplica) -}}
    {{- fail "autoscaling.chatsPerReplica: without batches there is only chat to scale by; name how many one replica carries." -}}
  {{- end -}}
{{- end -}}
{{- end }}
